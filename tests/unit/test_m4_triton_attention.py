"""Our Triton attention against attention's definition: any mix of decodes and chunks, any pages, splits and tiles.

Without CUDA the kernels run through Triton's interpreter, on small problems and without bfloat16, whose products it
gets wrong. As in the tests of the plain-torch backend, whatever is no request's own holds garbage, and outputs start
as NaN.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from folovllm.attention import triton_decode  # noqa: E402
from folovllm.attention.backends.abstract import AttentionMetadata  # noqa: E402
from folovllm.attention.backends.paged_triton import (  # noqa: E402
    DeterministicPagedBackend,
    TritonPagedBackend,
    TritonPagedImpl,
    TritonPagedMetadata,
)
from folovllm.attention.backends.torch_naive import TorchNaiveBackend  # noqa: E402
from folovllm.attention.triton_decode import (  # noqa: E402
    DecodeConfig,
    DecodeWorkspace,
    choose_decode_config,
    decode_workspace_size,
    paged_decode,
    shared_workspace,
    wants_longest_first,
)
from folovllm.attention.triton_prefill import (  # noqa: E402
    PrefillConfig,
    build_tiles,
    choose_prefill_config,
    paged_prefill,
)
from folovllm.config import default_graph_sizes  # noqa: E402
from folovllm.worker import gpu_model_runner  # noqa: E402
from folovllm.worker.gpu_model_runner import PDL_MAX_DECODES, GPUModelRunner  # noqa: E402
from tests.triton_interpreter import index_scalars  # noqa: E402
from tests.unit.test_m3_paged_attention import Batch, Problem, make_problem  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
LOW = torch.bfloat16 if CUDA else torch.float16
FP8 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

MIXED: Batch = [(5, 5), (1, 30), (17, 60), (1, 2), (1, 1), (33, 33), (2, 17)]
BATCHES: dict[str, Batch] = {
    "decodes": [(1, 50), (1, 33), (1, 1), (1, 49), (1, 16)],
    "one decode": [(1, 37)],
    "decodes and chunks": MIXED,
    "chunks": [(9, 30), (16, 48), (2, 3)],
    "prompts": [(1, 1), (16, 16), (17, 17)],
}
if CUDA:
    BATCHES["large"] = [(1, 2000), (300, 300), (1, 1), (129, 1500), (1, 130), (64, 64), (1, 999), (511, 2048)]


@pytest.fixture(autouse=True)
def interpreter_indexes_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    if not CUDA:
        index_scalars(monkeypatch.setattr)


def on_device(metadata: AttentionMetadata) -> AttentionMetadata:
    names = ("query_start_loc", "seq_lens", "block_table", "slot_mapping")
    return replace(metadata, **{name: getattr(metadata, name).to(DEVICE) for name in names})


def run(
    problem: Problem,
    dtype: torch.dtype = torch.float32,
    backend: type[TritonPagedBackend] = TritonPagedBackend,
    cache_dtype: torch.dtype | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    written: bool = False,
) -> torch.Tensor:
    """Return the backend's output on DEVICE; `written`: keys and values are in the cache already."""
    num_heads, head_size = problem.query.shape[1:]
    impl = TritonPagedImpl(num_heads, head_size, head_size**-0.5, problem.key.shape[1])
    impl.k_scale, impl.v_scale = scales
    metadata = backend.build_metadata(on_device(problem.metadata), problem.block_size, dtype)
    query, key, value = (t.to(DEVICE, dtype, copy=True) for t in (problem.query, problem.key, problem.value))
    cache = problem.kv_cache.to(DEVICE, copy=True)
    if cache_dtype is FP8:
        divided = torch.stack([cache[0] / scales[0], cache[1] / scales[1]])
        cache = divided.clamp(-448, 448).to(FP8)
    else:
        cache = cache.to(dtype)
    out = torch.full_like(query, float("nan"))
    if written:
        impl._write(key, value, cache, metadata.slot_mapping)
        return impl.forward(query, None, None, cache, metadata, out)
    return impl.forward(query, key, value, cache, metadata, out)


def check(problem: Problem, dtype: torch.dtype, backend: type[TritonPagedBackend] = TritonPagedBackend) -> None:
    rounded = replace(problem)
    for name in ("query", "key", "value", "kv_cache"):
        setattr(rounded, name, getattr(problem, name).to(dtype).float())
    expected = rounded.run(TorchNaiveBackend)
    assert expected.isfinite().all() and expected.abs().max() < 100, "garbage reached the reference itself"
    got = run(problem, dtype, backend)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float().cpu(), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("block_size", [1, 3, 8, 16, 64])
@pytest.mark.parametrize("name", BATCHES)
def test_float32_equals_the_definition(name: str, block_size: int) -> None:
    check(make_problem(BATCHES[name], block_size), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [TritonPagedBackend, DeterministicPagedBackend])
@pytest.mark.parametrize("name", BATCHES)
def test_half_precision_is_near_the_definition(name: str, backend: type, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not CUDA:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    check(make_problem(BATCHES[name], 16), dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (3, 1), (14, 2)])
def test_head_sizes_and_groups(num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> None:
    batch = [(1, 40), (7, 20), (1, 1), (20, 33)]
    check(make_problem(batch, 16, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size), dtype)


@pytest.mark.parametrize("seed", range(4 if not CUDA else 40))
def test_random_batches(seed: int) -> None:
    generator = torch.Generator().manual_seed(2000 + seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    batch = []
    for _ in range(draw(1, 5)):
        seq_len = draw(1, draw(1, 60 if not CUDA else 3000))
        batch.append((1 if draw(0, 1) else draw(1, seq_len), seq_len))
    check(make_problem(batch, [1, 8, 16, 32][draw(0, 3)], seed=seed), torch.float32)


def test_keys_and_values_written_before_are_attended_to() -> None:
    problem = make_problem(MIXED, 16)
    assert torch.equal(run(problem, written=True), run(problem))


def test_fp8_cache_equals_the_definition_over_what_it_holds() -> None:
    """The twin: the same rounded keys and values, multiplied out in float32."""
    scales = (0.5, 0.25)
    problem = make_problem(MIXED, 16)
    rounded = replace(problem, query=problem.query.to(LOW).float())
    for name, scale in (("key", scales[0]), ("value", scales[1])):
        low = getattr(problem, name).to(LOW).float()
        setattr(rounded, name, (low / scale).clamp(-448, 448).to(FP8).float() * scale)
    cache = problem.kv_cache
    rounded.kv_cache = torch.stack([(cache[i] / s).clamp(-448, 448).to(FP8).float() * s for i, s in enumerate(scales)])
    expected = rounded.run(TorchNaiveBackend)
    got = run(problem, LOW, cache_dtype=FP8, scales=scales).float().cpu()
    torch.testing.assert_close(got, expected, atol=TOLERANCE[LOW], rtol=0)


def poisoned_workspace(problem: Problem, config: DecodeConfig) -> DecodeWorkspace:
    num_heads, head_size = problem.query.shape[1:]
    size = decode_workspace_size(problem.query.shape[0], num_heads, problem.key.shape[1], head_size, config)
    workspace = DecodeWorkspace.allocate(*size, DEVICE)
    workspace.partials.fill_(float("nan"))
    return workspace


def decode(
    problem: Problem,
    config: DecodeConfig,
    seq_lens: Sequence[int] | None = None,
    v_scale: float = 1.0,
    workspace: DecodeWorkspace | None = None,
) -> torch.Tensor:
    """Return paged_decode's output for a problem of decodes, its keys and values written; workspace poisoned."""
    num_heads, head_size = problem.query.shape[1:]
    metadata = on_device(problem.metadata)
    cache = problem.kv_cache.to(DEVICE, copy=True)
    TritonPagedImpl(num_heads, head_size, 1.0, problem.key.shape[1])._write(
        problem.key.to(DEVICE), problem.value.to(DEVICE), cache, metadata.slot_mapping
    )
    query = problem.query.to(DEVICE)
    out = torch.full_like(query, float("nan"))
    workspace = workspace or poisoned_workspace(problem, config)
    lens = metadata.seq_lens if seq_lens is None else torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
    paged_decode(
        query, cache, metadata.block_table, lens, out, head_size**-0.5 / 0.5, config,
        workspace=workspace, k_scale=0.5, v_scale=v_scale,
    )  # fmt: skip
    assert not workspace.arrivals.any(), "counts are left for the next launch"
    return out


WHOLE_AND_CUT = [DecodeConfig(16, 1, 2), DecodeConfig(16, 2, 3, 3, 16), DecodeConfig(32, 2, 3, 2, 64)]


@pytest.mark.parametrize("table_ahead", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig(16, 1, 2),
        DecodeConfig(32, 1, 4),
        DecodeConfig(128, 4, 2),
        DecodeConfig(16, 2, 3, 2),
        DecodeConfig(32, 2, 3, 5, 1),
        DecodeConfig(16, 2, 3, 32, 16),
        DecodeConfig(16, 2, 3, 64, 10),
        DecodeConfig(32, 4, 3, 9, split_tokens=64, programs=3),
        DecodeConfig(64, 4, 3, 33, split_tokens=16, programs=1),
    ],
)
def test_every_cut_of_a_decode_gives_the_same(config: DecodeConfig, table_ahead: bool) -> None:
    problem = make_problem([(1, 520), (1, 1), (1, 33), (1, 64)], 16)
    got = decode(problem, replace(config, table_ahead=table_ahead))
    torch.testing.assert_close(got.cpu(), problem.run(TorchNaiveBackend), atol=2e-5, rtol=0)


def test_parts_are_combined_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where registers hold fewer parts than there are: 33, by four, two and one; later ones raise the maximum."""
    problem = make_problem([(1, 520), (1, 33), (1, 64)], 16)
    expected = problem.run(TorchNaiveBackend)
    for numbers in (256, 128, 1):
        monkeypatch.setattr(triton_decode, "COMBINE_NUMBERS_PER_WARP", numbers)
        got = decode(problem, DecodeConfig(16, 2, 3, 64, 10))
        torch.testing.assert_close(got.cpu(), expected, atol=2e-5, rtol=0)


def test_each_context_is_cut_by_its_own_length() -> None:
    """Parts, by what is written to the workspace: none for short contexts, at most num_splits for long ones."""
    problem = make_problem([(1, 520), (1, 1), (1, 65), (1, 64), (1, 150)], 16)
    config = DecodeConfig(16, 2, 3, 4, 64)
    workspace = poisoned_workspace(problem, config)
    got = decode(problem, config, workspace=workspace)
    torch.testing.assert_close(got.cpu(), problem.run(TorchNaiveBackend), atol=2e-5, rtol=0)
    num_reqs, num_heads, head_size = problem.query.shape
    num_lse = num_reqs * num_heads * config.num_splits
    outs, lse = workspace.partials.split([num_lse * head_size, num_lse])
    parts = outs.view(num_reqs, -1, config.num_splits, num_heads // 2 * head_size).isfinite().all(-1).sum(-1)
    assert parts.tolist() == [[n, n] for n in (4, 0, 2, 0, 3)]
    assert int(lse.isfinite().sum()) == (4 + 2 + 3) * num_heads


@pytest.mark.parametrize("config", [DecodeConfig(16, 2, 3, 5, 32), DecodeConfig(16, 2, 3, 20, 32, programs=2)])
def test_one_workspace_serves_launches_of_all_shapes(config: DecodeConfig) -> None:
    """As graphs of several sizes, mixed steps and layers do: nothing of an earlier launch matters, twice in a row."""
    problems = [make_problem([(1, n) for n in lens], 16, seed=len(lens)) for lens in ((300,), (40, 170, 90), (5, 99))]
    workspace = poisoned_workspace(problems[1], config)
    for problem in (problems[1], problems[1], problems[0], problems[2], problems[1]):
        got = decode(problem, config, workspace=workspace)
        assert torch.equal(got, decode(problem, config)), "bits depend on what was in the workspace"
        torch.testing.assert_close(got.cpu(), problem.run(TorchNaiveBackend), atol=2e-5, rtol=0)


@pytest.mark.skipif(CUDA, reason="on a GPU programs arrive as they like")
@pytest.mark.parametrize("config", [DecodeConfig(16, 2, 3, 5, 32), DecodeConfig(16, 2, 3, 9, 32, programs=3)])
def test_bits_do_not_depend_on_who_arrives_last(config: DecodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import interpreter_builder

    problem = make_problem([(1, 300), (1, 20), (1, 70)], 16)
    in_order = decode(problem, config)
    set_grid_idx, last = interpreter_builder.set_grid_idx, (config.programs or config.num_splits) - 1
    seen = []

    def backwards(x: int, y: int, z: int) -> None:
        seen.append(last - z)
        set_grid_idx(x, y, last - z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", backwards)
    assert torch.equal(decode(problem, config), in_order)
    assert seen and max(seen) == last and min(seen) == 0


def test_the_shared_workspace_grows_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded graphs hold its addresses: the same tensors as long as they suffice, and outgrown ones are kept."""
    monkeypatch.setattr(triton_decode, "_workspaces", {})
    first = shared_workspace(1000, 10, DEVICE)
    assert first.partials.numel() >= 1000 and first.arrivals.tolist() == [0] * first.arrivals.numel()
    assert shared_workspace(5, 2, DEVICE) is first is shared_workspace(1000, 10, DEVICE)
    second = shared_workspace(1000, 100, DEVICE)
    assert second is not first and second.holds(1000, 100) and not first.holds(1000, 100)
    assert triton_decode._workspaces[DEVICE] == [first, second]


@pytest.mark.gpu
def test_races_would_show_in_the_bits() -> None:
    """Many launches back to back in one graph, as layers follow one another: every one gives the same bits."""
    problem = make_problem([(1, n) for n in (3000, 1, 700, 2049, 64, 1500)], 16)
    metadata = on_device(problem.metadata)
    query, cache = problem.query.to(DEVICE), problem.kv_cache.to(DEVICE, copy=True)
    TritonPagedImpl(*query.shape[1:], 1.0, problem.key.shape[1])._write(
        problem.key.to(DEVICE), problem.value.to(DEVICE), cache, metadata.slot_mapping
    )
    pdl = torch.cuda.get_device_capability() >= (9, 0)
    for config in (DecodeConfig(16, 2, 3, 32, 64, pdl=pdl), DecodeConfig(32, 2, 3, 40, 64, programs=7)):
        workspace = poisoned_workspace(problem, config)
        outs = [torch.full_like(query, float("nan")) for _ in range(50)]

        def launch(
            config: DecodeConfig = config,
            workspace: DecodeWorkspace = workspace,
            outs: list[torch.Tensor] = outs,
        ) -> None:
            for out in outs:
                paged_decode(
                    query, cache, metadata.block_table, metadata.seq_lens, out, query.shape[2] ** -0.5, config,
                    workspace=workspace,
                )  # fmt: skip

        launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        expected = outs[0].clone()
        torch.testing.assert_close(expected.cpu(), problem.run(TorchNaiveBackend), atol=2e-5, rtol=0)
        for _ in range(40):
            for out in outs:
                out.fill_(float("nan"))
            graph.replay()
            assert all(torch.equal(out, expected) for out in outs)
        assert not workspace.arrivals.any()


@pytest.mark.parametrize("config", WHOLE_AND_CUT)
def test_values_are_scaled_once(config: DecodeConfig) -> None:
    """With and without a combine; `decode` doubles its softmax scale and halves the keys."""
    problem = make_problem([(1, 40), (1, 33)], 16)
    expected = problem.run(TorchNaiveBackend)
    torch.testing.assert_close(decode(problem, config, v_scale=0.25).cpu(), expected / 4, atol=2e-5, rtol=0)


@pytest.mark.parametrize("config", WHOLE_AND_CUT)
def test_padding_rows_read_nothing_and_become_zero(config: DecodeConfig) -> None:
    """A context of 0 with a block table that points nowhere: reading through it would fault or give garbage."""
    problem = make_problem([(1, 40), (1, 33), (1, 20)], 16)
    expected = problem.run(TorchNaiveBackend)
    written = replace(problem, metadata=replace(problem.metadata, block_table=problem.metadata.block_table.clone()))
    written.metadata.block_table[1] = 2**30
    got = decode(written, config, seq_lens=[40, 0, 20]).cpu()
    torch.testing.assert_close(got[[0, 2]], expected[[0, 2]], atol=2e-5, rtol=0)
    assert torch.equal(got[1], torch.zeros_like(got[1]))


@pytest.mark.parametrize("ordered", [False, True])
def test_pure_decode_metadata_needs_no_host_lists(ordered: bool) -> None:
    """What a CUDA graph records: the tensors' contents change, the metadata does not."""
    problem = make_problem(BATCHES["decodes"], 16)
    common = on_device(problem.metadata)
    order = torch.argsort(common.seq_lens, descending=True).int() if ordered else None
    metadata = TritonPagedBackend.build_decode_metadata(
        common.num_reqs,
        512,
        common.query_start_loc,
        common.seq_lens,
        common.block_table,
        common.slot_mapping,
        order=order,
    )
    impl = TritonPagedImpl(4, 64, 64**-0.5, 2)
    query, key, value, cache = (
        t.to(DEVICE, copy=True) for t in (problem.query, problem.key, problem.value, problem.kv_cache)
    )
    out = impl.forward(query, key, value, cache, metadata, torch.full_like(query, float("nan")))
    torch.testing.assert_close(out.cpu(), problem.run(TorchNaiveBackend), atol=2e-5, rtol=0)


def test_the_longest_contexts_come_first_and_padding_last() -> None:
    batch = SimpleNamespace(version=1)
    runner: Any = SimpleNamespace(input_batch=batch, _order=None, _order_state=(-1, 0))
    order = GPUModelRunner._longest_first(runner, np.array([5, 900, 1, 70], dtype=np.int32), 6)
    assert order.tolist() == [1, 3, 0, 2, 4, 5]
    # A step later each is one token longer: nothing to sort. Another batch, or another size, is another order.
    assert GPUModelRunner._longest_first(runner, np.array([6, 901, 2, 71], dtype=np.int32), 6) is order
    batch.version = 2
    assert GPUModelRunner._longest_first(runner, np.array([3, 1], dtype=np.int32), 2).tolist() == [0, 1]
    assert GPUModelRunner._longest_first(runner, np.array([3, 1], dtype=np.int32), 4).tolist() == [0, 1, 2, 3]


def test_order_matters_only_where_programs_wait_for_a_place() -> None:
    assert wants_longest_first(256, 8) and wants_longest_first(96, 8)
    assert not wants_longest_first(64, 8) and not wants_longest_first(1, 8)


@pytest.mark.parametrize("max_len", [2048, 40960])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8, 16, 32])
def test_every_decode_kernel_is_compiled_before_steps_are_recorded(
    num_kv_heads: int, max_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that is first met when a step is recorded is compiled there, alone, while the start waits."""
    monkeypatch.setattr(gpu_model_runner, "supports_pdl", lambda device: True)
    runner = GPUModelRunner.__new__(GPUModelRunner)
    impl = TritonPagedImpl(32, 128, 128**-0.5, num_kv_heads)
    monkeypatch.setattr(runner, "_attention_layers", lambda: {"layer": SimpleNamespace(impl=impl)}, raising=False)
    runner.__dict__ |= {
        "model_config": SimpleNamespace(deterministic=False),
        "max_model_len": max_len,
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "_num_kv_heads": num_kv_heads,
    }

    def kernel(size: int) -> tuple[Any, ...]:
        config = choose_decode_config(size, num_kv_heads, max_len, pdl=size <= PDL_MAX_DECODES)
        cut = config.num_splits > 1
        return replace(config, num_splits=0, split_tokens=0), cut, wants_longest_first(size, num_kv_heads)

    sizes = default_graph_sizes(1024)
    compiled = runner.sizes_to_compile(sizes, is_packed=False)
    assert {kernel(size) for size in sizes} == {kernel(size) for size in compiled}
    assert set(compiled) <= set(sizes) and len(compiled) <= 12


@pytest.mark.gpu
def test_one_recorded_graph_serves_all_contexts() -> None:
    impl = TritonPagedImpl(4, 64, 64**-0.5, 2)
    first, second = (make_problem([(1, n) for n in lens], 16, seed=n) for n, *lens in [(1, 9, 20, 2), (2, 300, 1, 77)])
    width = max(p.metadata.block_table.shape[1] for p in (first, second))
    total = max(p.kv_cache.shape[1] for p in (first, second))
    seq_lens, slots = torch.zeros(3, dtype=torch.int32, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    table = torch.zeros((3, width), dtype=torch.int32, device=DEVICE)
    cache = torch.zeros((2, total, 16, 2, 64), device=DEVICE)
    query, out = torch.zeros((3, 4, 64), device=DEVICE), torch.zeros((3, 4, 64), device=DEVICE)
    key, value = torch.zeros((3, 2, 64), device=DEVICE), torch.zeros((3, 2, 64), device=DEVICE)
    starts = torch.arange(4, dtype=torch.int32, device=DEVICE)
    metadata = TritonPagedBackend.build_decode_metadata(3, 512, starts, seq_lens, table, slots)
    impl.forward(query, key, value, cache, metadata, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        impl.forward(query, key, value, cache, metadata, out)
    for problem in (first, second, first):
        seq_lens.copy_(problem.metadata.seq_lens)
        slots.copy_(problem.metadata.slot_mapping)
        table[:, : problem.metadata.block_table.shape[1]] = problem.metadata.block_table.to(DEVICE)
        cache[:, : problem.kv_cache.shape[1]] = problem.kv_cache.to(DEVICE)
        for static, new in ((query, problem.query), (key, problem.key), (value, problem.value)):
            static.copy_(new)
        out.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(out.cpu(), problem.run(TorchNaiveBackend), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "config", [PrefillConfig(16, 16, 2, 1), PrefillConfig(32, 16, 4, 2, False), PrefillConfig(64, 32, 4, 3)]
)
def test_every_tile_of_a_prefill_gives_the_same(config: PrefillConfig) -> None:
    problem = make_problem([(40, 40), (3, 70), (17, 33), (64, 65)], 16, num_heads=6, num_kv_heads=2)
    metadata = on_device(problem.metadata)
    cache = problem.kv_cache.to(DEVICE, copy=True)
    TritonPagedImpl(6, 64, 1.0, 2)._write(
        problem.key.to(DEVICE), problem.value.to(DEVICE), cache, metadata.slot_mapping
    )
    out = torch.full_like(problem.query, float("nan"), device=DEVICE)
    tiles = build_tiles(metadata.query_start_loc_cpu, metadata.seq_lens_cpu, range(4), config.tile_tokens(3))
    paged_prefill(
        problem.query.to(DEVICE), cache, metadata.block_table, torch.from_numpy(tiles).to(DEVICE), out, 0.125, config
    )
    torch.testing.assert_close(out.cpu(), problem.run(TorchNaiveBackend), atol=2e-5, rtol=0)


def test_tiles_cover_every_token_once_longest_first() -> None:
    tiles = build_tiles([0, 5, 6, 40, 72], [5, 30, 100, 32], [0, 2, 3], 16)
    assert tiles.dtype == "int32" and tiles.shape == (1 + 3 + 2, 4)
    assert sorted(tuple(t) for t in tiles.tolist()) == [
        (0, 0, 0, 5), (2, 6, 66, 16), (2, 22, 82, 16), (2, 38, 98, 2), (3, 40, 0, 16), (3, 56, 16, 16),
    ]  # fmt: skip
    ends = (tiles[:, 2] + tiles[:, 3]).tolist()
    assert ends == sorted(ends, reverse=True)


@pytest.mark.parametrize(("tokens", "splits"), [(256, 32), (16, 32), (16, 4)])
def test_deterministic_bits_do_not_depend_on_the_crowd(
    tokens: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request's decode and chunks: alone and between others, also where long contexts make splits longer."""
    monkeypatch.setattr(triton_decode, "DETERMINISTIC_SPLIT_TOKENS", tokens)
    monkeypatch.setattr(triton_decode, "MAX_SPLITS", splits)
    crowd = [(1, 90), (20, 45), (1, 7), (1, 700 if CUDA else 300), (5, 80)]
    problem = make_problem(crowd, 16, num_heads=4, num_kv_heads=2)
    together = run(problem, LOW, DeterministicPagedBackend)
    starts = problem.metadata.query_start_loc_cpu
    for b, (num_new, seq_len) in enumerate(crowd):
        rows = slice(starts[b], starts[b + 1])
        alone = replace(
            problem,
            query=problem.query[rows],
            key=problem.key[rows],
            value=problem.value[rows],
            metadata=AttentionMetadata(
                num_new, 1, num_new, seq_len, torch.tensor([0, num_new], dtype=torch.int32),
                problem.metadata.seq_lens[b : b + 1], problem.metadata.block_table[b : b + 1],
                problem.metadata.slot_mapping[rows], [0, num_new], [seq_len],
            ),
        )  # fmt: skip
        assert torch.equal(run(alone, LOW, DeterministicPagedBackend), together[rows]), f"request {b} of {crowd}"


def test_deterministic_cut_depends_on_the_bound_alone() -> None:
    sizes = (1, 7, 64, 256, 1024)
    configs = [choose_decode_config(n, 8, 4096, deterministic=True) for n in sizes]
    assert len({(c.block_n, c.num_warps, c.num_stages, c.num_splits, c.split_tokens) for c in configs}) == 1
    assert configs[0].split_tokens * configs[0].num_splits >= 4096, "the bound of num_splits never cuts"
    assert all(c.programs * n * 8 <= 1024 or c.programs == 1 for n, c in zip(sizes, configs, strict=True))
    assert choose_decode_config(1, 8, 40960, deterministic=True).num_splits <= 32


def test_chosen_splits_fill_the_gpu_and_no_more() -> None:
    one = choose_decode_config(1, 8, 2048)
    assert (one.num_splits, one.split_tokens) == (32, 64)
    assert choose_decode_config(256, 8, 40960).num_splits == 1
    assert choose_decode_config(16, 8, 2048).num_splits == 8
    assert choose_decode_config(32, 8, 4096).num_splits == 1  # enough programs: whole, unless longer than the others
    assert choose_decode_config(32, 8, 40960).num_splits == 8
    assert choose_decode_config(1, 8, 64).num_splits == 1
    assert decode_workspace_size(256, 16, 8, 128, choose_decode_config(256, 8, 2048)) == (0, 0)
    for num_reqs in range(1, 300):
        config = choose_decode_config(num_reqs, 8, 40960)
        assert config.programs == 0 and num_reqs * 8 * config.num_splits <= max(4096, num_reqs * 8)
        assert num_reqs * 8 * config.num_splits >= min(2048, num_reqs * 8 * 32)
        assert (config.num_splits > 1) == (num_reqs < 256)
    small = choose_decode_config(32, 8, 2048, head_size=256, shared_memory_bytes=99 * 1024)
    assert small.block_n * 2 * 256 * 2 * small.num_stages <= 99 * 1024
    assert choose_prefill_config(40, head_size=128).block_m >= 40
    assert choose_prefill_config(200).tile_tokens(200) >= 1


def test_mixed_steps_name_their_decodes_and_pure_ones_do_not() -> None:
    def metadata(batch: Batch) -> TritonPagedMetadata:
        return TritonPagedBackend.build_metadata(make_problem(batch, 16).metadata, 16, LOW)

    mixed = metadata([(5, 5), (1, 30), (1, 1), (3, 9), (1, 2)])
    assert mixed.decode_rows is not None and mixed.decode_reqs is not None
    assert mixed.decode_rows.tolist() == [5, 6, 10] and mixed.decode_reqs.tolist() == [1, 2, 4]
    assert mixed.prefill_reqs == [0, 3]
    pure = metadata([(1, 3), (1, 8)])
    assert pure.decode_rows is None and pure.decode_reqs is None and not pure.prefill_reqs


def test_a_wrong_block_would_show() -> None:
    problem = make_problem(MIXED, 16)
    before = run(problem)
    problem.metadata.block_table[2, 1] = 0
    assert (run(problem) - before).abs().max() > 1


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 32])
def test_a_long_context(splits: int) -> None:
    problem = make_problem([(1, 32768), (1, 5), (100, 32000)], 16)
    check(problem, torch.float32)
    decodes = make_problem([(1, 32768), (1, 31)], 16)
    got = decode(decodes, DecodeConfig(64, 2, 3, splits))
    torch.testing.assert_close(got.cpu(), decodes.run(TorchNaiveBackend), atol=2e-5, rtol=0)
