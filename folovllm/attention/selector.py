"""Which attention backend runs, and why (vLLM: `v1/attention/selector.py`).

Backends are probed in order of preference for the device, dtype, head size and block size at hand; a backend named by
the user that cannot run is an error with its reasons, never a silent replacement.
"""

from __future__ import annotations

import torch

from folovllm.attention.backends.abstract import AttentionBackend
from folovllm.attention.backends.paged import PagedBackend
from folovllm.attention.backends.torch_naive import TorchNaiveBackend

BACKENDS: tuple[type[AttentionBackend], ...] = (PagedBackend, TorchNaiveBackend)
"""In order of preference."""


def select_attention_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_size: int, block_size: int
) -> tuple[type[AttentionBackend], str]:
    """Return the backend called `name`, or the best one for "auto", and the reason in words.

    Raises:
        ValueError: no such backend, or it cannot run here; the message lists its reasons.
    """
    known = {backend.get_name(): backend for backend in BACKENDS}
    if name != "auto":
        if name not in known:
            raise ValueError(f"attention_backend={name!r} is unknown; choose one of {', '.join(['auto', *known])}.")
        reasons = known[name].unsupported_reasons(device, dtype, head_size, block_size)
        if reasons:
            raise ValueError(f"attention_backend={name!r} cannot run here: {'; '.join(reasons)}. Use 'auto'.")
        return known[name], "chosen by attention_backend"
    passed_over: list[str] = []
    for backend in BACKENDS:
        reasons = backend.unsupported_reasons(device, dtype, head_size, block_size)
        if not reasons:
            because = f"first of {', '.join(known)} that runs on {device.type} in {str(dtype).removeprefix('torch.')}"
            return backend, "; ".join([because, *passed_over])
        passed_over.append(f"{backend.get_name()} does not: {', '.join(reasons)}")
    raise ValueError(f"No attention backend can run here: {'; '.join(passed_over)}.")
