"""Linear layers, fused where the checkpoint has several that read the same input (vLLM: `layers/linear.py`).

The names keep vLLM's tensor-parallel vocabulary: a column-parallel layer would split its output rows over ranks, a
row-parallel one its inputs. Simplified (vLLM: tensor parallelism): one rank, so nothing is split yet; shards below are
the parts of a fused weight. A checkpoint's tensors reach their rows through each layer's `weight_loader`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from folovllm.model_executor.layers import batch_linear
from folovllm.model_executor.layers.quantization import LinearMethodBase, QuantizationConfig
from folovllm.utils import cpu_kernels

PACKED_BATCH_HINT = 256
"""Rows oneDNN packs weights for: the layout it picks for 256 also serves 1 and 16 (docs/dev/milestone_1.md)."""


def cpu_can_pack(weight: torch.Tensor) -> bool:
    """Return whether oneDNN can prepack `weight` [N, K] into blocks: 2D bfloat16 on a CPU with AVX-512 or better."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack_linear_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` [N, K] in oneDNN's blocked layout: an opaque tensor that only linear_packed can read."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_BATCH_HINT)
    return packed


def linear_packed(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x @ weight^T + bias for a weight packed by pack_linear_weight."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


class UnquantizedLinearMethod(LinearMethodBase):
    """A weight [N, K] in the model's dtype.

    On CPUs with bfloat16 units, left as it is for our kernel, or, without the kernel, prepacked once for oneDNN.
    """

    uses_cpu_kernel = False

    def create_weights(self, layer: nn.Module, input_size: int, output_size: int) -> None:
        """See LinearMethodBase."""
        layer.weight = nn.Parameter(torch.empty(output_size, input_size), requires_grad=False)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Choose the kernel; else prepack where that pays: 1.3 to 1.9x at one token, see docs/dev/milestone_1.md."""
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        self.uses_cpu_kernel = cpu_kernels.multiplies(weight)
        if not self.uses_cpu_kernel and cpu_can_pack(weight):
            layer.weight = nn.Parameter(pack_linear_weight(weight.data), requires_grad=False)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See LinearMethodBase."""
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        if self.uses_cpu_kernel:
            return cpu_kernels.linear(x, weight, bias)
        return linear_packed(x, weight, bias) if weight.is_mkldnn else F.linear(x, weight, bias)

    def cpu_weight(self, layer: nn.Module) -> cpu_kernels.CPUWeight | None:
        """See LinearMethodBase."""
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, torch.Tensor) and (bias is None or isinstance(bias, torch.Tensor))
        return cpu_kernels.CPUWeight(weight, bias) if self.uses_cpu_kernel else None


class BatchInvariantLinearMethod(UnquantizedLinearMethod):
    """On CUDA: one tile for every number of rows, so that a row's result does not depend on the others."""

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See LinearMethodBase."""
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        return batch_linear.deterministic_linear(x, weight, bias)


class LinearBase(nn.Module):
    """What all linear layers share: parameters made and multiplied by a quant method."""

    shard_ids: tuple[int | str | None, ...] = (None,)
    """Ids of the checkpoint's layers that this one is made of, in the order of their rows."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = False,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        """Parameters are created empty in the current default dtype and device."""
        super().__init__()
        self.input_size = input_size
        self.output_size = output_size
        self.prefix = prefix
        method = None if quant_config is None else quant_config.get_quant_method(self, prefix)
        self.quant_method: LinearMethodBase = method or UnquantizedLinearMethod()
        self.quant_method.create_weights(self, input_size, output_size)
        self.bias = nn.Parameter(torch.empty(output_size), requires_grad=False) if bias else None
        for param in self.parameters():
            if not hasattr(param, "weight_loader"):
                param.weight_loader = self.weight_loader  # type: ignore[attr-defined]

    def shard_rows(self, shard_id: int | str | None) -> tuple[int, int]:
        """Return (first row, number of rows) of the output that checkpoint shard `shard_id` fills; None: all."""
        assert shard_id is None, f"{self.prefix} is not fused and has no shard {shard_id!r}"
        return 0, self.output_size

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: int | str | None = None) -> None:
        """Copy a checkpoint tensor into its rows of `param`, converting its dtype.

        Raises:
            ValueError: the shape does not fit; the message gives both.
        """
        start, rows = self.shard_rows(shard_id)
        target = param.data.narrow(0, start, rows)
        if target.shape != loaded.shape:
            raise ValueError(f"expected shape {list(target.shape)}, got {list(loaded.shape)}")
        target.copy_(loaded)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [T, output_size] for x [T, input_size]."""
        return self.quant_method.apply(self, x, self.bias)


class ColumnParallelLinear(LinearBase):
    """Would split its outputs over ranks."""


class RowParallelLinear(LinearBase):
    """Would split its inputs over ranks and sum the results."""


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several layers with one input as one matrix product, e.g. gate and up; shard ids 0, 1, ..."""

    def __init__(
        self,
        input_size: int,
        output_sizes: list[int],
        bias: bool = False,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        """`output_sizes`: rows of each part, in order."""
        self.output_sizes = output_sizes
        self.shard_ids = tuple(range(len(output_sizes)))
        super().__init__(input_size, sum(output_sizes), bias, quant_config, prefix)

    def shard_rows(self, shard_id: int | str | None) -> tuple[int, int]:
        """See LinearBase."""
        if shard_id is None:
            return 0, self.output_size
        assert isinstance(shard_id, int)
        return sum(self.output_sizes[:shard_id]), self.output_sizes[shard_id]


class QKVParallelLinear(ColumnParallelLinear):
    """Query, key and value projections as one matrix product; shard ids "q", "k", "v"."""

    shard_ids = ("q", "k", "v")

    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int,
        bias: bool = False,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        """The output is [T, (H + 2 Hkv) * D]: all query heads, then all key heads, then all value heads."""
        self.q_size = total_num_heads * head_size
        self.kv_size = total_num_kv_heads * head_size
        super().__init__(hidden_size, self.q_size + 2 * self.kv_size, bias, quant_config, prefix)

    def shard_rows(self, shard_id: int | str | None) -> tuple[int, int]:
        """See LinearBase."""
        shards: dict[int | str | None, tuple[int, int]] = {
            None: (0, self.output_size),
            "q": (0, self.q_size),
            "k": (self.q_size, self.kv_size),
            "v": (self.q_size + self.kv_size, self.kv_size),
        }
        return shards[shard_id]
