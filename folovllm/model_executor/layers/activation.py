"""Activations (vLLM: `model_executor/layers/activation.py`)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from folovllm.utils import cpu_kernels


class SiluAndMul(nn.Module):
    """SiLU of the first half times the second half: the gate of a Llama MLP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [T, I] for x [T, 2 * I] = gate | up."""
        if cpu_kernels.usable(x) and x.dim() == 2:
            return cpu_kernels.silu_and_mul(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
