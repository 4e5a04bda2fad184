"""M4 on a CUDA device: graphs, overlap, fused kernels and backends change speed, never tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folovllm import LLM, SamplingParams
from folovllm.attention import triton_decode
from folovllm.worker import gpu_model_runner
from folovllm.worker.cuda_graph import StepGraphs
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

pytestmark = pytest.mark.gpu

Tokens = list[list[int]]


@pytest.fixture(autouse=True)
def exact_float32_matmul() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def make_llm(path: Path, **options: Any) -> LLM:
    options = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 1 << 24, **options}
    return LLM(str(path), device="cuda", skip_tokenizer_init=True, **options)


def prompts(lengths: list[int]) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(8)
    return [{"prompt_token_ids": torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist()} for n in lengths]


LENGTHS = [1, 2, 15, 16, 17, 31, 33, 64, 90, 5, 7, 40]


def mixed_params() -> list[SamplingParams]:
    """Greedy, plain temperature, top-k, top-p, both, and some that the device sampler leaves to the host."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.2, "top_p": 0.8},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"temperature": 0},
    ]
    return [
        SamplingParams(max_tokens=20 + i, ignore_eos=True, seed=i, **kinds[i % len(kinds)]) for i in range(len(LENGTHS))
    ]


def generate(llm: LLM, params: SamplingParams | list[SamplingParams]) -> Tokens:
    outputs = llm.generate(prompts(LENGTHS), params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    save_tiny_model(path, "qwen3")
    return path


@pytest.fixture(scope="module")
def expected(model: Path) -> Tokens:
    """The plainest engine: the oracle's attention, no graphs, no overlap, one request at a time."""
    llm = make_llm(
        model,
        dtype="float32",
        attention_backend="torch_naive",
        enforce_eager=True,
        async_scheduling=False,
        max_num_seqs=1,
        max_num_batched_tokens=256,
        enable_prefix_caching=False,
    )
    return generate(llm, mixed_params())


@pytest.mark.parametrize("async_scheduling", [True, False])
@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize("backend", ["paged", "torch_naive"])
def test_float32_tokens_are_those_of_the_plainest_engine(
    model: Path, expected: Tokens, backend: str, enforce_eager: bool, async_scheduling: bool
) -> None:
    llm = make_llm(
        model,
        dtype="float32",
        attention_backend=backend,
        enforce_eager=enforce_eager,
        async_scheduling=async_scheduling,
    )
    runner = llm.llm_engine.executor.worker.model_runner
    assert (runner.graphs is not None) == (backend == "paged" and not enforce_eager)
    for _ in range(2):  # the second time out of the prefix cache
        assert generate(llm, mixed_params()) == expected


@pytest.mark.parametrize("block_size", [1, 8, 16, 64])
@pytest.mark.parametrize("budget", [17, 64, 1024])
def test_block_size_and_chunks_change_nothing(model: Path, expected: Tokens, block_size: int, budget: int) -> None:
    llm = make_llm(model, dtype="float32", block_size=block_size, max_num_batched_tokens=budget)
    assert generate(llm, mixed_params()) == expected


def test_preemption_storm_with_graphs(model: Path, expected: Tokens) -> None:
    llm = make_llm(model, dtype="float32", num_gpu_blocks_override=18, kv_cache_memory_bytes=None)
    assert generate(llm, mixed_params()) == expected
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    scheduler.kv_cache_manager.check_integrity()
    assert scheduler._num_preemptions > 0


def test_host_side_sampling_beside_graphs(model: Path) -> None:
    """Penalties, log probabilities and bad words sample eagerly from the graph's logits."""
    params = [
        SamplingParams(temperature=0.9, seed=i, max_tokens=24, ignore_eos=True, logprobs=2, repetition_penalty=1.3)
        if i % 2
        else SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, presence_penalty=0.5, min_tokens=4)
        for i in range(len(LENGTHS))
    ]
    graph = generate(make_llm(model, dtype="float32"), params)
    eager = generate(make_llm(model, dtype="float32", enforce_eager=True, async_scheduling=False), params)
    assert graph == eager


def test_padding_to_a_captured_size_is_invisible(model: Path, expected: Tokens) -> None:
    llm = make_llm(model, dtype="float32", cuda_graph_sizes=[16])
    assert llm.llm_engine.executor.worker.model_runner.graph_sizes() == [16]
    assert generate(llm, mixed_params()) == expected


@pytest.mark.parametrize("num_blocks", [None, 18])
@pytest.mark.parametrize("sizes", [None, [16]])
def test_starting_with_the_longest_contexts_changes_nothing(
    model: Path, expected: Tokens, sizes: list[int] | None, num_blocks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts of 1 to 90 tokens come and go, also by preemption, in batches filled up with padding."""
    orders = []
    longest_first = gpu_model_runner.GPUModelRunner._longest_first

    def recorded(self: Any, seq_lens: np.ndarray, size: int) -> np.ndarray:
        orders.append((seq_lens.copy(), longest_first(self, seq_lens, size).copy()))
        return orders[-1][1]

    monkeypatch.setattr(triton_decode, "SORTED_PROGRAMS", 1)
    monkeypatch.setattr(gpu_model_runner.GPUModelRunner, "_longest_first", recorded)
    options: dict[str, Any] = {} if num_blocks is None else {"num_gpu_blocks_override": num_blocks}
    llm = make_llm(model, dtype="float32", cuda_graph_sizes=sizes, **options)
    assert generate(llm, mixed_params()) == expected
    assert len(orders) > 20 and any((np.diff(order) != 1).any() for _, order in orders)
    for seq_lens, order in orders:
        assert sorted(order.tolist()) == list(range(len(order)))
        assert (np.diff(seq_lens[order[: len(seq_lens)]]) <= 0).all()


@pytest.mark.parametrize("budget", [256, 2048])
@pytest.mark.parametrize("deterministic", [False, True])
def test_recorded_prompt_steps_equal_eager_ones(
    model: Path, budget: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of several requests, padded to a recorded number of tokens; the second time out of the prefix cache."""
    replayed: list[int] = []
    replay = StepGraphs.replay_prompt

    def counted(graphs: StepGraphs, size: int) -> torch.Tensor:
        replayed.append(size)
        return replay(graphs, size)

    monkeypatch.setattr(StepGraphs, "replay_prompt", counted)
    lengths = [2, 33, 200, 64, 17, 90, 150, 31, 16, 128, 64, 230]
    tokens = []
    for eager in (False, True):
        llm = make_llm(
            model,
            dtype="float32",
            max_num_batched_tokens=budget,
            enforce_eager=eager,
            deterministic=deterministic,
            max_num_seqs=1 if eager else 16,
        )
        for _ in range(2):
            outputs = llm.generate(prompts(lengths), mixed_params(), use_tqdm=False)
            tokens.append([list(output.outputs[0].token_ids) for output in outputs])
    assert all(t == tokens[0] for t in tokens)
    # Out of the prefix cache some prompts have one token left, which only the decode kernel does deterministically.
    assert set(replayed) == ({256} if budget == 256 else {1536} if deterministic else {256, 1536})


@pytest.mark.parametrize("max_context", [4096, 60])
def test_recorded_mixed_steps_equal_eager_ones(model: Path, max_context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts arrive while others decode; a decode with a longer context than allowed keeps its step from replay."""
    monkeypatch.setattr(gpu_model_runner, "MAX_MIXED_CONTEXT", max_context)
    steps: list[tuple[int, int, int]] = []
    choose = gpu_model_runner.GPUModelRunner._recorded_sizes

    def spy(runner: Any, layout: Any) -> tuple[int, int]:
        sizes = choose(runner, layout)
        lens = np.diff(layout.query_start_loc)
        if lens.min() == 1 < lens.max():
            steps.append((layout.num_tokens, int(layout.seq_lens[lens == 1].max()), sizes[1]))
        return sizes

    monkeypatch.setattr(gpu_model_runner.GPUModelRunner, "_recorded_sizes", spy)
    tokens = []
    for eager in (False, True):
        llm = make_llm(model, dtype="float32", max_num_batched_tokens=512, enforce_eager=eager)
        engine, found = llm.llm_engine, {}
        for i, (prompt, params) in enumerate(zip(prompts([40, 50, 200, 130, 220, 33]), mixed_params(), strict=False)):
            engine.add_request(str(i), prompt, params)
            for _ in range(4):
                found |= {o.request_id: list(o.outputs[0].token_ids) for o in engine.step() if o.finished}
        while engine.has_unfinished_requests():
            found |= {o.request_id: list(o.outputs[0].token_ids) for o in engine.step() if o.finished}
        tokens.append(found)
        if not eager:
            assert len(steps) >= 4
            for num_tokens, context, size in steps:
                assert size == (0 if context > max_context else 256 if num_tokens <= 256 else 512)
            assert {size > 0 for _, _, size in steps} == ({True} if max_context == 4096 else {True, False})
    assert len(tokens[0]) == 6 and tokens[0] == tokens[1]


def test_no_memory_growth_over_two_thousand_steps(model: Path) -> None:
    llm = make_llm(model, max_num_seqs=4)
    params = SamplingParams(temperature=0.9, max_tokens=120, ignore_eos=True)
    generate(llm, params)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    steps = 0
    while steps < 2000:
        for i, prompt in enumerate(prompts(LENGTHS)):
            llm.llm_engine.add_request(f"{steps}-{i}", prompt, params)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            steps += 1
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before[0] < 1 << 20
    assert before[1] - torch.cuda.mem_get_info()[0] < 32 << 20


def test_fp8_cache_holds_twice_the_tokens(model: Path) -> None:
    caches = {}
    for dtype in ("auto", "fp8"):
        llm = make_llm(model, dtype="bfloat16", kv_cache_dtype=dtype)
        caches[dtype] = llm.llm_engine.engine_core.engine_core.kv_cache_config.num_blocks
        tokens = generate(llm, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        assert all(len(t) == 8 for t in tokens)
    assert caches["fp8"] == pytest.approx(2 * caches["auto"], abs=2)


@pytest.mark.parametrize("name", ["qwen3", "llama-biases"])
def test_deterministic_gives_the_same_bits_alone_and_in_a_crowd(name: str, tmp_path: Path) -> None:
    """bfloat16, where any other order of a sum shows; log probabilities compare bit for bit."""
    save_tiny_model(tmp_path, name)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2)
    results = []
    for max_num_seqs in (1, 16):
        llm = make_llm(
            tmp_path,
            dtype="bfloat16",
            deterministic=True,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=256,
            enable_prefix_caching=False,
        )
        outputs = [output.outputs[0] for output in llm.generate(prompts(LENGTHS), params, use_tqdm=False)]
        results.append(
            [(list(o.token_ids), [sorted((i, p.logprob) for i, p in d.items()) for d in o.logprobs]) for o in outputs]
        )
    assert results[0] == results[1]


def test_deterministic_tokens_are_the_plainest_engines(model: Path, expected: Tokens) -> None:
    assert generate(make_llm(model, dtype="float32", deterministic=True), mixed_params()) == expected


PLAINEST: dict[str, Any] = {
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1024,
    "enable_prefix_caching": False,
    "enforce_eager": True,
    "async_scheduling": False,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"async_scheduling": False},
        {"enforce_eager": True},
        {"cuda_graph_sizes": [16]},
        {"max_num_seqs": 3},
        {"block_size": 1},
        {"block_size": 8},
        {"block_size": 64},
        {"max_num_batched_tokens": 17},
        {"max_num_batched_tokens": 64},
        {"num_gpu_blocks_override": 18, "kv_cache_memory_bytes": None},
        {"enable_prefix_caching": True},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()) or "default",
)
def test_deterministic_bfloat16_tokens_are_the_plainest_engines(model: Path, options: dict[str, Any]) -> None:
    """In 16 bits any other order of a sum changes tokens sooner or later; here none does."""
    options = {"max_num_batched_tokens": 1024, "enable_prefix_caching": False, **options}
    results = [
        generate(make_llm(model, dtype="bfloat16", deterministic=True, **o), mixed_params())
        for o in (PLAINEST, options)
    ]
    assert results[0] == results[1]
