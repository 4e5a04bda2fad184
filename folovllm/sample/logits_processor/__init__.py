"""Logits processors: the interface and the built-in ones (vLLM: `v1/sample/logits_processor/`)."""

from folovllm.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
    build_logitsprocs,
)
from folovllm.sample.logits_processor.interface import BatchRow, LogitsProcessor, LogitsProcessors

__all__ = [
    "BatchRow",
    "LogitBiasLogitsProcessor",
    "LogitsProcessor",
    "LogitsProcessors",
    "MinPLogitsProcessor",
    "MinTokensLogitsProcessor",
    "build_logitsprocs",
]
