"""RMSNorm, alone or with the residual addition before it (vLLM: `model_executor/layers/layernorm.py`)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean taken in float32 (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        """`hidden_size` is the size of the normalised last dimension."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size), requires_grad=False)
        self.variance_epsilon = eps

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return norm(x); with `residual`, return (norm(x + residual), x + residual). Shapes [..., hidden_size].

        `residual` is overwritten with the sum: it is the caller's only running copy.
        """
        if residual is None:
            return self._norm(x)
        residual.add_(x)
        return self._norm(residual), residual

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        # On CPUs torch composes F.rms_norm from nine operators; these six take 2/3 of the time at one token.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        mean_square = norm.square_().div_(x.shape[-1])
        scale = mean_square.add_(self.variance_epsilon).rsqrt_()
        return x.mul(scale).to(x.dtype).mul_(self.weight)
