"""GPTQ on one matrix: against its definition with explicit inverses, against rounding to nearest, and by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from folovllm.quantize import gptq
from folovllm.quantize.gptq import (
    Grid,
    QuantizedMatrix,
    inverse_factor,
    quantize_matrix,
    relative_error,
    round_to_nearest,
)
from folovllm.quantize.spec import QuantizationSpec


def correlated_inputs(num_tokens: int, num_channels: int, seed: int = 0) -> torch.Tensor:
    """Activations [num_tokens, num_channels] as layers have them: channels that go together, a few of them large."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_channels // 4, num_channels, generator=generator)
    noise = torch.randn(num_tokens, num_channels, generator=generator)
    x = torch.randn(num_tokens, num_channels // 4, generator=generator) @ mix + 0.3 * noise
    x[:, torch.randperm(num_channels, generator=generator)[:3]] *= 10
    return x


def problem(num_channels: int = 256, num_outputs: int = 48, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] and the Hessian [K, K] of correlated inputs."""
    x = correlated_inputs(4 * num_channels, num_channels, seed)
    weight = torch.randn(num_outputs, num_channels, generator=torch.Generator().manual_seed(seed + 1))
    return weight, x.t() @ x / len(x)


def every_spec() -> list[QuantizationSpec]:
    return [
        QuantizationSpec(bits=bits, group_size=group_size, sym=sym, desc_act=desc_act)
        for bits in (4, 8)
        for group_size in (-1, 32, 64, 128)
        for sym in (True, False)
        for desc_act in (True, False)
    ]


def name_of(spec: QuantizationSpec) -> str:
    return f"{spec.bits}-{spec.group_size}-{'sym' if spec.sym else 'asym'}{'-act' if spec.desc_act else ''}"


# What GPTQ is for


@pytest.mark.parametrize("spec", every_spec(), ids=name_of)
def test_error_is_at_most_0_6_of_round_to_nearest(spec: QuantizationSpec) -> None:
    weight, hessian = problem()
    plain = QuantizationSpec(bits=spec.bits, group_size=spec.group_size, sym=spec.sym)
    nearest = relative_error(weight, round_to_nearest(weight, plain), hessian)
    assert relative_error(weight, quantize_matrix(weight, hessian, spec), hessian) <= 0.6 * nearest


def test_act_order_helps_where_few_channels_are_large() -> None:
    weight, hessian = problem()
    plain, ordered = (QuantizationSpec(group_size=32, desc_act=desc_act) for desc_act in (False, True))
    errors = [relative_error(weight, quantize_matrix(weight, hessian, spec), hessian) for spec in (plain, ordered)]
    assert errors[1] < errors[0]


def test_relative_error_is_that_of_the_outputs() -> None:
    x = correlated_inputs(512, 64)
    weight = torch.randn(16, 64)
    matrix = round_to_nearest(weight, QuantizationSpec(group_size=32))
    outputs, changed = x @ weight.t(), x @ matrix.dequantize().t()
    expected = float((outputs - changed).square().sum() / outputs.square().sum())
    assert relative_error(weight, matrix, x.t() @ x) == pytest.approx(expected, rel=1e-4)


# Its definition


def by_definition(weight: torch.Tensor, hessian: torch.Tensor, spec: QuantizationSpec) -> torch.Tensor:
    """The integers [K, N] of OBQ in a fixed order, in float64, with an inverse of what is left at every step."""
    rows = weight.t().double().clone()
    num_channels = len(rows)
    size = num_channels if spec.group_size == -1 else spec.group_size
    damped = hessian.double() + spec.damp_percent * hessian.double().diagonal().mean() * torch.eye(num_channels)
    values = torch.empty_like(rows)
    # A channel's cost once the later ones are free to change: 1 / [H_rest^-1]_kk.
    cost = torch.stack([1 / torch.linalg.inv(damped[k:, k:])[0, 0] for k in range(num_channels)])
    grid: Grid | None = None
    for k in range(num_channels):
        if k % size == 0:
            grid = Grid(rows[k : k + size].float(), spec, cost[k : k + size].float())
        assert grid is not None
        values[k] = grid.quantize(rows[k].float())
        lost = rows[k] - grid.dequantize(values[k].float())
        inverse = torch.linalg.inv(damped[k:, k:])
        rows[k:] -= torch.outer(inverse[0] / inverse[0, 0], lost)
    return values


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("block", [32, 128])
def test_integers_are_those_of_the_definition(
    sym: bool, group_size: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks, lazy updates and the factor instead of inverses change nothing but the rounding of float32."""
    if group_size > block:
        pytest.skip("a group lies within a block")
    monkeypatch.setattr(gptq, "BLOCK", block)
    weight, hessian = problem(192, 24)
    spec = QuantizationSpec(group_size=group_size, sym=sym)
    matrix = quantize_matrix(weight, hessian, spec)
    different = (matrix.values != by_definition(weight, hessian, spec)).float().mean()
    assert different < 0.01, "close calls may go either way"


def test_two_channels_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both weights 0.4 on a grid of whole numbers; H = [[1, .5], [.5, 1]].

    The first becomes 0, too small by 0.4. The best the second can do about it is to grow by H01 / H11 * 0.4 = 0.2, and
    0.6 becomes 1. Loss, e H e with e = w - q: 0.28; both rounded to nearest: 0.48.
    """

    class WholeNumbers(Grid):
        def __init__(self, rows: torch.Tensor, spec: QuantizationSpec, importance: torch.Tensor | None = None) -> None:
            self.scale, self.zero, self.max_value = torch.ones(1), torch.full((1,), 8.0), spec.max_value

    monkeypatch.setattr(gptq, "Grid", WholeNumbers)
    weight, hessian = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    spec = QuantizationSpec(group_size=-1, damp_percent=1e-6)
    matrix = quantize_matrix(weight, hessian, spec)
    assert matrix.values.tolist() == [[8], [9]]
    assert matrix.dequantize().tolist() == [[0.0, 1.0]]
    energy = float(weight @ hessian @ weight.t())
    assert relative_error(weight, matrix, hessian) * energy == pytest.approx(0.28)
    nearest = round_to_nearest(weight, spec)
    assert nearest.dequantize().tolist() == [[0.0, 0.0]]
    assert relative_error(weight, nearest, hessian) * energy == pytest.approx(0.48)


def test_factor_is_that_of_the_damped_inverse() -> None:
    _, hessian = problem(96)
    factor = inverse_factor(hessian, 0.05).double()
    damped = hessian.double() + 0.05 * hessian.double().diagonal().mean() * torch.eye(96)
    assert torch.equal(factor, factor.triu())
    assert (factor.t() @ factor @ damped - torch.eye(96)).abs().max() < 1e-3


def test_fused_outputs_are_quantized_like_each_alone() -> None:
    weight, hessian = problem(128, 40)
    spec = QuantizationSpec(group_size=32, desc_act=True)
    whole, part = quantize_matrix(weight, hessian, spec), quantize_matrix(weight[8:24], hessian, spec)
    assert torch.equal(whole.g_idx, part.g_idx)
    assert (whole.values[:, 8:24] != part.values).float().mean() < 0.005


# What comes out


@pytest.mark.parametrize("spec", every_spec(), ids=name_of)
@pytest.mark.parametrize("nearest", [True, False])
def test_result_can_be_stored(spec: QuantizationSpec, nearest: bool) -> None:
    weight, hessian = problem(128, 16)
    weight[0] = weight[0].abs()  # an asymmetric zero point would be 0
    weight[1] = -weight[1].abs()
    weight[2] = 0
    matrix = round_to_nearest(weight, spec) if nearest else quantize_matrix(weight, hessian, spec)
    num_groups = 1 if spec.group_size == -1 else 128 // spec.group_size
    assert matrix.values.shape == (128, 16) and matrix.values.dtype == torch.uint8
    assert matrix.scales.shape == matrix.zeros.shape == (num_groups, 16)
    assert int(matrix.values.max()) <= spec.max_value
    assert int(matrix.zeros.min()) >= 1 and int(matrix.zeros.max()) <= spec.max_value
    if spec.sym:
        assert matrix.zeros.unique().tolist() == [2 ** (spec.bits - 1)]
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(matrix.scales.to(dtype).float(), matrix.scales), "models in 16 bits use the same scales"
    assert matrix.dequantize()[2].eq(0).all()
    tolerance = (0.2 if spec.bits == 4 else 0.02) if nearest else (2.0 if spec.bits == 4 else 0.2)
    assert (matrix.dequantize() - weight).abs().max() < tolerance * weight.abs().max()


def test_act_order_puts_the_largest_channels_into_the_first_group() -> None:
    weight, hessian = problem(128, 8)
    matrix = quantize_matrix(weight, hessian, QuantizationSpec(group_size=32, desc_act=True))
    assert matrix.g_idx.bincount().tolist() == [32] * 4
    order = torch.argsort(hessian.diagonal(), descending=True)
    assert set(order[:32].tolist()) == set((matrix.g_idx == 0).nonzero().flatten().tolist())
    plain = quantize_matrix(weight, hessian, QuantizationSpec(group_size=32))
    assert plain.g_idx.tolist() == [k // 32 for k in range(128)]


def test_narrower_grids_are_taken_where_they_lose_less() -> None:
    rows = torch.cat([torch.linspace(-1, 1, 63), torch.tensor([4.0])])[:, None]
    spec = QuantizationSpec(group_size=64)
    full, best = Grid(rows, spec), Grid(rows, spec, torch.ones(64))
    assert float(best.scale) < float(full.scale)
    heavy = torch.ones(64)
    heavy[-1] = 1000
    assert float(Grid(rows, spec, heavy).scale) > float(best.scale), "the outlier counts too much to be clipped"


# Awkward input


def test_channels_that_were_never_active_are_rounded_to_nearest_and_disturb_no_others() -> None:
    weight, hessian = problem(128, 8)
    dead = torch.tensor([3, 50, 127])
    hessian[dead], hessian[:, dead] = 0, 0
    spec = QuantizationSpec(group_size=-1)
    matrix = quantize_matrix(weight, hessian, spec)
    scale, zero = matrix.scales[0], matrix.zeros[0].float()
    nearest = torch.round(weight[:, dead] / scale[:, None] + zero[:, None]).clamp(0, 15)
    assert torch.equal(matrix.values[dead].t().float(), nearest)
    alive = [k for k in range(128) if k not in dead.tolist()]
    error = relative_error(weight, matrix, hessian)
    alone = quantize_matrix(weight[:, alive], hessian[alive][:, alive], spec)
    assert error == pytest.approx(relative_error(weight[:, alive], alone, hessian[alive][:, alive]), rel=0.15)


def test_fewer_tokens_than_channels() -> None:
    """The Hessian is singular; damping makes it invertible."""
    x = correlated_inputs(20, 128)
    weight, hessian = torch.randn(8, 128), x.t() @ x / 20
    spec = QuantizationSpec(group_size=32)
    nearest = relative_error(weight, round_to_nearest(weight, spec), hessian)
    assert relative_error(weight, quantize_matrix(weight, hessian, spec), hessian) < 0.3 * nearest


def test_inactive_layer() -> None:
    matrix = quantize_matrix(torch.randn(8, 64), torch.zeros(64, 64), QuantizationSpec(group_size=32))
    assert torch.isfinite(matrix.dequantize()).all()


@pytest.mark.badinput
@pytest.mark.parametrize("quantize", [round_to_nearest, lambda w, spec: quantize_matrix(w, torch.eye(96), spec)])
def test_a_partial_last_group_is_refused(quantize: Callable[..., QuantizedMatrix]) -> None:
    with pytest.raises(ValueError, match=r"group_size=64 does not divide 96 input channels"):
        quantize(torch.randn(8, 96), QuantizationSpec(group_size=64))


@pytest.mark.badinput
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e6])
def test_weights_without_a_scale_are_refused(bad: float) -> None:
    weight = torch.randn(8, 64)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="infinite, NaN or too large"):
        round_to_nearest(weight, QuantizationSpec(group_size=32))


@pytest.mark.badinput
def test_a_hessian_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="not positive definite"):
        quantize_matrix(torch.randn(8, 64), torch.full((64, 64), float("nan")), QuantizationSpec(group_size=32))


@pytest.mark.badinput
@pytest.mark.parametrize(
    "field,value",
    [("bits", 3), ("group_size", 16), ("method", "awq"), ("damp_percent", 0.0), ("damp_percent", 2.0), ("sym", 1)],
)
def test_spec_refuses(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        QuantizationSpec(**{field: value})


@pytest.mark.badinput
def test_round_to_nearest_has_no_order() -> None:
    with pytest.raises(ValueError, match="desc_act=True"):
        QuantizationSpec(method="rtn", desc_act=True)
