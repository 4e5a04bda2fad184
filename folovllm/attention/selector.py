"""Which attention backend runs, and why (vLLM: `v1/attention/selector.py`).

Backends are probed in order of preference for the device, dtype, head size and block size at hand; a backend named by
the user that cannot run is an error with its reasons, never a silent replacement. Two backends are called "paged": our
Triton kernels on CUDA, and their plain-torch twin on every other device.
"""

from __future__ import annotations

import torch

from folovllm.attention.backends.abstract import AttentionBackend
from folovllm.attention.backends.flash_attn import FlashAttnBackend, PagedFlashBackend
from folovllm.attention.backends.paged import PagedBackend
from folovllm.attention.backends.paged_triton import DeterministicPagedBackend, TritonPagedBackend
from folovllm.attention.backends.torch_naive import TorchNaiveBackend

BACKENDS: tuple[type[AttentionBackend], ...] = (
    PagedFlashBackend,
    TritonPagedBackend,
    FlashAttnBackend,
    PagedBackend,
    TorchNaiveBackend,
)
"""In order of preference."""
CUDA_BACKENDS = frozenset({PagedFlashBackend, TritonPagedBackend, FlashAttnBackend, DeterministicPagedBackend})
"""Those that exist on CUDA only; elsewhere "auto" does not speak of them."""
BATCH_INVARIANT_ON_CUDA: tuple[type[AttentionBackend], ...] = (DeterministicPagedBackend, TorchNaiveBackend)
"""Those that give a request the same bits alone and in a crowd, in order of preference."""


def select_attention_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    block_size: int,
    deterministic: bool = False,
) -> tuple[type[AttentionBackend], str]:
    """Return the backend called `name`, or the best one for "auto", and the reason in words.

    `deterministic` on CUDA leaves those whose results for a request do not depend on its batch.

    Raises:
        ValueError: no such backend, or it cannot run here; the message lists its reasons.
    """
    names = list(dict.fromkeys(backend.get_name() for backend in BACKENDS))
    if name != "auto" and name not in names:
        raise ValueError(f"attention_backend={name!r} is unknown; choose one of {', '.join(['auto', *names])}.")
    candidates = _candidates(device, deterministic)
    if name != "auto":
        named = [backend for backend in candidates if backend.get_name() == name]
        if not named:
            raise ValueError(
                f"attention_backend={name!r} cannot run here: {_absence(device, deterministic)}. Use 'auto'."
            )
    else:
        named = candidates
    passed_over: list[str] = []
    for backend in named:
        reasons = backend.unsupported_reasons(device, dtype, head_size, block_size)
        if not reasons:
            because = "chosen by attention_backend"
            if name == "auto":
                order = ", ".join(dict.fromkeys(b.get_name() for b in candidates))
                because = f"first of {order} that runs on {device.type} in {str(dtype).removeprefix('torch.')}"
            return backend, "; ".join([because, *passed_over])
        if name == "auto":
            passed_over.append(f"{backend.get_name()} does not: {', '.join(reasons)}")
        else:
            passed_over += reasons
    if name == "auto":
        raise ValueError(f"No attention backend can run here: {'; '.join(passed_over)}.")
    raise ValueError(f"attention_backend={name!r} cannot run here: {'; '.join(passed_over)}. Use 'auto'.")


def _candidates(device: torch.device, deterministic: bool) -> list[type[AttentionBackend]]:
    if device.type == "cuda":
        return list(BATCH_INVARIANT_ON_CUDA if deterministic else BACKENDS)
    return [backend for backend in BACKENDS if backend not in CUDA_BACKENDS]


def _absence(device: torch.device, deterministic: bool) -> str:
    if device.type == "cuda" and deterministic:
        return "its results depend on the batch, and deterministic is on"
    return f"it runs on CUDA only, not on {device.type}"
