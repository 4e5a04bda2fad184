"""Sampling on the device draws what Sampler draws: the same integers, the same winners, the same restrictions.

Without CUDA the kernels run through Triton's interpreter, with a tiny vocabulary and tiles to match.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from folovllm.sample import rng  # noqa: E402
from folovllm.sample.ops import fused_sampler, triton_sampler  # noqa: E402
from folovllm.sample.ops.topk_topp import apply_top_k_top_p_pytorch  # noqa: E402
from folovllm.sampling_params import SamplingParams  # noqa: E402
from tests.triton_interpreter import index_scalars  # noqa: E402
from tests.unit.test_m1_sampler import GREEDY, make_metadata  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
NEG_INF = float("-inf")
V = 1000
SMALL: dict[str, Any] = {"block": 128, "num_splits": 3, "row_block": 128, "cap": 64}
"""Several tiles and splits even in a tiny vocabulary, and lists that overflow."""
LARGE: dict[str, Any] = {"block": 256, "row_block": 1024, "cap": 1024}
REPEATS = 20 if CUDA else 1
"""The interpreter takes some 50 ms a row."""


@pytest.fixture(autouse=True)
def interpreter_indexes_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    if not CUDA:
        index_scalars(monkeypatch.setattr)


def rows(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeds of any sign and size, and positions."""
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), device=DEVICE)
    return seeds, torch.randint(0, 40000, (batch,), device=DEVICE)


def tensor(values: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def both(
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    k: torch.Tensor | None = None,
    p: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the kernels' tokens, the twin's) for fresh seeds and positions."""
    seeds, positions = rows(logits.shape[0])
    given = logits.clone()
    out = torch.full((logits.shape[0],), -1, dtype=torch.int64, device=DEVICE)
    ours = triton_sampler.sample_tokens(logits, temperature, k, p, seeds, positions, out, **(options or SMALL))
    assert ours is out
    assert torch.equal(logits, given)
    return ours, fused_sampler.sample_tokens_torch(logits, temperature, k, p, seeds, positions)


def test_the_integers_are_rng_s() -> None:
    seeds = tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789], torch.int64)
    positions = tensor([0, 1, 2**31, 5, 7, 2**40], torch.int64)
    ids = torch.arange(V, device=DEVICE).unsqueeze(0)
    assert torch.equal(triton_sampler.random_bits(seeds, positions, V), rng.random_bits(seeds, positions, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.1, 2.0, 20.0])
def test_draws_are_the_samplers(spread: float, dtype: torch.dtype) -> None:
    repeats = 12 * REPEATS
    logits = (spread * torch.randn(4, V, device=DEVICE)).to(dtype).repeat(repeats, 1)
    ours, expected = both(logits, tensor([0.01, 0.6, 1.0, 5.0]).repeat(repeats))
    assert torch.equal(ours, expected)
    assert len(set(ours.tolist())) >= 4 or spread > 10


def test_many_draws_of_few_tokens_are_the_samplers() -> None:
    draws = 20000 if CUDA else 300
    logits = torch.randn(1, 40, device=DEVICE).repeat(draws, 1)
    ours, expected = both(logits, torch.ones(draws, device=DEVICE), block=64)
    assert torch.equal(ours, expected)
    # And they are draws: every token's count within five standard deviations.
    probs = logits[0].softmax(dim=-1)
    counts = torch.bincount(ours, minlength=40)
    assert ((counts - draws * probs).abs() <= 5 * (draws * probs).sqrt() + 1).all()


def test_greedy_and_random_rows_in_one_batch() -> None:
    logits = torch.randn(6, V, device=DEVICE)
    temperature = tensor([0.0, 1.0, 0.0, 0.5, 1e-6, 2.0])
    ours, expected = both(logits, temperature)
    assert torch.equal(ours, expected)
    assert torch.equal(ours[[0, 2, 4]], logits.argmax(dim=-1)[[0, 2, 4]])


@pytest.mark.parametrize("with_temperature", [True, False])
def test_greedy_takes_the_first_of_equals(with_temperature: bool) -> None:
    logits = torch.full((5, V), -3.0, device=DEVICE)
    for row, ids in enumerate([(0, 999), (127, 128), (500, 501, 900), (999,)]):
        logits[row, list(ids)] = 7.0
    temperature = torch.zeros(5, device=DEVICE) if with_temperature else None
    ours, _ = both(logits, temperature)
    assert ours.tolist() == [0, 127, 500, 999, 0]
    assert both(logits, temperature, tensor([1, 5, V, 2, 3], torch.int32), tensor([0.1, 1, 1, 1, 1]))[0].tolist() == (
        ours.tolist()
    )


def test_no_rows_and_tiny_vocabularies() -> None:
    assert both(torch.empty(0, V, device=DEVICE), torch.ones(0, device=DEVICE))[0].shape == (0,)
    for vocab_size in (1, 2, 17):
        logits = torch.randn(4, vocab_size, device=DEVICE)
        ours, expected = both(logits, torch.ones(4, device=DEVICE), tensor([1, 1, 2, 20]), tensor([1, 0.5, 0.9, 0.2]))
        assert torch.equal(ours, expected)


K_VALUES = [1, 2, 5, 31, 32, 33, 64, 100, 500, 999, V, V]
P_VALUES = [1.0, 0.9, 0.5, 0.1, 0.99, 0.3, 1e-6, 0.7, 0.95, 0.2, 0.8, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("restriction", ["k", "p", "k and p"])
def test_restricted_draws_are_the_samplers(restriction: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    repeats = REPEATS
    k = tensor(K_VALUES * repeats, torch.int32) if "k" in restriction else None
    p = tensor(P_VALUES * repeats) if "p" in restriction else None
    batch = len(K_VALUES) * repeats
    for spread in (1.0, 4.0) if CUDA else (2.0,):
        logits = (spread * torch.randn(batch, V, device=DEVICE)).to(dtype)
        temperature = torch.rand(batch, device=DEVICE) + 0.3
        temperature[5] = 0.0
        ours, expected = both(logits, temperature, k, p, **options)
        assert torch.equal(ours, expected)


def allowed_tokens(logits: torch.Tensor, k: int, p: float) -> set[int]:
    """Token ids that top-k, then top-p, leave of one row."""
    kept = apply_top_k_top_p_pytorch(logits.clone().unsqueeze(0), tensor([k]), tensor([p]))
    return set((kept[0] > NEG_INF).nonzero().flatten().tolist())


@pytest.mark.parametrize("options", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(("k", "p"), [(10, 1.0), (V, 0.33), (10, 0.33), (10, 0.999), (400, 0.05)])
def test_equals_at_the_edge(k: int, p: float, options: dict[str, Any]) -> None:
    """Five distinct logits, so both edges fall among equals: top-k keeps all of them, top-p those of lowest id."""
    row = torch.randint(0, 5, (V,), device=DEVICE).float() / 4
    allowed = allowed_tokens(row, k, p)
    batch = 6 * REPEATS
    ours, expected = both(
        row.repeat(batch, 1),
        torch.ones(batch, device=DEVICE),
        tensor([k] * batch, torch.int32),
        tensor([p] * batch),
        **options,
    )
    assert torch.equal(ours, expected)
    assert set(ours.tolist()) <= allowed < set(range(V))


def test_top_k_of_one_and_the_tiniest_top_p_are_greedy() -> None:
    logits = torch.randn(6, V, device=DEVICE)
    logits[3, [17, 800]] = 9.0
    ones = torch.ones(6, device=DEVICE)
    best = logits.argmax(dim=-1)
    assert torch.equal(both(logits, ones, None, 1e-12 * ones)[0], best)
    assert torch.equal(
        both(logits, ones, torch.ones_like(ones, dtype=torch.int32), None)[0][[0, 1, 2, 4]], best[[0, 1, 2, 4]]
    )
    k_and_p = both(logits, ones, torch.ones_like(ones, dtype=torch.int32), 1e-12 * ones)[0]
    assert torch.equal(k_and_p, best)


@pytest.mark.parametrize("options", [SMALL, LARGE], ids=["small", "large"])
def test_forbidden_tokens_are_never_drawn(options: dict[str, Any]) -> None:
    logits = torch.full((6, V), NEG_INF, device=DEVICE)
    logits[:, 300:307] = torch.randn(6, 7, device=DEVICE)
    temperature = torch.ones(6, device=DEVICE)
    for k, p in ((None, None), (None, 0.9), (20, 0.9), (600, 0.9), (3, None)):
        ours, expected = both(
            logits,
            temperature,
            None if k is None else tensor([k] * 6, torch.int32),
            None if p is None else tensor([p] * 6),
            **options,
        )
        assert torch.equal(ours, expected)
        assert ((ours >= 300) & (ours < 307)).all()


def test_sorted_logits_overflow_the_list_and_still_draw_right() -> None:
    """The best tokens all fall into few lanes' tiles, where best-of-lane bounds are at their worst."""
    logits = torch.arange(V, device=DEVICE).float().div(100).repeat(12, 1)
    k = tensor([20, 30, 40, 60] * 3, torch.int32)
    ours, expected = both(logits, torch.full((12,), 2.0, device=DEVICE), k, tensor([1.0, 0.6, 0.9] * 4), **SMALL)
    assert torch.equal(ours, expected)


def test_a_row_draws_the_same_alone_and_in_a_crowd() -> None:
    logits = torch.randn(9, V, device=DEVICE)
    seeds, positions = rows(9)
    temperature = torch.full((9,), 0.7, device=DEVICE)
    k, p = tensor([40] * 9, torch.int32), tensor([0.8] * 9)
    crowd = triton_sampler.sample_tokens(logits, temperature, k, p, seeds, positions, **SMALL)
    for i in range(9):
        one = slice(i, i + 1)
        alone = triton_sampler.sample_tokens(
            logits[one], temperature[one], k[one], p[one], seeds[one], positions[one], **{**SMALL, "num_splits": 8}
        )
        assert alone.item() == crowd[i]


# --- which batches may be drawn on the device ---


def test_plain_batches_can_be_drawn_on_the_device() -> None:
    assert fused_sampler.can_sample_on_device(make_metadata(2))
    assert fused_sampler.can_sample_on_device(make_metadata(2, top_k=torch.tensor([3, 4]), top_p=torch.ones(2)))
    assert fused_sampler.can_sample_on_device(make_metadata(2, seeds=None, temperature=None, **GREEDY))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_logprobs": 0},
        {"no_penalties": False},
        {"allowed_token_ids_mask": torch.zeros(2, 50, dtype=torch.bool)},
        {"bad_words_token_ids": {1: [[3]]}},
        {"seeds": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_batches_with_more_to_do_cannot(changes: dict[str, Any]) -> None:
    assert not fused_sampler.can_sample_on_device(make_metadata(2, **changes))


@pytest.mark.parametrize(
    "params", [{"min_p": 0.1}, {"logit_bias": {3: 1.0}}, {"min_tokens": 3, "stop_token_ids": [4]}], ids=str
)
def test_logits_processors_with_rows_keep_a_batch_off_the_device(params: dict[str, Any]) -> None:
    from folovllm.sample.logits_processor import BatchRow, build_logitsprocs

    processors = build_logitsprocs(50, "cpu")
    metadata = make_metadata(2, logitsprocs=processors)
    processors.update_state([BatchRow(0, SamplingParams(), [1], [])])
    assert fused_sampler.can_sample_on_device(metadata)
    processors.update_state([BatchRow(0, SamplingParams(**params), [1], [])])
    assert not fused_sampler.can_sample_on_device(metadata)


def test_the_dispatch_reaches_the_sampler() -> None:
    logits = torch.randn(3, V, device=DEVICE)
    seeds, positions = rows(3)
    args = (logits, tensor([0.0, 1.0, 0.4]), None, tensor([1.0, 0.9, 0.5]), seeds, positions)
    out = torch.empty(3, dtype=torch.int64, device=DEVICE)
    assert fused_sampler.sample_tokens(*args, out) is out
    assert torch.equal(out, fused_sampler.sample_tokens_torch(*args))


# --- on the device, at a model's size ---


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("k", "p"), [(None, None), (50, None), (None, 0.9), (20, 0.95), (2000, 0.5), (None, 0.01), (700, None)]
)
def test_a_model_s_vocabulary(k: int | None, p: float | None, dtype: torch.dtype, pdl: bool) -> None:
    """Tokens may differ from the twin's only where a cumulative sum of 100,000 terms rounds to the other side of p."""
    batch, vocab_size = 64, 151936
    same = total = 0
    for spread in (1.0, 3.0):
        logits = (spread * torch.randn(batch, vocab_size, device=DEVICE)).to(dtype)
        temperature = torch.full((batch,), 0.7, device=DEVICE)
        ks = None if k is None else tensor([k] * batch, torch.int32)
        ps = None if p is None else tensor([p] * batch)
        ours, expected = both(logits, temperature, ks, ps, pdl=pdl)
        same += int((ours == expected).sum())
        total += batch
    assert same >= (total if p is None else total - 2)


@pytest.mark.gpu
def test_a_captured_launch_replays_for_other_logits() -> None:
    logits = torch.randn(16, 151936, device=DEVICE)
    seeds, positions = rows(16)
    temperature, k, p = tensor([0.8] * 16), tensor([50] * 16, torch.int32), tensor([0.9] * 16)
    out = torch.empty(16, dtype=torch.int64, device=DEVICE)
    args = (logits, temperature, k, p, seeds, positions, out)
    fused_sampler.sample_tokens(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_sampler.sample_tokens(*args)
    for changed in (151936, 5):
        logits.normal_()
        positions.add_(1)
        k.fill_(changed)
        graph.replay()
        assert int((out == fused_sampler.sample_tokens_torch(*args[:-1])).sum()) >= 15
