"""The engine: processor, core, output processor and their facades.

The messages between them are re-exported here, where vLLM (`v1/engine/__init__.py`) defines them.
"""

from folovllm.outputs import EngineCoreOutput, EngineCoreOutputs
from folovllm.request import EngineCoreRequest, FinishReason

__all__ = ["EngineCoreOutput", "EngineCoreOutputs", "EngineCoreRequest", "FinishReason"]
