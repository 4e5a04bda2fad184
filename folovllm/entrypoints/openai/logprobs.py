"""Log probabilities in the two shapes that OpenAI has, and in vLLM's for prompts.

vLLM: `_create_completion_logprobs` and `_create_chat_logprobs` of its serving classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from folovllm.outputs import Logprob

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have; vLLM's value."""

Position = dict[int, Logprob]
"""Token id -> log probability: the token that is there first, then the best ones."""


def completion_logprobs(positions: Sequence[Position], num_top: int, offset: int) -> dict[str, Any]:
    """Return {tokens, token_logprobs, top_logprobs, text_offset} of a completion.

    Args:
        positions: per token.
        num_top: best tokens asked for; the token itself is always among them.
        offset: characters of the choice's text before the first of these tokens.
    """
    shape: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for position in positions:
        token = next(iter(position.values()))
        text = token.decoded_token or ""
        top: dict[str, float] = {text: _finite(token.logprob)}
        for other in _best(position, num_top):
            # Tokens that end within a character have the same text: the best one stands for them.
            top.setdefault(other.decoded_token or "", _finite(other.logprob))
        shape["text_offset"].append(offset)
        shape["token_logprobs"].append(_finite(token.logprob))
        shape["tokens"].append(text)
        shape["top_logprobs"].append(top)
        offset += len(text)
    return shape


def with_first(first_token: str, rest: dict[str, Any]) -> dict[str, Any]:
    """Return the shape of a prompt: its first token has no log probability, `rest` begins after it."""
    return {
        "text_offset": [0, *rest["text_offset"]],
        "token_logprobs": [None, *rest["token_logprobs"]],
        "tokens": [first_token, *rest["tokens"]],
        "top_logprobs": [None, *rest["top_logprobs"]],
    }


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return two consecutive shapes as one."""
    return {name: first[name] + second[name] for name in first}


def chat_logprobs(positions: Sequence[Position], num_top: int) -> dict[str, Any]:
    """Return {content: [{token, logprob, bytes, top_logprobs}, ...]} of a chat completion."""
    content = []
    for position in positions:
        token = _chat_token(next(iter(position.values())))
        token["top_logprobs"] = [_chat_token(other) for other in _best(position, num_top)]
        content.append(token)
    return {"content": content, "refusal": None}


def prompt_logprobs(positions: Sequence[Position | None] | None) -> list[dict[str, Any] | None] | None:
    """Return vLLM's `prompt_logprobs`: per token None (the first) or {token id: {logprob, rank, decoded_token}}."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            str(token_id): {"logprob": _finite(item.logprob), "rank": item.rank, "decoded_token": item.decoded_token}
            for token_id, item in position.items()
        }
        for position in positions
    ]


def _best(position: Position, num_top: int) -> list[Logprob]:
    """Return the `num_top` most likely of a position, best first."""
    ranked = [item for item in position.values() if item.rank is not None and item.rank <= num_top]
    return sorted(ranked, key=lambda item: item.rank or 0)[:num_top]


def _chat_token(item: Logprob) -> dict[str, Any]:
    text = item.decoded_token or ""
    return {"token": text, "logprob": _finite(item.logprob), "bytes": list(text.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
