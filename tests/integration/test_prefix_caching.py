"""Prefix caching through the whole engine with a tiny model: how much each request finds, and the tokens it gets.

How many tokens are found is worked out by hand in every test; the tokens must be those of an engine without cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm import LLM, SamplingParams
from folovllm.outputs import RequestOutput
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

BLOCK_SIZE = 8
SMALL: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "skip_tokenizer_init": True,
    "use_tqdm_on_load": False,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "block_size": BLOCK_SIZE,
    "num_gpu_blocks_override": 200,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_model(path, "llama")
    return path


@pytest.fixture(scope="module")
def plain(tiny: Path) -> LLM:
    """The engine without prefix caching."""
    return LLM(str(tiny), **SMALL, enable_prefix_caching=False, async_scheduling=False)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def llm(request: pytest.FixtureRequest, tiny: Path) -> LLM:
    """A fresh engine with an empty prefix cache."""
    return LLM(str(tiny), **SMALL, async_scheduling=request.param)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def drawn(seed: int, max_tokens: int = 10) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=max_tokens, ignore_eos=True)


def make_prompt(length: int, seed: int = 0) -> list[int]:
    """Prompts of different seeds have different first blocks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


def run(llm: LLM, prompt: list[int], params: SamplingParams, salt: str | None = None) -> tuple[list[int], int]:
    """Return the tokens of one request alone, and how many of its prompt's came from the cache."""
    item: dict[str, Any] = {"prompt_token_ids": prompt}
    if salt is not None:
        item["cache_salt"] = salt
    (output,) = llm.generate([item], params, use_tqdm=False)
    return tokens_of(output), cached(output)


def tokens_of(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


def cached(output: RequestOutput) -> int:
    assert output.num_cached_tokens is not None
    return output.num_cached_tokens


def findable(num_tokens: int, block_size: int = BLOCK_SIZE) -> int:
    """Tokens in full blocks, the last token of the prompt apart: it is always computed."""
    return (num_tokens - 1) // block_size * block_size


@pytest.mark.parametrize("length", [k * BLOCK_SIZE + d for k in (1, 2, 5) for d in (-1, 0, 1)])
def test_boundary_lengths_and_full_hits(length: int, llm: LLM, plain: LLM) -> None:
    """k * block - 1, k * block, k * block + 1: the second time all full blocks are found, but for the last token."""
    prompt = make_prompt(length)
    for params in (greedy(10), drawn(3)):
        expected, none = run(plain, prompt, params)
        assert none == 0
        assert run(llm, prompt, params) == (expected, 0)
        assert run(llm, prompt, params) == (expected, findable(length))
        assert llm.llm_engine.reset_prefix_cache()
        assert run(llm, prompt, params) == (expected, 0), "a reset forgets everything"
        assert llm.llm_engine.reset_prefix_cache()


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("length", [15, 16, 17])
def test_full_hits_in_other_block_sizes(length: int, block_size: int, tiny: Path, plain: LLM) -> None:
    llm = LLM(str(tiny), **(SMALL | {"block_size": block_size}))
    prompt = make_prompt(length)
    expected, _ = run(plain, prompt, greedy(10))
    assert run(llm, prompt, greedy(10)) == (expected, 0)
    assert run(llm, prompt, greedy(10)) == (expected, findable(length, block_size))


@pytest.mark.parametrize("length", [15, 16, 17, 40])
def test_twins_in_one_step(length: int, llm: LLM, plain: LLM) -> None:
    """Four requests with one prompt, admitted in the same step: the first computes, the others share its blocks."""
    prompt = make_prompt(length)
    params = [greedy(10), greedy(10), drawn(1), drawn(2)]
    outputs = llm.generate([{"prompt_token_ids": prompt}] * 4, params, use_tqdm=False)
    assert [tokens_of(output) for output in outputs] == [run(plain, prompt, p)[0] for p in params]
    assert [cached(output) for output in outputs] == [0, *[findable(length)] * 3]


def test_several_samples_share_the_prompt(llm: LLM, plain: LLM) -> None:
    prompt, params = make_prompt(30), SamplingParams(n=3, temperature=1.0, seed=4, max_tokens=8, ignore_eos=True)
    samples = [
        [list(sample.token_ids) for sample in engine.generate(prompt, params, use_tqdm=False)[0].outputs]
        for engine in (plain, llm)
    ]
    assert samples[0] == samples[1]
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    # Three full blocks of the prompt once; each sample ends with 37 computed tokens: a block of its own is full.
    assert sum(block.block_hash is not None for block in pool.blocks) == 3 + 3


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_an_evicted_block_is_computed_anew(async_scheduling: bool, tiny: Path, plain: LLM) -> None:
    """Eight blocks, two prompts of five: the newer takes the older one's tail, never its head.

                    1   2   3   4   5   6   7   8
    A leaves        A0  A1  A2  A3  -                 four full blocks, the rest of the fifth is worthless
    B takes                     B4  B0  B1  B2  B3    the worthless and the unused ones first, then A's tail
    A finds 3       A0  A1  A2  A4              A3    and takes B's tail in turn
    """
    args = SMALL | {"max_model_len": 64, "num_gpu_blocks_override": 9, "async_scheduling": async_scheduling}
    llm = LLM(str(tiny), **args)
    first, second = make_prompt(33, seed=1), make_prompt(33, seed=2)
    for prompt, num_cached in [(first, 0), (second, 0), (first, 24), (second, 24), (second, 32), (first, 24)]:
        expected, _ = run(plain, prompt, greedy(4))
        assert run(llm, prompt, greedy(4)) == (expected, num_cached)
        llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.check_integrity()


def test_salted_requests_share_with_their_own_alone(llm: LLM, plain: LLM) -> None:
    prompt = make_prompt(41)
    expected, _ = run(plain, prompt, greedy(6))
    for salt, num_cached in [(None, 0), ("a", 0), ("a", 40), ("b", 0), (None, 40), ("b", 40), ("a", 40)]:
        assert run(llm, prompt, greedy(6), salt) == (expected, num_cached), salt
    # Twins of different salts in one step share nothing either.
    other = make_prompt(41, seed=9)
    prompts: list[Any] = [{"prompt_token_ids": other, "cache_salt": salt} for salt in ("a", "b", "a")]
    outputs = llm.generate([*prompts, {"prompt_token_ids": other}], greedy(6), use_tqdm=False)
    assert [cached(output) for output in outputs] == [0, 0, 40, 0]
    assert len({tuple(tokens_of(output)) for output in outputs}) == 1


def test_the_next_turn_of_a_chat_finds_what_decoding_filled(llm: LLM, plain: LLM) -> None:
    """The last token of an answer is never computed; every full block before it is found by the next turn."""
    history = make_prompt(21)
    num_computed = 0
    for turn, max_tokens in enumerate((20, 3, 12)):
        expected, _ = run(plain, history, greedy(max_tokens))
        answer, num_cached = run(llm, history, greedy(max_tokens))
        assert answer == expected
        assert num_cached == num_computed // BLOCK_SIZE * BLOCK_SIZE
        num_computed = len(history) + max_tokens - 1
        history = history + answer + make_prompt(5, seed=turn)
    assert num_computed > 60


def test_a_shared_beginning_is_found_while_its_first_owner_still_runs(llm: LLM, plain: LLM) -> None:
    shared = make_prompt(24)
    long, late = [*shared, 5], [*shared, 6, 7]
    engine = llm.llm_engine
    engine.add_request("long", {"prompt_token_ids": long}, greedy(30))
    outputs: dict[str, RequestOutput] = {}
    for step in range(60):
        if step == 5:
            engine.add_request("late", {"prompt_token_ids": late}, drawn(8, 6))
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
    assert not engine.has_unfinished_requests() and list(outputs) == ["late", "long"]
    assert tokens_of(outputs["late"]) == run(plain, late, drawn(8, 6))[0] and cached(outputs["late"]) == 24
    assert tokens_of(outputs["long"]) == run(plain, long, greedy(30))[0] and cached(outputs["long"]) == 0


def test_prompt_logprobs_find_nothing_but_fill_the_cache(llm: LLM, plain: LLM) -> None:
    prompt = make_prompt(33)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, prompt_logprobs=1)
    (expected,) = plain.generate(prompt, params, use_tqdm=False)
    assert expected.prompt_logprobs is not None
    for _ in range(2):
        (output,) = llm.generate(prompt, params, use_tqdm=False)
        assert cached(output) == 0 and output.prompt_logprobs == expected.prompt_logprobs
    assert run(llm, prompt, greedy(2)) == (tokens_of(expected), 32)


def test_an_aborted_request_leaves_only_what_it_computed(llm: LLM, plain: LLM) -> None:
    prompt = make_prompt(30)
    engine = llm.llm_engine
    engine.add_request("gone", {"prompt_token_ids": prompt}, greedy(50))
    for _ in range(4):
        engine.step()
    engine.abort_request(["gone"])
    expected, _ = run(plain, prompt, greedy(10))
    assert run(llm, prompt, greedy(10)) == (expected, 24)
    engine.engine_core.engine_core.scheduler.kv_cache_manager.check_integrity()
