"""RMSNorm, alone or with the residual addition before it (vLLM: `model_executor/layers/layernorm.py`)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from folovllm.utils import cpu_kernels


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean taken in float32 (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        """`hidden_size` is the size of the normalised last dimension."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size), requires_grad=False)
        self.variance_epsilon = eps
        self.doubled_weight: torch.Tensor | None = None
        self.has_kernel = False

    def process_weights_after_loading(self) -> None:
        """On CPUs, choose our kernel; without it, prepare for the detour over LayerNorm (see _norm)."""
        self.has_kernel = cpu_kernels.usable(self.weight)
        if not self.has_kernel and not self.weight.is_cuda:
            self.doubled_weight = torch.cat((self.weight, self.weight))

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return norm(x); with `residual`, return (norm(x + residual), x + residual). Shapes [..., hidden_size].

        `residual` is overwritten with the sum: it is the caller's only running copy.
        """
        if self.has_kernel:
            return self._by_kernel(x, residual)
        if residual is None:
            return self._norm(x)
        residual.add_(x)
        return self._norm(residual), residual

    def _by_kernel(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if residual is None:
            return cpu_kernels.rms_norm(rows, self.weight, self.variance_epsilon).view(x.shape)
        sums = residual.view(rows.shape)
        return cpu_kernels.rms_norm(rows, self.weight, self.variance_epsilon, sums).view(x.shape), residual

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        if self.doubled_weight is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        # torch has a LayerNorm kernel for CPUs, but composes RMSNorm from nine operators. LayerNorm of (x, -x) has
        # mean 0 and variance mean(x^2), so its first half is the RMSNorm of x: half the time at one token.
        both = torch.cat((x, -x), dim=-1)
        normed = F.layer_norm(both, self.doubled_weight.shape, self.doubled_weight, None, self.variance_epsilon)
        return normed.narrow(-1, 0, x.shape[-1])
