"""The equivalence matrix: how requests are batched, chunked, cached, preempted and overlapped changes no token.

Eight requests, greedy ones and seeded ones, go through a tiny random model in float32 under every combination of
prefix caching, token budget, pool size, batch size, block size, scheduler and attention backend. Their tokens must be
those of the trivial engine on the CPU: one request at a time, in one piece, nothing shared, attention by its
definition. Where there is a GPU, the same on it: graphs, fused kernels and the device's sampler change no token either.

Two corners of the matrix are what the engine's own rules make of them: a budget of 7 tokens runs at most 7 requests at
once, and a batch of one cannot run out of blocks, because the pool always holds one longest request.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm import LLM, SamplingParams
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE, save_tiny_model

MAX_MODEL_LEN = 48
NUM_OUTPUT_TOKENS = 12
UNLIMITED = 2048
BASE: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "use_tqdm_on_load": False,
    "max_model_len": MAX_MODEL_LEN,
}
TRIVIAL: dict[str, Any] = {
    "max_num_seqs": 1,
    "block_size": MAX_MODEL_LEN,
    "enable_prefix_caching": False,
    "attention_backend": "torch_naive",
    "async_scheduling": False,
    "num_gpu_blocks_override": 2,
}


def make_prompts() -> list[list[int]]:
    """Three with a common beginning of 18 tokens, a twin of one of them, one that ends with it, three of their own."""
    generator = torch.Generator().manual_seed(1)

    def draw(length: int) -> list[int]:
        return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()

    shared = draw(18)
    first = shared + draw(7)
    return [first, draw(16), shared + draw(15), list(first), draw(3), shared + draw(1), draw(33), list(shared)]


PROMPTS = make_prompts()
PARAMS = [
    SamplingParams(temperature=0.0 if i % 2 else 1.0, seed=i, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    for i in range(len(PROMPTS))
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads gain nothing at this size, and two that spin stall each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of two layers: QK norms, grouped KV heads."""
    path = tmp_path_factory.mktemp("tiny")
    config_cls, model_cls, overrides = TINY_MODELS["qwen3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY_MODELS, "two layers", (config_cls, model_cls, overrides | {"num_hidden_layers": 2}))
        save_tiny_model(path, "two layers")
    return path


def generate(llm: LLM) -> tuple[list[list[int]], int]:
    """Return each request's tokens, and how many prompt tokens came from the prefix cache."""
    prompts = [{"prompt_token_ids": p} for p in PROMPTS]
    outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return tokens, sum(output.num_cached_tokens or 0 for output in outputs)


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[list[int]]:
    tokens, num_cached_tokens = generate(LLM(str(tiny), device="cpu", **BASE, **TRIVIAL))
    assert num_cached_tokens == 0
    return tokens


def test_the_baseline_can_tell_requests_apart(expected: list[list[int]]) -> None:
    """No two requests have the same tokens, not even the twins: one is greedy, the other drawn."""
    assert all(len(tokens) == NUM_OUTPUT_TOKENS for tokens in expected)
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    assert all(len(set(tokens)) > 2 for tokens in expected)


@pytest.mark.parametrize("backend", ["torch_naive", "paged"])
@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("block_size", [1, 8, 16], ids=["block1", "block8", "block16"])
@pytest.mark.parametrize("batch", [1, 8], ids=["alone", "batch8"])
@pytest.mark.parametrize("tight", [False, True], ids=["roomy", "tight"])
@pytest.mark.parametrize("budget", [7, 16, 64, UNLIMITED])
@pytest.mark.parametrize("caching", [False, True], ids=["nocache", "cache"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tokens_are_those_of_the_trivial_engine(
    device: str,
    caching: bool,
    budget: int,
    tight: bool,
    batch: int,
    block_size: int,
    async_scheduling: bool,
    backend: str,
    tiny: Path,
    expected: list[list[int]],
) -> None:
    blocks_of_one = -(-MAX_MODEL_LEN // block_size)
    llm = LLM(
        str(tiny),
        **BASE,
        device=device,
        max_num_seqs=min(batch, budget),
        max_num_batched_tokens=budget,
        block_size=block_size,
        enable_prefix_caching=caching,
        async_scheduling=async_scheduling,
        attention_backend=backend,
        num_gpu_blocks_override=1 + blocks_of_one * (1 if tight else len(PROMPTS)),
    )
    tokens, num_cached_tokens = generate(llm)
    assert tokens == expected
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert (scheduler._num_preemptions > 0) == (tight and batch > 1)
    assert (num_cached_tokens > 0) == caching
    scheduler.kv_cache_manager.check_integrity()
    assert scheduler.kv_cache_manager.usage == 0


def test_the_matrix_is_whole() -> None:
    """768 combinations: 2 x 2 x 4 x 2 x 2 x 3 x 2 x 2."""
    marks = test_tokens_are_those_of_the_trivial_engine.pytestmark
    assert len(list(itertools.product(*(mark.args[1] for mark in marks)))) == 768
