"""fast_launch: the kernel that Triton would have chosen, for whatever is specialised on, and found again."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime import _async_compile  # noqa: E402

from folovllm.utils import triton_launch  # noqa: E402
from folovllm.utils.triton_launch import FastKernel, compile_only, fast_launch, kinds_of  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@fast_launch
@triton.jit
def scale_kernel(x_ptr, bias_ptr, out_ptr, factor, n, stride, BLOCK: tl.constexpr, TWICE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Out[i] = x[i * stride] * factor (+ bias[i]), twice that with TWICE."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i * stride, mask=i < n, other=0.0).to(tl.float32) * factor
    if bias_ptr is not None:
        x += tl.load(bias_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    if TWICE:
        x *= 2.0
    tl.store(out_ptr + i, x.to(out_ptr.dtype.element_ty), mask=i < n)


def check(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    stride: int,
    factor: float,
    twice: bool,
    kernel: Any = scale_kernel,
) -> None:
    out = torch.full((n,), float("nan"), dtype=x.dtype, device=DEVICE)
    block = 64
    kernel[(triton.cdiv(n, block),)](x, bias, out, factor, n, stride, BLOCK=block, TWICE=twice, num_warps=1)
    expected = x[: n * stride : stride][:n].float() * factor + (0 if bias is None else bias[:n].float())
    torch.testing.assert_close(out.float(), expected * (2 if twice else 1), rtol=1e-2, atol=1e-2)


def test_every_specialisation_gets_its_own_kernel() -> None:
    """Addresses off by one number, strides of 1, 16 and 5, dtypes, None and constants, each several times in turn."""
    memory = torch.randn(4096, device=DEVICE)
    for _ in range(3):
        for dtype in (torch.float32, torch.float16):
            x = memory.to(dtype)
            for first in (0, 1, 8):
                for n, stride in ((1, 1), (64, 16), (77, 5), (160, 1)):
                    check(x[first:], None, n, stride, 0.5, False)
                    check(x[first:], x[1:], n, stride, -3.0, True)


@pytest.mark.gpu
def test_a_launch_like_one_before_is_found_again() -> None:
    x, kernel = torch.randn(256, device=DEVICE), FastKernel(scale_kernel.kernel)
    check(x, None, 100, 1, 2.0, False, kernel)
    check(x, None, 100, 1, 3.0, False, kernel)  # another number of the same kind
    check(x[4:], None, 101, 1, 3.0, False, kernel)  # another address, as aligned
    assert len(kernel._compiled) == 1
    check(x[1:], None, 100, 1, 2.0, False, kernel)
    check(x, None, 96, 1, 2.0, False, kernel)
    check(x, None, 100, 1, 2.0, True, kernel)
    assert len(kernel._compiled) == 4


@pytest.mark.gpu
def test_compile_only_compiles_and_does_not_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind once, loaded, in other threads; a later launch finds it and writes what it should."""
    compiled: list[tuple[str, bool]] = []
    on_main = threading.current_thread()

    def listener(*, src: Any, **kwargs: Any) -> None:
        compiled.append((src.name, threading.current_thread() is on_main))

    kernel = FastKernel(triton.jit(scale_kernel.kernel.fn))
    x, out = torch.randn(256, device=DEVICE), torch.full((96,), 7.0, device=DEVICE)
    monkeypatch.setattr(triton.knobs.compilation, "listener", listener)
    with compile_only(torch.device(DEVICE, 0), 2):
        for n in (96, 96, 64, 77):
            kernel[(2,)](x, None, out, 2.0, n, 1, BLOCK=64, TWICE=False, num_warps=1)
    assert compiled == [("scale_kernel", False)] * 2, "96 and 64 are alike, 77 is not"
    assert (out == 7.0).all()
    kernels = [k for cache in kernel.kernel.device_caches.values() for k in cache[0].values()]
    assert len(kernels) == 2 and all(k.module is not None for k in kernels), "loaded"
    check(x, None, 96, 1, 2.0, False, kernel)
    assert len(compiled) == 2


def test_a_kernel_that_does_not_compile_is_left_to_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the next engine of the process, which would find a mode that nobody ended."""
    submitted: list[Any] = []

    def fail() -> None:
        raise RuntimeError("too much shared memory")

    class Broken:
        def warmup(self, *args: Any, **options: Any) -> Any:
            mode = _async_compile.active_mode.get()
            assert mode is not None
            submitted.append(mode.submit(len(submitted), fail, lambda kernel: None))
            return submitted[-1]

    monkeypatch.setattr(triton_launch, "KNOWN_TRITON", "")
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    for _ in range(2):
        with compile_only(torch.device("cpu"), 2):
            FastKernel(Broken())[(1,)](1)  # type: ignore[arg-type]
        assert _async_compile.active_mode.get() is None
    assert len(submitted) == 2
    with pytest.raises(RuntimeError, match="too much shared memory"):
        submitted[0].result()


def test_kinds() -> None:
    x = torch.zeros(64, dtype=torch.float16)
    skipped = next(i for i in range(1, 9) if (x.data_ptr() + 2 * i) % 16)
    arguments = [None, x, x[skipped:], x.float(), 1, 2, 16, 1 << 31, (1 << 31) + 1, 2.5]
    kinds = [tuple(kinds_of([a]) or ()) for a in arguments]
    assert len(set(kinds)) == len(arguments)
    assert kinds_of([32, 3, 7.0, -5]) == kinds_of([16, 2, 2.5, 99])
    for unknown in (True, 1 << 63, "text", (1, 2)):
        assert kinds_of([1, unknown]) is None
