"""Scheduler fuzz: whatever arrives, aborts or runs out, blocks stay consistent and tokens are those of the model.

Hypothesis draws a pool, a budget, a policy, and requests that share prefixes; FakeRunner checks every slot that it
reads, check_integrity every block after every step, and at the end each token stream is compared with the fake
model's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from folovllm.core.kv_cache_utils import get_block_hash
from folovllm.request import FinishReason, Request, RequestStatus
from tests.core_utils import FakeEngine, create_scheduler, expected_tokens, make_request

VOCABULARY = 97


@dataclass
class Plan:
    """One request of a scenario."""

    arrival: int
    num_tokens: int
    num_shared: int
    family: int
    sampling: dict[str, Any]
    priority: int
    cache_salt: str | None
    abort_at: int | None


@dataclass
class Scenario:
    """A scheduler and what happens to it; `resets`: step -> whether running requests are preempted."""

    scheduler_args: dict[str, Any]
    depth: int
    plans: list[Plan]
    resets: dict[int, bool] = field(default_factory=dict)


@st.composite
def plans(draw: st.DrawFn, max_model_len: int) -> Plan:
    """Draw one request; lengths favour block boundaries, prompts share the beginnings of three families."""
    num_tokens = draw(st.integers(1, max_model_len - 1) | st.sampled_from([7, 8, 9, 15, 16, 17, 23, 24, 25]))
    num_tokens = min(num_tokens, max_model_len - 1)
    max_tokens = draw(st.integers(1, 24))
    sampling = {
        "max_tokens": max_tokens,
        "min_tokens": draw(st.integers(0, max_tokens)),
        "stop_token_ids": draw(st.sampled_from([[], [], list(range(0, VOCABULARY, 9))])),
        "prompt_logprobs": draw(st.sampled_from([None, None, None, 0])),
    }
    return Plan(
        arrival=draw(st.integers(0, 30)),
        num_tokens=num_tokens,
        num_shared=draw(st.integers(0, num_tokens)),
        family=draw(st.integers(0, 2)),
        sampling=sampling,
        priority=draw(st.integers(0, 2)),
        cache_salt=draw(st.sampled_from([None, None, "red", "blue"])),
        abort_at=draw(st.none() | st.integers(0, 60)),
    )


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Draw a scheduler, sometimes with a pool that is too small for some of its requests."""
    max_model_len = draw(st.integers(8, 80))
    max_num_seqs = draw(st.integers(1, 8))
    chunked = draw(st.booleans())
    use_async = draw(st.booleans())
    smallest_budget = max_num_seqs if chunked else max(max_model_len, max_num_seqs)
    return Scenario(
        scheduler_args={
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": smallest_budget + draw(st.integers(0, 40)),
            "enable_chunked_prefill": chunked,
            "long_prefill_token_threshold": draw(st.sampled_from([0, 0, 1, 5, 16])),
            "policy": draw(st.sampled_from(["fcfs", "priority"])),
            "enable_prefix_caching": draw(st.sampled_from([True, True, False])),
            "block_size": draw(st.sampled_from([1, 2, 4, 8])),
            "num_blocks": draw(st.integers(2, 60)),
            "use_async": use_async,
        },
        depth=draw(st.integers(0, 2)) if use_async else 0,
        plans=draw(st.lists(plans(max_model_len), min_size=2, max_size=16)),
        resets=draw(st.dictionaries(st.integers(0, 40), st.booleans(), max_size=1)),
    )


@st.composite
def crowded_scenarios(draw: st.DrawFn) -> Scenario:
    """Draw a pool for about one request and many that want it: preemptions in every place, of half-done chunks too."""
    max_model_len = draw(st.integers(24, 60))
    max_num_seqs = draw(st.integers(3, 8))
    block_size = draw(st.sampled_from([1, 2]))
    use_async = draw(st.booleans())
    return Scenario(
        scheduler_args={
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_seqs + draw(st.integers(8, 50)),
            "long_prefill_token_threshold": draw(st.sampled_from([4, 8, 12])),
            "policy": draw(st.sampled_from(["priority", "priority", "priority", "fcfs"])),
            "enable_prefix_caching": True,
            "block_size": block_size,
            "num_blocks": max_model_len // block_size + draw(st.integers(2, 30)),
            "use_async": use_async,
        },
        depth=draw(st.integers(0, 2)) if use_async else 0,
        plans=draw(st.lists(plans(max_model_len), min_size=6, max_size=16)),
    )


def build(i: int, plan: Plan, block_size: int) -> Request:
    shared = [(plan.family * 31 + 7 * p) % VOCABULARY for p in range(plan.num_shared)]
    own = [(i * 13 + 5 * p) % VOCABULARY for p in range(plan.num_tokens - plan.num_shared)]
    return make_request(
        str(i),
        shared + own,
        block_size=block_size,
        arrival_time=float(plan.arrival),
        priority=plan.priority,
        cache_salt=plan.cache_salt,
        **plan.sampling,
    )


def run_scenario(scenario: Scenario) -> int:
    """Run one scenario to its end with all checks; return its number of steps."""
    args = scenario.scheduler_args
    scheduler = create_scheduler(**args)
    manager = scheduler.kv_cache_manager
    engine = FakeEngine(scheduler, scenario.depth)
    requests = [build(i, plan, args["block_size"]) for i, plan in enumerate(scenario.plans)]
    last_event = max([31, 61, *(step + 1 for step in scenario.resets)])
    named: dict[bytes, list[Any]] = {}
    now = 0
    while now < last_event or scheduler.has_requests() or engine.in_flight:
        for request, plan in zip(requests, scenario.plans, strict=True):
            if plan.arrival == now:
                engine.add(request)
            if plan.abort_at == now:
                scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
        if now in scenario.resets:
            scheduler.reset_prefix_cache(reset_running_requests=scenario.resets[now])
        if scheduler.has_requests():
            output = engine.step()
            check_step(engine, output.num_scheduled_tokens, output.total_num_scheduled_tokens)
        elif engine.in_flight:
            engine._update()
        manager.check_integrity(scheduler.running)
        check_cached_content(engine, requests, named)
        now += 1
        assert now < 5000, "requests starve"
    check_end(engine, requests, scenario)
    return engine.num_steps


def check_step(engine: FakeEngine, scheduled: dict[str, int], total: int) -> None:
    """The budget and the seats are respected."""
    scheduler = engine.scheduler
    assert sum(scheduled.values()) == total <= scheduler.max_num_scheduled_tokens
    assert all(num_tokens >= 1 for num_tokens in scheduled.values())
    assert len(scheduler.running) <= scheduler.max_num_running_reqs
    assert len(scheduler.running) + len(scheduler.waiting) == len(scheduler.requests)
    threshold = scheduler.scheduler_config.long_prefill_token_threshold
    assert not threshold or max(scheduled.values(), default=0) <= threshold


def check_cached_content(engine: FakeEngine, requests: list[Request], named: dict[bytes, list[Any]]) -> None:
    """Every block that can be found holds what its name says; `named`: hash -> content, extended here."""
    scheduler = engine.scheduler
    size = scheduler.block_size
    for request in requests:
        tokens = request.all_token_ids
        for i in range(len(request.block_hashes) - 1, -1, -1):
            if request.block_hashes[i] in named:
                break  # and so is its prefix
            named[request.block_hashes[i]] = [
                (tokens[p], p, request.cache_salt) for p in range(i * size, (i + 1) * size)
            ]
    slots = engine.runner.slots
    for key, block in scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block.items():
        start = block.block_id * size
        assert slots[start : start + size] == named[get_block_hash(key)], block


def check_end(engine: FakeEngine, requests: list[Request], scenario: Scenario) -> None:
    """Everything has come back, and every request got its tokens and its end."""
    scheduler = engine.scheduler
    manager = scheduler.kv_cache_manager
    assert manager.block_pool.get_num_free_blocks() == manager.num_usable_blocks
    assert not manager.req_to_blocks and not manager.num_cached_block
    assert not engine.runner.tokens and not engine.runner.num_computed
    if scenario.scheduler_args["use_async"]:
        assert not scheduler._num_stale_tokens
        assert not any(request.num_output_placeholders for request in requests)
    pool_tokens = manager.num_usable_blocks * scheduler.block_size
    for request in requests:
        expected = expected_tokens(request, scheduler.max_model_len, pool_tokens)
        got = engine.outputs[request.request_id]
        assert request.is_finished()
        if request.status == RequestStatus.FINISHED_ABORTED:
            assert got == expected[: len(got)]
            continue
        assert got == expected
        finish_reason = engine.finished[request.request_id].finish_reason
        if request.status == RequestStatus.FINISHED_STOPPED:
            assert finish_reason == FinishReason.STOP and got[-1] in request.sampling_params.stop_token_ids
        else:
            assert finish_reason == FinishReason.LENGTH
        assert (request.status == RequestStatus.FINISHED_IGNORED) == (not expected)


@pytest.mark.parametrize(
    ("strategy", "max_examples", "min_steps"),
    [(scenarios(), 300, 7000), (crowded_scenarios(), 300, 12_000)],
    ids=["any", "crowded"],
)
def test_any_schedule_gives_the_models_tokens_and_keeps_the_blocks_consistent(
    strategy: st.SearchStrategy[Scenario], max_examples: int, min_steps: int
) -> None:
    num_steps = 0

    @settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.large_base_example,
        ],
    )
    @given(strategy)
    def run(scenario: Scenario) -> None:
        nonlocal num_steps
        num_steps += run_scenario(scenario)

    run()
    assert num_steps >= min_steps
