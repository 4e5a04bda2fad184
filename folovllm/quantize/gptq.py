"""GPTQ on one matrix (Frantar et al. 2022): round input channel by input channel, let the others make up for it.

Rounding weight w[k] changes the layer's output by (q - w[k]) x[k]. Other channels are correlated with x[k], so their
weights can take back part of that. For one output row, with H = mean of x x^T and the channels before k fixed,
the best change of the remaining weights is

    error = (w[k] - q) / U[k, k];    w[j] -= error * U[k, j]  for j > k,    H^-1 = U^T U, U upper triangular

(docs/learn/07_gptq.md derives it). H does not depend on the output row: all rows go through the same steps at once,
which is what makes GPTQ fast where its ancestor OBQ took an order of its own for each row.

    channels ->   | done       | block of 128          | rest                  |
                    fixed        one by one: each error   all errors of the block
                                 goes to the rest of      at once, as one matrix
                                 the block                product ("lazy")

Matrices lie transposed, [K, N], so that a channel is a contiguous row. vLLM has no counterpart.

Legend: K input channels, N output channels, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from folovllm.quantize.spec import QuantizationSpec

BLOCK = 128
"""Channels whose errors reach the channels after the block together; every group size but -1 divides it."""
WIDTHS = tuple(1.08 - 0.03 * i for i in range(14))
"""Shares of its weights' range that a group's grid may span."""
DAMPING_STEPS = 4
"""Times that the damping is raised tenfold for a Hessian which is not positive definite."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """A weight [N, K] as integers; it means scales[g_idx[k], n] * (values[k, n] - zeros[g_idx[k], n])."""

    values: torch.Tensor
    """[K, N] uint8."""
    scales: torch.Tensor
    """[G, N] float32, every number exact in float16 and in bfloat16 (normal float16 numbers, that is)."""
    zeros: torch.Tensor
    """[G, N] uint8, at least 1: format "gptq" stores them less one."""
    g_idx: torch.Tensor
    """[K] int32: the group of each input channel."""

    def dequantize(self) -> torch.Tensor:
        """Return the weight [N, K] float32 that this means."""
        groups = self.g_idx.long()
        return (self.scales[groups] * (self.values.float() - self.zeros[groups].float())).t()


def relative_error(weight: torch.Tensor, quantized: QuantizedMatrix, hessian: torch.Tensor | None) -> float:
    """Return |(W - Q) X|^2 / |W X|^2, the share of the output's energy that quantizing changes.

    Args:
        weight: [N, K].
        quantized: what became of it.
        hessian: [K, K] float32, X X^T up to a factor; None stands for the unit matrix.
    """
    weight = weight.float()
    difference = weight - quantized.dequantize()
    if hessian is None:
        return float(difference.square().sum() / weight.square().sum().clamp(min=1e-30))
    energy = ((weight @ hessian) * weight).sum().clamp(min=1e-30)
    return float(((difference @ hessian) * difference).sum() / energy)


class Grid:
    """The values that one group of each column may take: scale * (0 - zero), ..., scale * (max_value - zero)."""

    def __init__(self, rows: torch.Tensor, spec: QuantizationSpec, importance: torch.Tensor | None = None) -> None:
        """Choose scales and zero points for `rows` [channels of the group, N] float32.

        Args:
            rows: the weights; the grid spans their range.
            spec: bits and symmetry.
            importance: [channels] what the squared error of a channel counts; then narrower grids, which clip the
                largest weights but are finer, are tried too, and the best one of each column is taken.

        Raises:
            ValueError: a weight is not finite, or so large that its scale is infinite in float16.
        """
        self.max_value = spec.max_value
        low, high = rows.amin(dim=0).clamp(max=0), rows.amax(dim=0).clamp(min=0)
        self.scale, self.zero = self._span(low, high, spec)
        if not bool(torch.isfinite(self.scale).all()):
            raise ValueError(
                f"a weight is infinite, NaN or too large to quantize: the largest is {float(rows.abs().max()):.3g}, "
                "and checkpoints hold scales in float16 (at most 65504)."
            )
        if importance is None:
            return
        best = self._loss(rows, importance)
        scale, zero = self.scale, self.zero
        for width in WIDTHS:
            self.scale, self.zero = self._span(low * width, high * width, spec)
            loss = self._loss(rows, importance)
            better = loss < best
            best = torch.where(better, loss, best)
            scale, zero = torch.where(better, self.scale, scale), torch.where(better, self.zero, zero)
        self.scale, self.zero = scale, zero

    def _span(self, low: torch.Tensor, high: torch.Tensor, spec: QuantizationSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and zero point [N] of a grid from `low` <= 0 to `high` >= 0."""
        if spec.sym:
            scale = torch.maximum(-low, high) * (2 / spec.max_value)
            zero = torch.full_like(scale, (spec.max_value + 1) // 2)
        else:
            scale = (high - low) / spec.max_value
            zero = torch.round(-low / scale.clamp(min=1e-30))
            # Format "gptq" stores zero - 1, which readers of it disagree about for zero = 0.
            scale = torch.where(zero < 1, high / (spec.max_value - 1), scale)
            zero = zero.clamp(1, spec.max_value)
        return _stored_scale(scale), zero

    def _loss(self, rows: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        return importance @ (self.dequantize(self.quantize(rows)) - rows).square_()

    def quantize(self, row: torch.Tensor) -> torch.Tensor:
        """Return the integers, as floats, nearest to `row` [..., N]."""
        return torch.round(row / self.scale).add_(self.zero).clamp_(0, self.max_value)

    def dequantize(self, values: torch.Tensor) -> torch.Tensor:
        """Return the weights that `values` mean."""
        return (values - self.zero) * self.scale


def _stored_scale(scale: torch.Tensor) -> torch.Tensor:
    """Return `scale` as checkpoints hold it, so that rounding is aimed at the values that will be there.

    Eight significant bits: float16 and bfloat16 models then compute with the same numbers. A group of zeros gets 1.
    """
    rounded = scale.bfloat16().half().float()
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def round_to_nearest(weight: torch.Tensor, spec: QuantizationSpec) -> QuantizedMatrix:
    """Quantize `weight` [N, K] without looking at any activations: what GPTQ has to beat.

    Raises:
        ValueError: see Grid; or group_size does not divide K.
    """
    rows = weight.float().t().contiguous()
    size = _group_size(rows.shape[0], spec)
    grids, values = [], []
    for start in range(0, rows.shape[0], size):
        grids.append(Grid(rows[start : start + size], spec))
        values.append(grids[-1].quantize(rows[start : start + size]))
    g_idx = torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32) // size
    return _assemble(torch.cat(values), grids, g_idx)


def quantize_matrix(weight: torch.Tensor, hessian: torch.Tensor, spec: QuantizationSpec) -> QuantizedMatrix:
    """Quantize `weight` with GPTQ.

    Args:
        weight: [N, K], any float type.
        hessian: [K, K] float32 on the same device: X X^T over the calibration tokens, times any factor. A channel with
            a zero on the diagonal was never active: its weights are rounded to nearest and disturb no others.
        spec: bits, groups, symmetry, order and damping.

    Raises:
        ValueError: see Grid; or group_size does not divide K; or the Hessian is not positive definite however damped.
    """
    rows = torch.empty(weight.shape[1], weight.shape[0], device=weight.device)
    rows.copy_(weight.t())  # of its own: it is overwritten on the way
    num_channels = rows.shape[0]
    size = _group_size(num_channels, spec)
    order = torch.arange(num_channels, device=rows.device)
    if spec.desc_act:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        rows, hessian = rows[order], hessian[order][:, order]
    values, grids = _propagate(rows, inverse_factor(hessian, spec.damp_percent), size, spec)
    g_idx = torch.empty(num_channels, device=rows.device, dtype=torch.int32)
    g_idx[order] = torch.arange(num_channels, device=rows.device, dtype=torch.int32) // size
    in_place = torch.empty_like(values)
    in_place[order] = values
    return _assemble(in_place, grids, g_idx)


def _group_size(num_channels: int, spec: QuantizationSpec) -> int:
    size = num_channels if spec.group_size == -1 else spec.group_size
    if num_channels % size:
        raise ValueError(
            f"group_size={size} does not divide {num_channels} input channels: the last group would be partial."
        )
    return size


def _assemble(values: torch.Tensor, grids: list[Grid], g_idx: torch.Tensor) -> QuantizedMatrix:
    zeros = torch.stack([grid.zero for grid in grids])
    return QuantizedMatrix(values.to(torch.uint8), torch.stack([g.scale for g in grids]), zeros.to(torch.uint8), g_idx)


def inverse_factor(hessian: torch.Tensor, damp_percent: float) -> torch.Tensor:
    """Return U [K, K], upper triangular, with U^T U = (H + damping)^-1.

    Row k of U holds what GPTQ asks of the inverse once the channels before k are fixed. No inverse is formed: H = R R^T
    with R upper triangular (a Cholesky factorization from the last channel to the first), so U = R^-1.

    Raises:
        ValueError: not positive definite, even with the damping raised DAMPING_STEPS times.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = 1.0  # never active
    added = 0.0
    for step in range(DAMPING_STEPS + 1):
        damping = damp_percent * 10.0**step
        diagonal.add_(mean * (damping - added))
        added = damping
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            unit = torch.eye(len(damped), device=damped.device, dtype=damped.dtype)
            factor: torch.Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True)
            return factor
    raise ValueError(
        f"the Hessian of the calibration activations is not positive definite, even with {added:g} of its mean "
        "diagonal added: are there NaN or infinite activations? Otherwise raise damp_percent."
    )


def _propagate(
    rows: torch.Tensor, factor: torch.Tensor, group_size: int, spec: QuantizationSpec
) -> tuple[torch.Tensor, list[Grid]]:
    """Quantize `rows` [K, N], which is overwritten, in order; return the integers [K, N] as floats and the grids."""
    num_channels = rows.shape[0]
    values = torch.empty_like(rows)
    grids: list[Grid] = []
    for start in range(0, num_channels, BLOCK):
        end = min(start + BLOCK, num_channels)
        block, u = rows[start:end], factor[start:end, start:end]
        errors = torch.empty_like(block)
        for i in range(end - start):
            if (start + i) % group_size == 0:
                # What the group's weights are by now, after the corrections for all channels before it.
                group = slice(start + i, start + i + group_size)
                # A channel's squared error costs 1 / U[k, k]^2 once those after it have made up for what they can.
                grids.append(Grid(rows[group], spec, factor.diagonal()[group] ** -2))
            row, grid = block[i], grids[-1]
            values[start + i] = grid.quantize(row)
            errors[i] = (row - grid.dequantize(values[start + i])) / u[i, i]
            block[i + 1 :].addr_(u[i, i + 1 :], errors[i], alpha=-1)
        rows[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return values, grids
