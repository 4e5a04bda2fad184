"""How well a model predicts a text: exp of the mean negative log probability of its tokens.

A window slides over the text; each token is scored once, in the first window that holds it, and sees at least
window - stride tokens before it (the very first ones see fewer):

    tokens    0 1 2 3 4 5 6 7 8 9          window 6, stride 3
    window 0  . x x x x x                  .  context only      x  scored
    window 1        . . . x x x
    window 2              . . . x

Smaller strides give more context, lower perplexity and more work. All windows run as one batch of requests for
prompt log probabilities, so that quantized models are measured with the kernels that serve them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from folovllm.engine.llm_engine import LLMEngine
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from folovllm.utils.common import check_range


@dataclass(frozen=True)
class Perplexity:
    """The result, with what it was computed from."""

    perplexity: float
    """exp(nats_per_token)."""
    nats_per_token: float
    """Mean negative log probability, natural logarithm."""
    num_tokens: int
    """Tokens of the text."""
    num_scored_tokens: int
    """All but the first, which nothing predicts."""
    num_windows: int
    """Requests."""
    window: int
    """Most tokens that are seen together."""
    stride: int
    """Tokens between the starts of two windows."""
    seconds: float
    """Wall time of the requests."""


def make_windows(num_tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Return (start, end, first scored position) of each window; positions 1 to num_tokens - 1 are scored once.

    Raises:
        ValueError: fewer than two tokens, or window and stride do not fit each other.
    """
    check_range("window", window, low=2)
    check_range("stride", stride, low=1, high=window - 1, remedy="Below window, so that every token has context.")
    if num_tokens < 2:
        raise ValueError(f"The text has {num_tokens} tokens; perplexity needs at least 2.")
    windows, start, scored = [], 0, 1
    while scored < num_tokens:
        end = min(start + window, num_tokens)
        windows.append((start, end, scored))
        start, scored = start + stride, end
    return windows


def measure_perplexity(
    engine: LLMEngine, token_ids: Sequence[int], window: int, stride: int, use_tqdm: bool = True
) -> Perplexity:
    """Score `token_ids` with the engine's model.

    Raises:
        ValueError: see make_windows; or a window and one token do not fit max_model_len; or a token's log probability
            is not finite.
    """
    limit = engine.vllm_config.model_config.max_model_len
    assert limit is not None
    # A request has to leave room for one token of output.
    check_range("window", window, low=2, high=limit - 1, remedy="The model's limit, less one token of output.")
    windows = make_windows(len(token_ids), window, stride)
    params = SamplingParams(
        temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    started = time.perf_counter()
    for index, (start, end, _) in enumerate(windows):
        engine.add_request(f"window-{index}", {"prompt_token_ids": list(token_ids[start:end])}, params)
    sums: dict[str, float] = {}
    with tqdm(total=len(windows), desc="Perplexity", unit="window", disable=not use_tqdm) as bar:
        while engine.has_unfinished_requests():
            for output in engine.step():
                if not output.finished:
                    continue
                start, end, scored = windows[int(output.request_id.removeprefix("window-"))]
                assert output.prompt_logprobs is not None
                rows = zip(token_ids[scored:end], output.prompt_logprobs[scored - start :], strict=True)
                sums[output.request_id] = math.fsum(row[token].logprob for token, row in rows if row is not None)
                bar.update(1)
    nats = -math.fsum(sums.values()) / (len(token_ids) - 1)
    if not math.isfinite(nats):
        raise ValueError("A token of the text has no finite log probability: the model's weights may be damaged.")
    return Perplexity(
        perplexity=math.exp(min(nats, 700.0)),
        nats_per_token=nats,
        num_tokens=len(token_ids),
        num_scored_tokens=len(token_ids) - 1,
        num_windows=len(windows),
        window=window,
        stride=stride,
        seconds=time.perf_counter() - started,
    )
