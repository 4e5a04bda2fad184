"""Architecture name, as config.json has it -> model class (vLLM: `model_executor/models/registry.py`)."""

from __future__ import annotations

from folovllm.model_executor.models.llama import LlamaForCausalLM
from folovllm.model_executor.models.qwen import Qwen2ForCausalLM, Qwen3ForCausalLM

MODELS: dict[str, type[LlamaForCausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def get_model_class(architecture: str) -> type[LlamaForCausalLM]:
    """Return the class for `architecture`; ValueError lists the supported ones."""
    if architecture not in MODELS:
        raise ValueError(f"architecture {architecture!r} is not supported; supported: {', '.join(sorted(MODELS))}.")
    return MODELS[architecture]
