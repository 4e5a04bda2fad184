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
        self.doubled_weight: torch.Tensor | None = None

    def process_weights_after_loading(self) -> None:
        """On CPUs, prepare for the detour over LayerNorm (see _norm)."""
        if not self.weight.is_cuda:
            self.doubled_weight = torch.cat((self.weight, self.weight))

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
        if self.doubled_weight is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)
        # torch has a LayerNorm kernel for CPUs, but composes RMSNorm from nine operators. LayerNorm of (x, -x) has
        # mean 0 and variance mean(x^2), so its first half is the RMSNorm of x: half the time at one token.
        both = torch.cat((x, -x), dim=-1)
        normed = F.layer_norm(both, self.doubled_weight.shape, self.doubled_weight, None, self.variance_epsilon)
        return normed.narrow(-1, 0, x.shape[-1])
