"""FoloVLLM: a complete LLM inference engine, small enough to read, laid out like vLLM v1.

Importing this package is quick: torch and transformers load when an engine is made.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from folovllm.version import __version__

if TYPE_CHECKING:
    from folovllm.engine.arg_utils import EngineArgs
    from folovllm.engine.llm_engine import LLMEngine
    from folovllm.entrypoints.llm import LLM
    from folovllm.outputs import CompletionOutput, RequestOutput
    from folovllm.sampling_params import RequestOutputKind, SamplingParams

_LAZY = {
    "LLM": "folovllm.entrypoints.llm",
    "LLMEngine": "folovllm.engine.llm_engine",
    "EngineArgs": "folovllm.engine.arg_utils",
    "SamplingParams": "folovllm.sampling_params",
    "RequestOutputKind": "folovllm.sampling_params",
    "RequestOutput": "folovllm.outputs",
    "CompletionOutput": "folovllm.outputs",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineArgs",
    "LLMEngine",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
