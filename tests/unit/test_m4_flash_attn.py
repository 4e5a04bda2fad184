"""Every FlashAttention library that is installed, through the flash_attn backend, against attention's definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from folovllm.attention.backends import flash_attn
from folovllm.attention.backends.flash_attn import PROVIDERS, FlashAttnBackend, FlashAttnImpl, FlashProvider
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from tests.unit.test_m3_paged_attention import Batch, make_problem

pytestmark = pytest.mark.gpu

BATCHES: dict[str, Batch] = {
    "decodes": [(1, 50), (1, 1), (1, 900)],
    "chunks": [(9, 30), (64, 300), (17, 17), (2, 3)],
    "mixed": [(1, 700), (300, 300), (1, 1), (129, 600), (2, 17)],
}


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name.replace(" ", "-"))
def test_libraries_equal_the_definition(
    provider: FlashProvider, name: str, head_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    block_size = max(16, provider.page_multiple)
    reasons = provider.unsupported_reasons(device, dtype, head_size, block_size)
    if reasons:
        pytest.skip("; ".join(reasons))
    monkeypatch.setattr(flash_attn, "provider_for", lambda *args, **kwargs: provider)
    problem = make_problem(BATCHES[name], block_size, 8, 4, head_size)
    for tensor in ("query", "key", "value", "kv_cache"):
        setattr(problem, tensor, getattr(problem, tensor).to(dtype).float())
    expected = problem.run(TorchNaiveBackend)
    names: tuple[Any, ...] = ("query_start_loc", "seq_lens", "block_table", "slot_mapping")
    for tensor in names:
        setattr(problem.metadata, tensor, getattr(problem.metadata, tensor).to(device))
    metadata = FlashAttnBackend.build_metadata(problem.metadata, block_size, dtype)
    query, key, value, cache = (
        t.to(device, dtype) for t in (problem.query, problem.key, problem.value, problem.kv_cache)
    )
    out = FlashAttnImpl(8, head_size, head_size**-0.5, 4).forward(
        query, key, value, cache, metadata, torch.full_like(query, float("nan"))
    )
    torch.testing.assert_close(out.float().cpu(), expected, atol=3e-2, rtol=0)
