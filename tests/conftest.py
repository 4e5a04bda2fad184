"""What all tests share: tests that need a CUDA device are skipped where there is none."""

from __future__ import annotations

import os
import shutil

import pytest

# Triton reads this when it is first imported, by whichever module: on machines without a GPU its kernels are tested
# through its interpreter.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(trylast=True)  # after -m and -k have dropped what they drop
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` without CUDA; torch is imported only if there is such a test."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
