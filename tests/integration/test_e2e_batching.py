"""SmolLM2's real weights in float32: 64 mixed requests in one crowd give the tokens of the same requests alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from folovllm import LLM, SamplingParams
from folovllm.outputs import RequestOutput

SYSTEM = "You are a careful assistant. You answer briefly, you never guess, and you say so when you do not know."
QUESTIONS = [
    "Why is the sky blue?",
    "Name three rivers.",
    "What is 12 times 12?",
    "Wie heißt die Hauptstadt von Österreich? 😀",
    "Write a limerick about a cat that cannot swim but insists on living on a boat in the harbour of a small town.",
    "Explain what a hash map is, what it costs to look something up in it, and when one should not use it at all.",
    "Hi!",
    "List the planets.",
]
BEGINNINGS = [
    "Once upon a time",
    "def fibonacci(n):\n    ",
    "The",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28,",
    "In 1969, the first man on the Moon",
    "日本の首都は",
    " ".join(["The quick brown fox jumps over the lazy dog."] * 12),
    "To be, or not to be,",
]
MAX_TOKENS = (4, 8, 3, 6)


def make_params(i: int) -> SamplingParams:
    """Greedy, and every kind of sampling; lengths, stops and penalties vary with `i`."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 20, "min_p": 0.02},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.5},
        {"temperature": 0.0, "frequency_penalty": 1.0, "logit_bias": {260: 2.0}},
        {"temperature": 0.0, "stop": [".", " the", ","], "min_tokens": 2},
        {"temperature": 1.0, "n": 2},
        {"temperature": 0.0, "ignore_eos": True, "prompt_logprobs": 0},
    ]
    return SamplingParams(seed=1000 + i, max_tokens=MAX_TOKENS[i % len(MAX_TOKENS)], **kinds[i % len(kinds)])


def make_requests(llm: LLM) -> list[tuple[Any, SamplingParams]]:
    """64 requests: chats that share a system prompt, plain beginnings, twins, prompts of 1 to 120 tokens."""
    requests: list[tuple[Any, SamplingParams]] = []
    for i in range(64):
        if i % 2:
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTIONS[i // 2 % 8]}]
            requests.append((llm.preprocess_chat(messages), make_params(i)))
        else:
            requests.append((BEGINNINGS[i // 2 % 8], make_params(i)))
    return requests


def samples(output: RequestOutput) -> list[tuple[list[int], str, str | None, int | str | None]]:
    """All that has to be equal: ids, text and end of every sample."""
    return [(list(s.token_ids), s.text, s.finish_reason, s.stop_reason) for s in output.outputs]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small steps: on a busy machine, threads that wait for each other take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.network
@pytest.mark.slow
def test_64_mixed_requests_equal_the_same_requests_one_at_a_time() -> None:
    args: dict[str, Any] = {"dtype": "float32", "device": "cpu", "use_tqdm_on_load": False, "max_model_len": 256}
    trivial = LLM("smollm2-135m-instruct", **args, max_num_seqs=1, enable_prefix_caching=False)
    requests = make_requests(trivial)
    alone = [trivial.generate([prompt], params, use_tqdm=False)[0] for prompt, params in requests]
    trivial.llm_engine.shutdown()
    assert {len(output.outputs) for output in alone} == {1, 2}
    assert {sample.finish_reason for output in alone for sample in output.outputs} == {"length", "stop"}

    # Room for a few of them: admissions in waves, chunks of prompts, shared blocks and preemptions.
    crowd = LLM(
        "smollm2-135m-instruct", **args, max_num_seqs=64, max_num_batched_tokens=200, num_gpu_blocks_override=24
    )
    together = crowd.generate([prompt for prompt, _ in requests], [params for _, params in requests], use_tqdm=False)
    for i, (output, expected) in enumerate(zip(together, alone, strict=True)):
        assert samples(output) == samples(expected), f"request {i}: {requests[i]}"
    assert sum(output.num_cached_tokens or 0 for output in together) > 500
    scheduler = crowd.llm_engine.engine_core.engine_core.scheduler
    assert scheduler._num_preemptions > 0
    scheduler.kv_cache_manager.check_integrity()
    assert scheduler.kv_cache_manager.usage == 0
