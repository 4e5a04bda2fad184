"""Launching a compiled Triton kernel again for a few microseconds of the host's time instead of some twenty.

`kernel[grid](...)` binds arguments, describes each in a string, looks the compiled kernel up by those strings, checks
globals and builds launch metadata, every time. A prompt chunk launches 140 kernels, so the GPU waits for the host.
`@fast_launch` keeps what the first launch found, under a key with all that Triton's choice depends on:

    pointer   dtype, and whether the address is a multiple of 16   (vector loads)
    integer   1, a multiple of 16, or neither; 32 or 64 bits       (1 becomes a constant)
    float     nothing: always float32
    None, constants and options such as num_warps                  their value

Whatever else is given (tensor descriptors) and the interpreter go Triton's own way. vLLM has no such file: what it does
not record in CUDA graphs it leaves to torch.compile, whose launchers are made once per call site, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_ONE, _ALIGNED, _OTHER, _WIDE, _WIDE_ALIGNED = range(2, 7)  # none of them equal to a boolean


KNOWN_TRITON = "3.6."
"""How a compiled kernel is started is Triton's own business, and changes between its versions."""


def fast_launch(kernel: Any) -> Any:
    """Decorate a `@triton.jit` kernel: the same calls, launched faster. Constants must be given by keyword.

    With a version of Triton that this was not written for, and in the interpreter, the kernel stays as it is.
    """
    known = triton.__version__.startswith(KNOWN_TRITON)
    return FastKernel(kernel) if known and isinstance(kernel, JITFunction) else kernel


class FastKernel:
    """A Triton kernel with a memory of its launches; anything but launching it goes to the kernel itself."""

    def __init__(self, kernel: JITFunction[Any]) -> None:
        """Wrap a kernel that is launched on the current device's current stream."""
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[None, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        """Return the function that launches `grid` programs."""
        return partial(self._launch, grid)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the kernel."""
        return getattr(self.kernel, name)

    def _launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
        if _compiled_only is not None:
            return self._compile(grid, *args, **options)
        kinds = kinds_of(args)
        if kinds is None:
            return self.kernel[grid](*args, **options)
        device = driver.active.get_current_device()
        key = (device, *kinds, *options.items())
        found = self._compiled.get(key)
        if found is None:
            compiled = self.kernel[grid](*args, **options)
            assert all(parameter.is_constexpr for parameter in self.kernel.params[len(args) :]), self.kernel
            # The launcher skips constants, but wants something in their places.
            self._compiled[key] = compiled, (None,) * (len(self.kernel.params) - len(args))
            return compiled
        compiled, constants = found
        x, y, z = (*grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(device)
        compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *constants)
        return compiled

    def _compile(self, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
        assert _compiled_only is not None
        # What is compiled once too often or too seldom costs time alone, so descriptors are told apart by their tiles.
        kinds = [(kinds_of([arg]), tuple(getattr(arg, "block_shape", ()))) for arg in args]
        key = (self, str(kinds), *options.items())
        if key not in _compiled_only:
            _compiled_only[key] = self.kernel.warmup(*args, grid=grid, **options)
        return _compiled_only[key]


_compiled_only: dict[tuple[Any, ...], Any] | None = None
"""What was compiled in the current `compile_only`; None outside."""


@contextmanager
def compile_only(device: torch.device, num_threads: int) -> Iterator[None]:
    """Inside the block `fast_launch` kernels are compiled instead of launched, `num_threads` at a time; then loaded.

    So a step may be "run" once for each way it can go, in no time and on no data, and all its kernels are compiled side
    by side: run for real, each would wait for the one before it. Not for several threads at once. Any other kernel
    is launched, on whatever the memory holds.
    """
    global _compiled_only
    if not triton.__version__.startswith(KNOWN_TRITON):
        yield
        return
    # An error is left to the launch that needs the kernel: raised in the mode's end, it would leave the mode on.
    with _LoadingPool(device, num_threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        _compiled_only = {}
        try:
            yield
        finally:
            _compiled_only = None


class _LoadingPool(ThreadPoolExecutor):
    """Threads that compile kernels and load them to the GPU: Triton would do the latter at the first launch."""

    def __init__(self, device: torch.device, num_threads: int) -> None:
        super().__init__(num_threads)
        self.device = device

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def load() -> Any:
            with torch.cuda.device(self.device):
                kernel = fn(*args, **kwargs)
                kernel._init_handles()
            return kernel

        return super().submit(load)


def kinds_of(args: Sequence[Any]) -> list[Any] | None:
    """Return what Triton compiles for different arguments differently, or None if one is of a kind not known here."""
    kinds: list[Any] = []
    for arg in args:
        if arg is None:
            kinds.append(None)
        elif isinstance(arg, torch.Tensor):
            kinds.append(arg.dtype)
            kinds.append(arg.data_ptr() % 16 == 0)
        elif type(arg) is int:
            if -(1 << 31) <= arg < 1 << 31:
                kinds.append(_ONE if arg == 1 else _OTHER if arg % 16 else _ALIGNED)
            elif arg < 1 << 63:
                kinds.append(_WIDE if arg % 16 else _WIDE_ALIGNED)
            else:
                return None
        elif type(arg) is float:
            kinds.append(float)
        else:
            return None
    return kinds
