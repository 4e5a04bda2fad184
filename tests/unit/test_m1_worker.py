"""Which number format and device a worker chooses, and the reason it gives."""

from __future__ import annotations

import pytest
import torch

from folovllm.config import DeviceConfig
from folovllm.worker.worker_base import resolve_device, resolve_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_on_the_cpu_follows_the_processor(
    native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 only where the processor multiplies it natively, whatever the checkpoint's type; the reason says so."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    dtype, reason = resolve_dtype("auto", {"torch_dtype": "float16"}, CPU)
    assert dtype == expected and "bfloat16" in reason


def test_a_named_dtype_is_taken() -> None:
    assert resolve_dtype("half", {}, CPU) == (torch.float16, "chosen by dtype")
    assert resolve_dtype("float32", {"dtype": "bfloat16"}, CPU)[0] == torch.float32


@pytest.mark.badinput
def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(DeviceConfig("auto")) == CPU
    with pytest.raises(ValueError, match="device='cuda': torch sees no CUDA GPU here"):
        resolve_device(DeviceConfig("cuda"))
