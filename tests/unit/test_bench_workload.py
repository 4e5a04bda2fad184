"""Workloads: the same for every engine of a round, new token ids in the next, and never more than the engine takes."""

from __future__ import annotations

import itertools

import pytest

from folovllm.benchmarks import workload
from folovllm.benchmarks.child import warm_up_workload
from folovllm.benchmarks.rungs import CPU, CUDA, QUICK, WORKLOADS, Sizes, make_rungs, select_rungs
from folovllm.benchmarks.workload import BenchRequest, Workload
from folovllm.engine.arg_utils import EngineArgs


def lengths(work: Workload) -> list[tuple[int, int]]:
    return [(len(request.token_ids), request.max_tokens) for request in work.requests]


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_gives_the_same_tokens_and_another_seed_others_of_the_same_lengths(name: str) -> None:
    first, again, other = (QUICK.build(name, 5000, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert lengths(first) == lengths(other)
    ids = [token for request in first.requests for token in request.token_ids]
    assert min(ids) >= 100 and max(ids) < 5000


def test_unknown_workload() -> None:
    with pytest.raises(ValueError, match="workload='x'"):
        QUICK.build("x", 5000, 0)


@pytest.mark.parametrize("sizes", [QUICK, CPU, CUDA], ids=["quick", "cpu", "cuda"])
def test_workloads_fit_the_engine(sizes: Sizes) -> None:
    sizes.check()
    assert sizes.contiguous_slots < sizes.num_prompts  # else a contiguous cache would lose nothing
    assert sizes.arrivals[2] > 2 * sizes.chunk_budget  # else no long prompt would be cut


def test_sizes_that_do_not_fit_are_refused() -> None:
    too_long = Sizes(**{**vars(QUICK), "max_model_len": 100})
    with pytest.raises(ValueError, match="max_model_len=100"):
        too_long.check()


def test_prompts_of_shared_begin_alike_and_arrive_after_the_first() -> None:
    work = workload.shared_prefix(1000, 0, count=3, prefix_len=8, own_len=4, output_len=5)
    prompts = [request.token_ids for request in work.requests]
    assert all(prompt[:8] == prompts[0][:8] for prompt in prompts)
    assert len({tuple(prompt[8:]) for prompt in prompts}) == 3
    assert [(r.group, r.after, r.after_tokens) for r in work.requests[1:]] == [("warm", "shared-0", 5)] * 2


def test_conversations_grow() -> None:
    work = workload.conversations(1000, 0, count=2, turns=3, first_len=10, own_len=4, output_len=5)
    assert [r.after for r in work.requests] == [None, "chat-0-0", "chat-0-1", None, "chat-1-0", "chat-1-1"]
    assert work.longest() == 10 + 5 + 2 * (4 + 5)


def test_long_prompts_arrive_while_streams_run() -> None:
    work = workload.arrivals(1000, 0, num_streams=2, num_long=3, long_len=100, gap=4)
    streams = [r for r in work.requests if r.group == "stream"]
    long = [r for r in work.requests if r.group == "long"]
    assert [r.after_tokens for r in long] == [4, 8, 12]
    assert all(r.max_tokens == 20 for r in streams)


def test_lengths_of_uniform() -> None:
    work = workload.uniform(1000, 0, count=50, input_len=100, output_len=20, prefix_len=7, range_ratio=0.5)
    inputs = [len(r.token_ids) - 7 for r in work.requests]
    assert min(inputs) >= 50 and max(inputs) <= 150 and len(set(inputs)) > 10
    assert all(10 <= r.max_tokens <= 30 for r in work.requests)
    assert lengths(workload.uniform(1000, 0, 3, 100, 20)) == [(100, 20)] * 3
    with pytest.raises(ValueError, match="range_ratio"):
        workload.uniform(1000, 0, 1, 10, 10, range_ratio=1.0)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([BenchRequest("a", [1], 1), BenchRequest("a", [1], 1)], "used twice"),
        ([BenchRequest("a", [1], 1, after="b", after_tokens=1)], "not before it"),
        ([BenchRequest("a", [1], 2), BenchRequest("b", [1], 1, after="a", after_tokens=3)], "after_tokens=3"),
        (
            [BenchRequest("a", [1], 2), BenchRequest("b", [1], 1, after="a", after_tokens=1, continues=True)],
            "before it has ended",
        ),
        ([BenchRequest("a", [1], 0)], "max_tokens=0"),
    ],
)
def test_impossible_workloads_are_refused(requests: list[BenchRequest], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Workload("w", tuple(requests))


def test_a_warm_up_is_short_and_waits_for_nothing() -> None:
    for name in WORKLOADS:
        work = warm_up_workload(QUICK.build(name, 1000, 0))
        assert work.requests
        assert all(r.max_tokens <= 8 and r.after is None and not r.continues for r in work.requests)


def test_the_batch_of_a_warm_up_shrinks_by_halves() -> None:
    work = warm_up_workload(CUDA.build("mixed", 1000, 0))
    alive = [sum(r.max_tokens > step for r in work.requests) for step in range(11)]
    assert alive == [48, 48, 48, 48, 24, 12, 6, 3, 1, 0, 0]


def test_where_kernels_are_compiled_the_warm_up_is_whole() -> None:
    whole = {device: [r.name for r in make_rungs(device, CUDA) if r.whole_warm_up] for device in ("cpu", "cuda")}
    assert whole == {"cpu": [], "cuda": ["m4", "m5", "m6", "graphs", "overlap", "m7"]}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_rung_adds_something_to_the_one_before(device: str) -> None:
    rungs = make_rungs(device, QUICK)
    assert [rung.name for rung in rungs][:6] == ["m1", "m2", "m3", "m4", "m5", "m6"]
    for before, after in itertools.pairwise(rungs):
        same = (before.engine_args, before.env, before.quantized) == (after.engine_args, after.env, after.quantized)
        assert not same, after.name
        assert set(after.engine_args) == set(before.engine_args)
        EngineArgs(**after.engine_args)  # every field exists


def test_all_rungs_have_the_same_room_for_keys_and_values() -> None:
    for sizes in (QUICK, CPU, CUDA):
        for rung in make_rungs("cpu", sizes):
            blocks, size = rung.engine_args["num_gpu_blocks_override"], rung.engine_args["block_size"]
            assert (blocks - 1) * size == sizes.contiguous_slots * sizes.max_model_len


def test_what_is_compared_runs_on_both_sides() -> None:
    by_name = {rung.name: rung for rung in make_rungs("cpu", QUICK)}
    assert "arrivals" in by_name["m4"].workloads and "arrivals" in by_name["m5"].workloads
    for name in ("shared", "chat"):
        assert name in by_name["m5"].workloads and name in by_name["m6"].workloads
    assert "single" in by_name["overlap"].workloads and "single" in by_name["m7"].workloads
    assert by_name["overlap"].perplexity and by_name["m7"].perplexity
    assert all("mixed" in rung.workloads for rung in by_name.values())


def test_rungs_of_the_device_are_chosen_by_name() -> None:
    rungs = make_rungs("cpu", QUICK)
    assert [rung.name for rung in select_rungs(rungs, ["m3", "m1"])] == ["m1", "m3"]
    with pytest.raises(ValueError, match="rungs='graphs'"):
        select_rungs(rungs, ["graphs"])
