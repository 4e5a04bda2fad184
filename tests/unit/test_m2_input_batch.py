"""InputBatch: after any changes it equals a batch built afresh, and its metadata says what the requests
say."""

from __future__ import annotations

import inspect
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.sample.metadata import SamplingMetadata
from folovllm.sampling_params import MAX_SEED, SamplingParams
from folovllm.worker.block_table import BlockTable
from folovllm.worker.input_batch import CachedRequestState, InputBatch

V = 60
MAX_LEN = 48
BLOCK = 4


def make_batch(size: int = 12) -> InputBatch:
    return InputBatch(
        max_num_reqs=size,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=64,
        device=torch.device("cpu"),
        vocab_size=V,
        block_sizes=[BLOCK],
    )


def make_request(index: int, world: int = 0, **params: Any) -> CachedRequestState:
    """A request with random content; without `params` also with random parameters."""
    r = random.Random(f"{world}/{index}")
    if not params:
        params = {
            "temperature": r.choice([0.0, 0.5, 1.3]),
            "top_k": r.choice([0, 0, 7, 500]),
            "top_p": r.choice([1.0, 1.0, 0.4]),
            "min_p": r.choice([0.0, 0.0, 0.1]),
            "presence_penalty": r.choice([0.0, 0.0, 1.5]),
            "frequency_penalty": r.choice([0.0, 0.0, -0.5]),
            "repetition_penalty": r.choice([1.0, 1.0, 1.2]),
            "seed": r.choice([None, 5, 2**62]),
            "logprobs": r.choice([None, None, 0, 3, -1]),
            "min_tokens": r.choice([0, 3]),
            "stop_token_ids": [1],
            "logit_bias": r.choice([None, {3: 1.0}]),
            "allowed_token_ids": r.choice([None, None, [1, 2, 3]]),
        }
    sampling_params = SamplingParams(**params)
    sampling_params.bad_words_token_ids = r.choice([None, [[1, 2]]])
    prompt = [r.randrange(V) for _ in range(r.randrange(0, 20))]
    output = [r.randrange(V) for _ in range(r.randrange(0, 10))]
    blocks = [r.randrange(1, 1000) for _ in range(-(-(len(prompt) + len(output)) // BLOCK))]
    return CachedRequestState(
        req_id=f"req-{index}",
        prompt_token_ids=prompt,
        sampling_params=sampling_params,
        block_ids=(blocks,),
        generator=r.choice([None, torch.Generator().manual_seed(index)]),
        num_computed_tokens=len(output),
        output_token_ids=output,
    )


def assert_same(a: Any, b: Any) -> None:
    """Compare every attribute and property of two objects."""
    members = inspect.getmembers(a, lambda member: not inspect.isroutine(member))
    names = {name for name, _ in members if not name.startswith("__")}
    assert len(names) >= 5
    # Counters of changes tell apart how two equal batches came about.
    for name in names - {"logitsprocs", "version", "_refreshed_version", "_changed_rows"}:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, torch.Tensor):
            assert x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y), name
        elif isinstance(x, np.ndarray):
            assert x.dtype == y.dtype and np.array_equal(x, y), name
        elif isinstance(x, (BlockTable, SamplingMetadata)):
            assert_same(x, y)
        else:
            assert x == y, name


def assert_same_logits(a: InputBatch, b: InputBatch) -> None:
    """The processors of both batches do the same."""
    for kind in ("argmax_invariant", "non_argmax_invariant"):
        mine, theirs = getattr(a.logitsprocs, kind), getattr(b.logitsprocs, kind)
        assert [type(p) for p in mine] == [type(p) for p in theirs]
        for p, q in zip(mine, theirs, strict=True):
            logits = torch.randn(a.num_reqs, V)
            assert torch.equal(p.apply(logits.clone()), q.apply(logits.clone()))


@pytest.mark.parametrize("swaps", [[], [(0, 1)], [(0, 0)], [(0, 2), (1, 3), (2, 5), (0, 5)]])
def test_add_and_swap_equals_a_batch_built_in_that_order(swaps: list[tuple[int, int]]) -> None:
    requests = [make_request(index) for index in range(6)]
    batch, fresh = make_batch(), make_batch()
    assert [batch.add_request(request) for request in requests] == list(range(6))
    for i, j in swaps:
        batch.swap_states(i, j)
        requests[i], requests[j] = requests[j], requests[i]
    assert [fresh.add_request(request) for request in requests] == list(range(6))
    batch.refresh_metadata()
    fresh.refresh_metadata()
    assert batch.req_ids == [request.req_id for request in requests]
    assert_same(batch, fresh)
    assert_same_logits(batch, fresh)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_any_history_equals_a_batch_built_afresh(data: st.DataObject, seed: int) -> None:
    """Adds, removals, condensations, swaps and sampled tokens; `slots` is the plain model of what is
    where."""
    batch = make_batch(size=7)
    slots: list[CachedRequestState | None] = []
    added = 0
    for _ in range(data.draw(st.integers(1, 20))):
        used = [i for i, request in enumerate(slots) if request is not None]
        step = data.draw(st.sampled_from(["add", "add", "remove", "condense", "swap", "sample", "refresh"]))
        if step == "add" and len(used) < 7:
            request = make_request(added, seed)
            added += 1
            hole = next((i for i, other in enumerate(slots) if other is None), len(slots))
            slots[hole : hole + 1] = [request]
            assert batch.add_request(request) == hole
        elif step == "remove" and used:
            index = data.draw(st.sampled_from(used))
            request = slots[index]
            assert request is not None and batch.remove_request(request.req_id) == index
            slots[index] = None
        elif step == "swap" and used and len(used) == len(slots):
            i, j = (data.draw(st.sampled_from(used)) for _ in range(2))
            slots[i], slots[j] = slots[j], slots[i]
            batch.swap_states(i, j)
        elif step == "sample" and used:
            tokens = [data.draw(st.integers(0, V - 1)) for _ in used]
            batch.record_sampled_tokens(np.array(used), np.array(tokens))
        elif step in ("condense", "refresh"):
            batch.condense()
            while None in slots:
                last = slots.pop()
                if last is not None:
                    slots[slots.index(None)] = last
            if step == "refresh":
                batch.refresh_metadata()
    batch.condense()
    batch.refresh_metadata()
    requests = [request for request in slots if request is not None]
    requests.sort(key=lambda request: batch.req_id_to_index[request.req_id])
    fresh = make_batch(size=7)
    for request in requests:
        fresh.add_request(request)
    batch._changed = fresh._changed = True
    batch.refresh_metadata()
    fresh.refresh_metadata()
    assert_same(batch, fresh)
    assert_same_logits(batch, fresh)


def test_condense_moves_the_last_into_the_lowest_holes() -> None:
    batch = make_batch()
    for index in range(8):
        batch.add_request(make_request(index))
    for index in (1, 3, 7):
        assert batch.remove_request(f"req-{index}") == index
    assert batch.num_reqs == 5
    batch.condense()
    assert batch.req_ids == ["req-0", "req-6", "req-2", "req-5", "req-4"]
    assert batch.req_id_to_index == {req_id: i for i, req_id in enumerate(batch.req_ids)}
    assert batch.remove_request("req-1") is None
    assert batch.add_request(make_request(9)) == 5


def test_a_hole_is_filled_by_the_next_request() -> None:
    batch = make_batch()
    for index in range(3):
        batch.add_request(make_request(index))
    batch.remove_request("req-1")
    batch.remove_request("req-0")
    assert [batch.add_request(make_request(index)) for index in (3, 4, 5)] == [0, 1, 3]
    assert batch.req_ids == ["req-3", "req-4", "req-2", "req-5"]


def test_metadata_says_what_the_requests_say() -> None:
    requests = [make_request(index, world=3) for index in range(10)]
    batch = make_batch()
    for request in requests:
        batch.add_request(request)
    for index in (0, 4, 9):
        batch.remove_request(f"req-{index}")
    batch.condense()
    meta = batch._make_sampling_metadata()
    alive = sorted(
        (request for request in requests if request.req_id in batch.req_id_to_index),
        key=lambda request: batch.req_id_to_index[request.req_id],
    )
    params = [request.sampling_params for request in alive]
    greedy = [p.temperature == 0 for p in params]
    assert any(greedy) and not all(greedy)
    assert not meta.all_greedy and not meta.all_random
    torch.testing.assert_close(meta.temperature, torch.tensor([p.temperature for p in params]))
    top_k = [p.top_k if 0 < p.top_k < V and p.temperature else V for p in params]
    assert meta.top_k is not None and meta.top_k.tolist() == top_k and meta.top_k.dtype == torch.int32
    top_p = [p.top_p if p.temperature else 1.0 for p in params]
    torch.testing.assert_close(meta.top_p, torch.tensor(top_p))
    for kind in ("frequency", "presence", "repetition"):
        expected = torch.tensor([getattr(p, f"{kind}_penalty") for p in params])
        torch.testing.assert_close(getattr(meta, f"{kind}_penalties"), expected)
    longest = max(len(request.prompt_token_ids) for request in alive)
    padded = [request.prompt_token_ids + [V] * (longest - len(request.prompt_token_ids)) for request in alive]
    assert meta.prompt_token_ids is not None and meta.prompt_token_ids.dtype == torch.int64
    assert meta.prompt_token_ids.tolist() == padded
    assert all(a is b.output_token_ids for a, b in zip(meta.output_token_ids, alive, strict=True))
    bad_words = {i: p.bad_words_token_ids for i, p in enumerate(params)}
    assert meta.bad_words_token_ids == {i: words for i, words in bad_words.items() if words}
    assert meta.allowed_token_ids_mask is not None
    for index, p in enumerate(params):
        allowed = (~meta.allowed_token_ids_mask[index]).nonzero().flatten().tolist()
        assert allowed == (p.allowed_token_ids or list(range(V)))
    assert meta.max_num_logprobs == max(V if k == -1 else k for p in params if (k := p.logprobs) is not None)
    assert meta.seeds is not None and meta.seeds.tolist() == [request.seed for request in alive]
    assert meta.positions is None


def test_plain_requests_have_nothing_to_do() -> None:
    batch = make_batch()
    for index in range(3):
        request = make_request(index, temperature=0.0, top_k=5, top_p=0.5)
        request.sampling_params.bad_words_token_ids = None
        batch.add_request(request)
    batch.refresh_metadata()
    meta = batch.sampling_metadata
    assert meta.all_greedy and not meta.all_random and meta.no_penalties
    assert meta.top_k is None and meta.top_p is None and meta.max_num_logprobs is None
    assert meta.prompt_token_ids is None and meta.allowed_token_ids_mask is None
    assert meta.bad_words_token_ids == {}
    assert not meta.logitsprocs.argmax_invariant and not meta.logitsprocs.non_argmax_invariant


def test_metadata_is_rebuilt_only_when_the_batch_changed() -> None:
    batch = make_batch()
    batch.add_request(make_request(0))
    batch.refresh_metadata()
    first = batch.sampling_metadata
    batch.record_sampled_tokens(np.array([0]), np.array([7]))
    batch.refresh_metadata()
    assert batch.sampling_metadata is first
    batch.add_request(make_request(1))
    assert batch.sampling_metadata is first
    batch.refresh_metadata()
    assert batch.sampling_metadata is not first


def test_metadata_does_not_share_memory_with_the_batch() -> None:
    """A step in flight must not see the next one's changes."""
    batch = make_batch()
    batch.add_request(make_request(0, temperature=0.5, seed=1))
    batch.refresh_metadata()
    meta = batch.sampling_metadata
    batch.remove_request("req-0")
    assert meta.temperature is not None and meta.seeds is not None
    assert meta.temperature.tolist() == [0.5] and meta.seeds.tolist() == [1]


def test_record_sampled_tokens() -> None:
    batch = make_batch()
    requests = [make_request(index) for index in range(4)]
    for request in requests:
        batch.add_request(request)
    before = [request.prompt_token_ids + request.output_token_ids for request in requests]
    batch.record_sampled_tokens(np.array([2, 0]), np.array([50, 51]))
    batch.record_sampled_tokens(np.array([0]), np.array([52]))
    expected = [before[0] + [51, 52], before[1], before[2] + [50], before[3]]
    for index, tokens in enumerate(expected):
        assert batch.num_tokens[index] == len(tokens)
        assert batch.token_ids_cpu_tensor[index, : len(tokens)].tolist() == tokens
        assert requests[index].prompt_token_ids + requests[index].output_token_ids == tokens
        assert requests[index].num_tokens == len(tokens)


def test_seed_comes_from_params_then_generator_then_request_id() -> None:
    def seed_of(req_id: str, seed: int | None, generator: torch.Generator | None) -> int:
        return CachedRequestState(req_id, [1], SamplingParams(seed=seed), ([],), generator, 0, []).seed

    generator = torch.Generator().manual_seed(123)
    assert seed_of("a", 77, generator) == 77
    assert seed_of("a", 0, generator) == 0
    assert seed_of("a", None, generator) == 123
    assert seed_of("a", None, None) == seed_of("a", None, None) != seed_of("b", None, None)
    assert all(0 <= seed_of(str(i), None, None) <= MAX_SEED for i in range(50))


def test_empty_prompt_and_output() -> None:
    batch = make_batch()
    request = CachedRequestState("r", [], SamplingParams(presence_penalty=1.0), ([],), None, 0, [])
    batch.add_request(request)
    batch.refresh_metadata()
    meta = batch.sampling_metadata
    assert meta.prompt_token_ids is not None and meta.prompt_token_ids.shape == (1, 0)
    assert meta.output_token_ids == [[]]


def test_an_emptied_batch_equals_a_new_one() -> None:
    batch = make_batch()
    for index in range(5):
        batch.add_request(make_request(index))
    for index in (4, 0, 2, 1, 3):
        batch.remove_request(f"req-{index}")
    batch.condense()
    batch.refresh_metadata()
    assert_same(batch, make_batch())
