"""Sampler: every operation against a plain reference, and tokens that do not depend on batch-mates."""

from __future__ import annotations

import math
import random
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.sample.metadata import SamplingMetadata
from folovllm.sample.ops import topk_topp
from folovllm.sample.ops.bad_words import apply_bad_words
from folovllm.sample.ops.logprobs import gather_logprobs
from folovllm.sample.ops.penalties import apply_all_penalties
from folovllm.sample.ops.topk_topp import apply_top_k_top_p_pytorch
from folovllm.sample.sampler import Sampler, argmax, random_sample
from folovllm.sampling_params import SamplingParams
from folovllm.worker.input_batch import CachedRequestState, InputBatch

NEG_INF = float("-inf")
V = 50


def make_metadata(batch: int, vocab_size: int = V, **changes: Any) -> SamplingMetadata:
    """Metadata of `batch` plain random requests; `changes` replace fields."""
    fields: dict[str, Any] = {
        "temperature": torch.ones(batch),
        "all_greedy": False,
        "all_random": True,
        "top_p": None,
        "top_k": None,
        "generators": {},
        "max_num_logprobs": None,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": torch.zeros(batch),
        "presence_penalties": torch.zeros(batch),
        "repetition_penalties": torch.ones(batch),
        "output_token_ids": [[] for _ in range(batch)],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "seeds": torch.arange(batch),
        "positions": torch.full((batch,), 3),
    }
    return SamplingMetadata(**(fields | changes))


GREEDY = {"all_greedy": True, "all_random": False}


# --- top-k and top-p ---


def naive_top_k_top_p(logits: list[float], k: int, p: float) -> tuple[set[int], float]:
    """Return (tokens that stay, how close a decision of top-p was)."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kth = logits[order[k - 1]]
    order = [i for i in order if logits[i] >= kth]
    weights = [math.exp(logits[i] - logits[order[0]]) for i in order]
    total = sum(weights)
    kept: set[int] = set()
    before, margin = 0.0, 1.0
    for token_id, weight in zip(order, weights, strict=True):
        if kept and p < 1.0:
            margin = min(margin, abs(before - p))
            if before >= p:
                break
        kept.add(token_id)
        before += weight / total
    return kept, margin


def kept_tokens(logits: torch.Tensor) -> list[set[int]]:
    return [set((row > NEG_INF).nonzero().flatten().tolist()) for row in logits]


@settings(max_examples=250, deadline=None)
@given(data=st.data(), vocab_size=st.integers(2, 40), batch=st.integers(1, 4), ties=st.booleans())
def test_top_k_top_p_against_the_naive_reference(data: st.DataObject, vocab_size: int, batch: int, ties: bool) -> None:
    """With guesses so small that looking again is the rule, and with many equal logits."""
    value = st.integers(-3, 3).map(float) if ties else st.floats(-8, 8, width=32)
    rows = data.draw(
        st.lists(st.lists(value, min_size=vocab_size, max_size=vocab_size), min_size=batch, max_size=batch)
    )
    ks = data.draw(st.lists(st.integers(1, vocab_size), min_size=batch, max_size=batch))
    ps = data.draw(st.lists(st.floats(0.0625, 1.0, width=32), min_size=batch, max_size=batch))
    use_k, use_p = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    logits = torch.tensor(rows)
    with mock.patch.multiple(topk_topp, _FIRST_GUESS_TOP_P=2, _ROOM_FOR_EQUALS=0, _GROWTH=2):
        result = apply_top_k_top_p_pytorch(
            logits.clone(),
            torch.tensor(ks, dtype=torch.int32) if use_k else None,
            torch.tensor(ps) if use_p else None,
        )
    for index, kept in enumerate(kept_tokens(result)):
        k, p = ks[index] if use_k else vocab_size, ps[index] if use_p else 1.0
        expected, margin = naive_top_k_top_p(rows[index], k, p)
        if margin > 1e-5:
            assert kept == expected
        assert torch.equal(result[index][result[index] > NEG_INF], logits[index][result[index] > NEG_INF])
        assert int(logits[index].argmax()) in kept


def test_top_k_alone_equals_top_k_with_top_p_one() -> None:
    torch.manual_seed(1)
    # So far apart that in float32 the best token alone has a mass of 1.
    logits = torch.rand(64, 3000) * 1e5
    k = torch.randint(1, 10, (64,))
    k[torch.rand(64) < 0.5] = 3000
    alone = apply_top_k_top_p_pytorch(logits.clone(), k, None)
    with_p = apply_top_k_top_p_pytorch(logits.clone(), k, torch.tensor([1.0]))
    assert torch.equal(alone, with_p)
    assert [len(kept) for kept in kept_tokens(alone)] == k.tolist()


def test_top_p_keeps_the_token_that_crosses() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    for p, expected in (
        (0.3, {0}),
        (0.5, {0}),
        (0.51, {0, 1}),
        (0.79, {0, 1}),
        (0.81, {0, 1, 2}),
        (1.0, {0, 1, 2, 3}),
    ):
        assert kept_tokens(apply_top_k_top_p_pytorch(probs.log(), None, torch.tensor([p]))) == [expected]


def test_the_best_token_stays_whatever_p_is() -> None:
    probs = torch.tensor([[0.2, 0.5, 0.3]])
    for p in (0.0, 1e-30, 0.1):
        assert kept_tokens(apply_top_k_top_p_pytorch(probs.log(), None, torch.tensor([p]))) == [{1}]


def test_top_p_shares_out_what_top_k_left() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    # Of all: 0.4 + 0.3 = 0.7 reaches 0.55 with two; of the best two (4/7, 3/7) the first reaches it alone.
    assert kept_tokens(apply_top_k_top_p_pytorch(probs.log(), None, torch.tensor([0.55]))) == [{0, 1}]
    assert kept_tokens(apply_top_k_top_p_pytorch(probs.log(), torch.tensor([2]), torch.tensor([0.55]))) == [{0}]


def test_equal_logits_at_the_edge() -> None:
    """Top-k keeps all that equal the k-th; top-p the smallest set, smallest ids first."""
    flat = torch.zeros(1, 400)
    assert kept_tokens(apply_top_k_top_p_pytorch(flat.clone(), torch.tensor([3]), None)) == [set(range(400))]
    assert kept_tokens(apply_top_k_top_p_pytorch(flat.clone(), None, torch.tensor([0.5]))) == [set(range(200))]


def test_forbidden_and_broken_rows_harm_nobody() -> None:
    logits = torch.full((4, 600), NEG_INF)
    logits[0, 5] = 1.0
    logits[2] = torch.linspace(0, 5, 600)
    logits[3] = float("nan")
    result = apply_top_k_top_p_pytorch(logits, torch.tensor([4, 4, 4, 4]), torch.tensor([0.9, 0.9, 1.0, 0.9]))
    assert kept_tokens(result)[:3] == [{5}, set(), {596, 597, 598, 599}]


@pytest.mark.parametrize("scale", [0.1, 2.0, 6.0])
def test_race_among_candidates_equals_the_race_of_all(scale: float) -> None:
    """Noise belongs to token ids: the draw among candidates is that over the masked vocabulary."""
    torch.manual_seed(2)
    batch, vocab_size = 48, 6000
    logits = torch.randn(batch, vocab_size) * scale
    k = torch.randint(1, 400, (batch,), dtype=torch.int32)
    k[::3] = vocab_size
    p = torch.rand(batch) * 0.9 + 0.1
    p[::2] = 1.0
    restricted = make_metadata(batch, vocab_size, top_k=k, top_p=p)
    free = make_metadata(batch, vocab_size)
    masked = apply_top_k_top_p_pytorch(logits.clone(), k, p)
    assert torch.equal(random_sample(logits.clone(), restricted), random_sample(masked, free))


# --- greedy and random ---


def test_greedy_is_the_first_argmax() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 5000).bfloat16().float()
    logits[3, 100] = logits[3, 4000] = 50.0
    expected = [max(range(5000), key=lambda i: (row[i], -i)) for row in logits.tolist()]
    output = Sampler()(logits, make_metadata(7, temperature=torch.zeros(7), **GREEDY))
    assert output.sampled_token_ids.tolist() == [[token] for token in expected]
    assert output.sampled_token_ids.dtype == torch.int64
    assert output.logprobs_tensors is None
    assert expected[3] == 100
    assert torch.equal(argmax(logits), logits.double().argmax(-1))


def test_greedy_does_no_more_than_an_argmax() -> None:
    logits = torch.randn(2, V)
    forbidden = ["folovllm.sample.sampler." + name for name in ("compute_logprobs", "exponential_noise")]
    with (
        mock.patch(forbidden[0], side_effect=AssertionError),
        mock.patch(forbidden[1], side_effect=AssertionError),
    ):
        before = logits.clone()
        Sampler()(logits, make_metadata(2, temperature=None, **GREEDY))
    assert torch.equal(logits, before)


def test_mixed_batch_greedy_rows_are_exact_and_random_rows_as_if_alone() -> None:
    torch.manual_seed(3)
    logits = torch.randn(6, V)
    temperature = torch.tensor([0.0, 1.0, 0.0, 0.7, 1.3, 0.0])
    mixed = Sampler()(logits.clone(), make_metadata(6, temperature=temperature, all_random=False))
    tokens = mixed.sampled_token_ids.flatten()
    for index in range(6):
        if temperature[index] == 0:
            assert tokens[index] == logits[index].argmax()
        else:
            alone = make_metadata(
                1,
                temperature=temperature[index : index + 1],
                seeds=torch.tensor([index]),
                positions=torch.tensor([3]),
            )
            assert Sampler()(logits[index : index + 1].clone(), alone).sampled_token_ids == tokens[index]


def test_large_batches_are_cut_without_effect() -> None:
    torch.manual_seed(4)
    logits = torch.randn(40, 1000)
    whole = random_sample(logits.clone(), make_metadata(40, 1000))
    with mock.patch("folovllm.sample.sampler._CACHED_ELEMENTS", 7000):
        assert torch.equal(random_sample(logits.clone(), make_metadata(40, 1000)), whole)


def test_generators_serve_batches_without_seeds() -> None:
    logits = torch.zeros(3, V)

    def draw(seed: int) -> list[int]:
        generators = {1: torch.Generator().manual_seed(seed)}
        meta = make_metadata(3, seeds=None, positions=None, generators=generators, top_k=torch.tensor([V, V, 20]))
        return Sampler()(logits.clone(), meta).sampled_token_ids.flatten().tolist()

    draws = [draw(5) for _ in range(8)]
    assert len({row[1] for row in draws}) == 1
    assert len({row[0] for row in draws}) > 1
    assert len({draw(seed)[1] for seed in range(8)}) > 1


@pytest.mark.badinput
def test_seeds_without_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="positions"):
        Sampler()(torch.zeros(1, V), make_metadata(1, positions=None))


@pytest.mark.badinput
def test_speculative_decoding_is_refused() -> None:
    with pytest.raises(ValueError, match="predict_bonus_token"):
        Sampler().apply_logits_processors(torch.zeros(1, V), make_metadata(1), predict_bonus_token=True)


# --- masks, bad words, penalties ---


def test_allowed_token_ids_mask_true_is_forbidden() -> None:
    mask = torch.zeros(2, V, dtype=torch.bool)
    mask[1] = True
    mask[1, [4, 9]] = False
    logits = Sampler().apply_logits_processors(torch.zeros(2, V), make_metadata(2, allowed_token_ids_mask=mask), False)
    assert kept_tokens(logits) == [set(range(V)), {4, 9}]


@pytest.mark.parametrize(
    ("output", "words", "expected"),
    [
        ([], [[7]], {7}),
        ([1, 2], [[7], [8]], {7, 8}),
        ([1, 2], [[2, 5]], {5}),
        ([1, 2], [[1, 2, 5]], {5}),
        ([2, 1], [[1, 2, 5]], set()),
        ([2], [[1, 2, 5]], set()),
        ([1, 2, 3], [[1, 2, 5]], set()),
        ([], [[1, 5]], set()),
        ([1, 1], [[1, 1, 1], [1, 2]], {1, 2}),
    ],
)
def test_bad_words(output: list[int], words: list[list[int]], expected: set[int]) -> None:
    logits = apply_bad_words(torch.zeros(2, V), {1: words}, [[1, 2], output])
    assert kept_tokens(logits) == [set(range(V)), set(range(V)) - expected]


def naive_penalties(
    logits: list[float],
    prompt: list[int],
    output: list[int],
    presence: float,
    frequency: float,
    repetition: float,
) -> list[float]:
    result = list(logits)
    for token in range(len(logits)):
        if token in prompt or token in output:
            result[token] = result[token] / repetition if result[token] > 0 else result[token] * repetition
        result[token] -= frequency * output.count(token)
        if token in output:
            result[token] -= presence
    return result


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 5))
def test_penalties_against_the_naive_reference(seed: int, batch: int) -> None:
    r = random.Random(seed)
    vocab_size = 17
    logits = torch.randn(batch, vocab_size, generator=torch.Generator().manual_seed(seed)) * 4
    prompts = [[r.randrange(vocab_size) for _ in range(r.randrange(12))] for _ in range(batch)]
    outputs = [[r.randrange(vocab_size) for _ in range(r.randrange(40))] for _ in range(batch)]
    longest = max(map(len, prompts))
    padded = torch.tensor([row + [vocab_size] * (longest - len(row)) for row in prompts], dtype=torch.int64)
    presence, frequency = ([r.uniform(-2, 2) for _ in range(batch)] for _ in range(2))
    repetition = [r.uniform(0.1, 2) for _ in range(batch)]
    expected = [
        naive_penalties(logits[i].tolist(), prompts[i], outputs[i], presence[i], frequency[i], repetition[i])
        for i in range(batch)
    ]
    result = apply_all_penalties(
        logits.clone(),
        padded.view(batch, longest),
        torch.tensor(presence),
        torch.tensor(frequency),
        torch.tensor(repetition),
        # A placeholder for a token that is not known yet does not count.
        [[*row, -1] for row in outputs],
    )
    torch.testing.assert_close(result, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_no_penalties_leaves_logits_alone() -> None:
    meta = make_metadata(1, frequency_penalties=torch.ones(1), output_token_ids=[[1]])
    logits = torch.zeros(1, V)
    assert Sampler().apply_penalties(logits, meta, meta.output_token_ids) is logits
    assert not logits.any()
    meta.no_penalties = False
    meta.prompt_token_ids = torch.full((1, 1), V)
    assert Sampler().apply_penalties(logits, meta, meta.output_token_ids)[0, 1] == -1


# --- log probabilities ---


@pytest.mark.parametrize("num_logprobs", [0, 1, 5, V, -1])
def test_logprobs_are_those_of_the_raw_logits(num_logprobs: int) -> None:
    torch.manual_seed(5)
    logits = torch.randn(4, V) * 3
    reference = logits.log_softmax(-1)
    mask = torch.zeros(4, V, dtype=torch.bool)
    mask[:, :10] = True
    meta = make_metadata(
        4, max_num_logprobs=num_logprobs, temperature=torch.full((4,), 0.5), allowed_token_ids_mask=mask
    )
    output = Sampler()(logits.clone(), meta)
    assert output.logprobs_tensors is not None
    ids, logprobs, ranks, _ = output.logprobs_tensors
    columns = 1 + (V if num_logprobs == -1 else num_logprobs)
    assert ids.shape == logprobs.shape == (4, columns) and ranks.shape == (4,)
    sampled = output.sampled_token_ids
    assert torch.equal(ids[:, :1], sampled)
    torch.testing.assert_close(logprobs, reference.gather(1, ids))
    for row in range(4):
        better = (reference[row] > reference[row, sampled[row, 0]]).sum().item()
        assert ranks[row] == better + 1
        expected = sorted(range(V), key=lambda i: -reference[row, i].item())[: columns - 1]
        assert ids[row, 1:].tolist() == expected


@pytest.mark.parametrize("vocab_size", [60, 2000])
def test_equally_likely_tokens_are_listed_by_id(vocab_size: int) -> None:
    """So that what a request is shown does not depend on how many others ask for."""
    levels = torch.randint(0, 3, (8, vocab_size), generator=torch.Generator().manual_seed(0)).float()
    # A search that keeps its best so far throws out any of the equals when these come.
    levels[:, -10:] = 9
    ids = gather_logprobs(levels.log_softmax(-1), 15, torch.full((8,), 7)).logprob_token_ids
    best = list(range(vocab_size - 10, vocab_size))
    assert ids[:, 0].tolist() == [7] * 8
    assert ids[:, 1:].tolist() == [best + (row == 2).nonzero().flatten()[:5].tolist() for row in levels]


# --- the whole, alone and in a crowd ---


def random_request(r: random.Random, index: int, vocab_size: int) -> CachedRequestState:
    """A request with a random mixture of everything."""

    def maybe(value: Any, default: Any) -> Any:
        return value if r.random() < 0.35 else default

    tokens = [r.randrange(vocab_size) for _ in range(30)]
    params = SamplingParams(
        temperature=maybe(0.0, r.uniform(0.2, 2.0)),
        top_k=maybe(r.randrange(1, 30), 0),
        top_p=maybe(r.uniform(0.1, 0.99), 1.0),
        min_p=maybe(r.uniform(0.0, 0.3), 0.0),
        seed=r.randrange(2**63),
        presence_penalty=maybe(1.0, 0.0),
        frequency_penalty=maybe(0.5, 0.0),
        repetition_penalty=maybe(1.3, 1.0),
        logprobs=maybe(r.randrange(4), None),
        min_tokens=maybe(10, 0),
        stop_token_ids=[1, 2],
        logit_bias=maybe({3: 2.0, 5: -3.0}, None),
        allowed_token_ids=maybe(list(range(0, vocab_size, 2)), None),
    )
    params.bad_words_token_ids = maybe([[4], [tokens[-1], 6]], None)
    prompt, output = tokens[: r.randrange(1, 20)], tokens[20 : 20 + r.randrange(10)]
    return CachedRequestState(f"r{index}", prompt, params, ([0],), None, 0, output)


def sample_batch(requests: list[CachedRequestState], logits: torch.Tensor) -> tuple[list[int], list[Any]]:
    """Return the tokens and, for requests that want them, the log probabilities (token ids, values, rank)."""
    batch = InputBatch(len(requests), 64, 64, "cpu", logits.shape[1], [64])
    for request in requests:
        batch.add_request(request)
    batch.refresh_metadata()
    batch.sampling_metadata.positions = torch.from_numpy(batch.num_tokens.astype("int64"))
    output = Sampler()(logits.clone(), batch.sampling_metadata)
    logprobs: list[Any] = [None] * len(requests)
    for index, request in enumerate(requests):
        k = request.sampling_params.logprobs
        if k is not None:
            ids, values, ranks, _ = output.logprobs_tensors or ()
            logprobs[index] = (
                ids[index, : k + 1].tolist(),
                values[index, : k + 1].tolist(),
                int(ranks[index]),
            )
    return output.sampled_token_ids.flatten().tolist(), logprobs


@pytest.mark.parametrize("seed", range(12))
def test_a_request_draws_the_same_tokens_alone_and_in_any_crowd(seed: int) -> None:
    r = random.Random(seed)
    vocab_size = 900
    requests = [random_request(r, index, vocab_size) for index in range(14)]
    # Rounded like bfloat16 logits: full of equals.
    logits = torch.randn(14, vocab_size, generator=torch.Generator().manual_seed(seed)).mul(3).bfloat16().float()
    crowd = sample_batch(requests, logits)
    order = list(range(14))
    r.shuffle(order)
    part = order[: r.randrange(2, 14)]
    shuffled = sample_batch([requests[i] for i in part], logits[part])
    assert shuffled == ([crowd[0][i] for i in part], [crowd[1][i] for i in part])
    for index in range(14):
        assert sample_batch([requests[index]], logits[[index]]) == ([crowd[0][index]], [crowd[1][index]])


@pytest.mark.parametrize("seed", range(6))
def test_the_whole_against_a_plain_reference(seed: int) -> None:
    """What may be drawn at all, request by request, written down step by step."""
    r = random.Random(100 + seed)
    requests = [random_request(r, index, V) for index in range(20)]
    logits = torch.randn(20, V, generator=torch.Generator().manual_seed(seed)) * 2
    tokens, _ = sample_batch(requests, logits)
    for index, request in enumerate(requests):
        params, output = request.sampling_params, request.output_token_ids
        row = logits[index].tolist()
        if params.allowed_token_ids:
            row = [x if i in params.allowed_token_ids else NEG_INF for i, x in enumerate(row)]
        for word in params.bad_words_token_ids or []:
            if len(word) == 1 or output[-1:] == word[:-1]:
                row[word[-1]] = NEG_INF
        if len(output) < params.min_tokens:
            row[1] = row[2] = NEG_INF
        for token, bias in (params.logit_bias or {}).items():
            row[token] += bias
        penalties = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
        row = naive_penalties(row, request.prompt_token_ids, output, *penalties)
        if params.temperature == 0:
            assert tokens[index] == max(range(V), key=lambda i: (row[i], -i))
            continue
        row = [x / params.temperature for x in row]
        if params.min_p:
            row = [x if x >= max(row) + math.log(params.min_p) - 1e-6 else NEG_INF for x in row]
        kept, _ = naive_top_k_top_p(row, params.top_k or V, min(1.0, params.top_p + 1e-6))
        assert tokens[index] in kept and row[tokens[index]] > NEG_INF
