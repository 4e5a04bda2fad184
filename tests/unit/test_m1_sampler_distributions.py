"""The noise is a good hash, and draws follow the distribution they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from folovllm.sample import rng
from folovllm.sample.logits_processor import BatchRow, build_logitsprocs
from folovllm.sample.metadata import SamplingMetadata
from folovllm.sample.rng import exponential_noise, random_bits, uniform_noise
from folovllm.sample.sampler import Sampler
from folovllm.sampling_params import SamplingParams

V = 32
DRAWS = 24_000
P_MIN = 1e-4
MASK32, MASK64 = 2**32 - 1, 2**64 - 1


def naive_bits(seed: int, position: int, token_id: int) -> int:
    """The hash of rng.py in unbounded integers."""
    z = (seed * 0x9E3779B97F4A7C15 + position * 0xD6E8FEB86659FD93) & MASK64
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * multiplier) & MASK64
    z ^= z >> 31
    x = (token_id * 0x9E3779B9 + (z & MASK32)) & MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D + (z >> 32)) & MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK32
    # The last shift carries the sign along, as an arithmetic one does; the sign itself is dropped.
    sign = 0xFFFF0000 if x >> 31 else 0
    return (x ^ ((x >> 16) | sign)) & 0x7FFFFFFF


def noise(seeds: list[int], positions: list[int], size: int) -> np.ndarray:
    return uniform_noise(torch.tensor(seeds), torch.tensor(positions), size, "cpu").numpy()


def test_bits_equal_the_naive_hash() -> None:
    # Lengths that leave a tail behind every vector width, and extreme values: products must wrap around.
    token_ids = [0, 1, 2, 31, 32, 49151, 151935, 2**31 - 1, 7, 8, 9]
    rows = [(0, 0), (1, 0), (0, 1), (2**63 - 1, 131071), (-1, 5), (-(2**63), 2**31), (1234567890123, 77)]
    seeds, positions = (torch.tensor(column) for column in zip(*rows, strict=True))
    for length in range(1, len(token_ids) + 1):
        bits = random_bits(seeds, positions, torch.tensor([token_ids[:length]]))
        expected = [[naive_bits(s, p, t) for t in token_ids[:length]] for s, p in rows]
        assert bits.tolist() == expected


def test_noise_is_independent_of_the_batch_and_of_the_columns_asked_for() -> None:
    seeds, positions = torch.tensor([5, 9, 2**62]), torch.tensor([0, 17, 4])
    whole = uniform_noise(seeds, positions, 1000, "cpu")
    assert torch.equal(uniform_noise(seeds[1:2], positions[1:2], 1000, "cpu")[0], whole[1])
    ids = torch.tensor([[999, 0, 5], [3, 3, 2], [1, 2, 3]])
    assert torch.equal(uniform_noise(seeds, positions, 1000, "cpu", ids), whole.gather(1, ids))


@pytest.mark.parametrize("axis", ["token", "position", "seed", "seed spaced by 2**32"])
def test_noise_is_uniform_along_every_axis(axis: str) -> None:
    count = range(40_000)
    values = {
        "token": lambda: noise([7], [3], 40_000),
        "position": lambda: noise([7] * 40_000, list(count), 1),
        "seed": lambda: noise(list(count), [3] * 40_000, 1),
        "seed spaced by 2**32": lambda: noise([i << 32 for i in count], [3] * 40_000, 1),
    }[axis]().ravel()
    assert stats.kstest(values, "uniform").pvalue > P_MIN
    low_bits = (values.astype(np.float64) * 2**20 % 1 * 16).astype(int)
    assert stats.chisquare(np.bincount(low_bits, minlength=16)).pvalue > P_MIN


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, -1), (1, 1), (2, -1), (1 << 32, 0), (1 << 62, 0)])
def test_neighbouring_rows_are_uncorrelated(step: tuple[int, int]) -> None:
    """Shifts of seed and position, the same token or its neighbours: no linear and no other dependence."""
    size = 40_000
    a = noise([1000], [50], size)[0]
    b = noise([1000 + step[0]], [50 + step[1]], size)[0]
    for shift in (0, 1, -1, 2):
        other = np.roll(b, shift)
        assert abs(np.corrcoef(a, other)[0, 1]) < 4.5 / size**0.5
        cells = (a * 16).astype(int) * 16 + (other * 16).astype(int)
        assert stats.chisquare(np.bincount(cells, minlength=256)).pvalue > P_MIN


def test_tokens_of_a_row_are_uncorrelated() -> None:
    values = noise([4], [4], 80_000)[0]
    for lag in (1, 2, 3, 16, 256, 4096):
        cells = (values[:-lag] * 16).astype(int) * 16 + (values[lag:] * 16).astype(int)
        assert stats.chisquare(np.bincount(cells, minlength=256)).pvalue > P_MIN


def test_no_two_rows_of_a_grid_share_their_keys() -> None:
    seeds = torch.arange(300).repeat_interleave(2000)
    positions = torch.arange(2000).repeat(300)
    keys = rng._keys(seeds, positions).view(torch.int64)
    assert keys.unique().numel() == 300 * 2000
    # Neither key alone is weak: about n**2 / 2**33 = 42 pairs collide by chance.
    for column in rng._keys(seeds, positions).unbind(1):
        assert 600_000 - column.unique().numel() < 100


def test_noise_never_reaches_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 or infinity would make a forbidden token's score equal to an allowed one's."""
    extremes = torch.tensor([[0, 1, 2**31 - 1]], dtype=torch.int32)
    monkeypatch.setattr(rng, "random_bits", lambda *_: extremes)
    row = torch.zeros(1, dtype=torch.int64)
    uniform = uniform_noise(row, row, 3, "cpu")
    assert 0 < uniform[0, 0] < uniform[0, 1] < 2**-30
    assert uniform[0, 2] < 1
    exponential = exponential_noise(row, row, 3, "cpu")
    assert exponential.log().isfinite().all()
    assert exponential[0, 0].item() == pytest.approx(2**-32, rel=1e-6)


def test_exponential_noise_has_its_distribution() -> None:
    values = exponential_noise(torch.tensor([1]), torch.tensor([2]), 40_000, "cpu")[0].numpy()
    assert stats.kstest(values, "expon").pvalue > P_MIN


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_noise_is_the_same_on_cuda() -> None:
    seeds = torch.tensor([0, 1, 2**63 - 1, 12345])
    positions = torch.tensor([0, 1, 131071, 7])
    on_cpu = uniform_noise(seeds, positions, 151_936, "cpu")
    assert torch.equal(uniform_noise(seeds.cuda(), positions.cuda(), 151_936, "cuda").cpu(), on_cpu)
    a = exponential_noise(seeds, positions, 151_936, "cpu")
    b = exponential_noise(seeds.cuda(), positions.cuda(), 151_936, "cuda").cpu()
    torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


def metadata(
    temperature: float, top_k: int, top_p: float, min_p: float, seeds: torch.Tensor, positions: torch.Tensor
) -> SamplingMetadata:
    batch = seeds.shape[0]
    processors = build_logitsprocs(V, "cpu")
    params = SamplingParams(min_p=min_p)
    if min_p:
        processors.update_state([BatchRow(i, params, [], []) for i in range(batch)])
    zeros = torch.zeros(batch)
    return SamplingMetadata(
        temperature=torch.full((batch,), temperature),
        all_greedy=False,
        all_random=True,
        top_p=torch.full((batch,), top_p) if top_p < 1 else None,
        top_k=torch.full((batch,), top_k, dtype=torch.int32) if top_k else None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=zeros,
        presence_penalties=zeros,
        repetition_penalties=zeros + 1,
        output_token_ids=[[] for _ in range(batch)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=processors,
        seeds=seeds,
        positions=positions,
    )


def analytic(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The distribution a draw should have, in float64 and plain steps."""
    probs = np.exp(logits / temperature - (logits / temperature).max())
    probs /= probs.sum()
    probs[probs < min_p * probs.max()] = 0
    order = np.argsort(-probs, kind="stable")
    if top_k:
        probs[order[top_k:]] = 0
    probs /= probs.sum()
    before = 0.0
    for token_id in order:
        mass = probs[token_id]
        if before >= top_p:
            probs[token_id] = 0
        before += mass
    return probs / probs.sum()


CASES = {
    "temperature 1": (1.0, 0, 1.0, 0.0),
    "temperature 0.5": (0.5, 0, 1.0, 0.0),
    "temperature 2": (2.0, 0, 1.0, 0.0),
    "top-k 5": (1.0, 5, 1.0, 0.0),
    "top-p 0.8": (1.0, 0, 0.8, 0.0),
    "min-p 0.2": (1.0, 0, 1.0, 0.2),
    "top-k 12, top-p 0.7": (1.5, 12, 0.7, 0.0),
    "all": (1.2, 10, 0.9, 0.05),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("axis", ["seeds", "positions"])
def test_draws_follow_the_analytic_distribution(case: str, axis: str) -> None:
    logits = np.random.default_rng(3).normal(scale=0.8, size=V).astype(np.float32)
    expected = analytic(logits.astype(np.float64), *CASES[case])
    steps = torch.arange(DRAWS)
    seeds, positions = (steps, steps * 0 + 11) if axis == "seeds" else (steps * 0 + 2024, steps)
    batch = torch.from_numpy(logits).repeat(DRAWS, 1)
    tokens = Sampler()(batch, metadata(*CASES[case], seeds, positions)).sampled_token_ids.flatten()
    counts = np.bincount(tokens.numpy(), minlength=V)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert kept.sum() == V if case.startswith("temperature") else 4 <= kept.sum() < V
    assert stats.chisquare(counts[kept], expected[kept] * DRAWS).pvalue > P_MIN


def test_draws_without_seeds_follow_the_distribution_too() -> None:
    torch.manual_seed(0)
    logits = torch.randn(V)
    meta = metadata(1.0, 0, 1.0, 0.0, torch.zeros(DRAWS, dtype=torch.int64), torch.zeros(0))
    meta.seeds = None
    meta.generators = {0: torch.Generator().manual_seed(1)}
    tokens = Sampler()(logits.repeat(DRAWS, 1), meta).sampled_token_ids.flatten()
    counts = np.bincount(tokens.numpy(), minlength=V)
    assert stats.chisquare(counts, logits.softmax(-1).double().numpy() * DRAWS, sum_check=False).pvalue > P_MIN


def test_consecutive_draws_of_a_request_are_independent() -> None:
    steps = torch.arange(DRAWS)
    logits = torch.zeros(DRAWS, V)
    tokens = Sampler()(logits, metadata(1.0, 0, 1.0, 0.0, steps * 0 + 1, steps)).sampled_token_ids.flatten()
    pairs = (tokens[:-1] % 16) * 16 + tokens[1:] % 16
    assert stats.chisquare(np.bincount(pairs.numpy(), minlength=256)).pvalue > P_MIN
