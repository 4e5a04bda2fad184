"""Tool calls out of a model's text (vLLM: `tool_parsers/`). Only hermes' format: Qwen2.5's and Qwen3's."""

from __future__ import annotations

from folovllm.entrypoints.openai.tool_parsers.hermes import (
    HermesStreamParser,
    ParsedToolCalls,
    ToolCall,
    ToolDelta,
    make_tool_call_id,
    parse_tool_calls,
)

__all__ = [
    "HermesStreamParser",
    "ParsedToolCalls",
    "ToolCall",
    "ToolDelta",
    "make_tool_call_id",
    "parse_tool_calls",
]
