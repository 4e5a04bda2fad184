"""Which attention runs on CUDA, decided without one: our kernels, a library where it is present and fast, and why."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from folovllm.attention import selector
from folovllm.attention.backends import flash_attn
from folovllm.attention.backends.abstract import AttentionMetadata
from folovllm.attention.backends.flash_attn import PROVIDERS, FlashAttnBackend, PagedFlashBackend, VarlenBatch
from folovllm.attention.backends.paged import PagedBackend
from folovllm.attention.backends.paged_triton import DeterministicPagedBackend, TritonPagedBackend
from folovllm.attention.selector import select_attention_backend

CUDA = torch.device("cuda")
BF16 = torch.bfloat16
HERE = (CUDA, BF16, 128, 16)


@pytest.fixture(autouse=True)
def any_gpu_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decide as for an unknown GPU, wherever the tests run; Triton counts as installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name == "triton" or find_spec(name, *a))


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str, function: str) -> Any:
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(flash_attn, "_load", absent)


@pytest.fixture
def every_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def present(module: str, function: str) -> Any:
        return lambda query, keys, values, page_table=None, block_table=None: query

    monkeypatch.setattr(flash_attn, "_load", present)


@pytest.mark.usefixtures("no_library")
def test_cuda_without_a_library_runs_our_kernels_and_says_what_is_missing() -> None:
    backend, reason = select_attention_backend("auto", *HERE)
    assert backend is TritonPagedBackend
    assert "runs on cuda in bfloat16" in reason
    assert "flash-attn 3: flash_attn_interface does not import (ModuleNotFoundError" in reason
    assert "torch varlen: slower than our own kernel" in reason


@pytest.mark.usefixtures("every_library")
def test_cuda_with_a_fast_library_mixes() -> None:
    backend, _ = select_attention_backend("auto", *HERE)
    assert backend is PagedFlashBackend and backend.get_name() == "paged_flash"
    assert issubclass(backend, TritonPagedBackend) and backend.prefill_by_library
    provider, _ = flash_attn.select_provider(CUDA, BF16, 128, 16)
    assert provider is not None and provider.name == "flash-attn 3"


@pytest.mark.usefixtures("every_library")
def test_names_on_cuda() -> None:
    assert select_attention_backend("paged", *HERE) == (TritonPagedBackend, "chosen by attention_backend")
    assert select_attention_backend("flash_attn", *HERE) == (FlashAttnBackend, "chosen by attention_backend")
    assert select_attention_backend("paged_flash", *HERE)[0] is PagedFlashBackend


@pytest.mark.usefixtures("no_library")
def test_what_our_kernels_cannot_run_goes_to_their_torch_twin_with_the_reason() -> None:
    backend, reason = select_attention_backend("paged", CUDA, BF16, 84, 16)
    assert backend is PagedBackend and "head size 84 is not a multiple of 8" in reason
    assert select_attention_backend("auto", CUDA, torch.float64, 64, 16)[0] is PagedBackend


@pytest.mark.badinput
@pytest.mark.usefixtures("no_library")
def test_flash_attn_without_a_library_is_refused_with_every_reason() -> None:
    with pytest.raises(ValueError, match=r"'flash_attn' cannot run here: flash-attn 3: .*flash-attn 2: .*Use 'auto'"):
        select_attention_backend("flash_attn", *HERE)


@pytest.mark.badinput
@pytest.mark.parametrize("name", ["flash_attn", "paged_flash"])
def test_flash_attn_on_the_cpu_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot run here: it runs on CUDA only, not on cpu"):
        select_attention_backend(name, torch.device("cpu"), torch.float32, 64, 16)


def test_auto_on_the_cpu_does_not_speak_of_cuda() -> None:
    backend, reason = select_attention_backend("auto", torch.device("cpu"), torch.float32, 64, 16)
    assert backend is PagedBackend and "flash" not in reason and "first of paged, torch_naive" in reason


@pytest.mark.badinput
@pytest.mark.usefixtures("every_library")
def test_deterministic_leaves_only_batch_invariant_backends() -> None:
    assert select_attention_backend("auto", *HERE, deterministic=True)[0] is DeterministicPagedBackend
    assert select_attention_backend("paged", *HERE, deterministic=True)[0] is DeterministicPagedBackend
    with pytest.raises(ValueError, match="results depend on the batch, and deterministic is on"):
        select_attention_backend("flash_attn", *HERE, deterministic=True)


@pytest.mark.parametrize(
    ("name", "dtype", "head_size", "block_size", "reason"),
    [
        ("flash-attn 2", BF16, 128, 16, "block_size 16 is not a multiple of 256"),
        ("flash-attn 4", BF16, 256, 16, "head size 256"),
        ("flash-attn 3", torch.float32, 128, 16, "float32 is neither"),
    ],
)
@pytest.mark.usefixtures("every_library")
def test_providers_say_what_they_need(
    name: str, dtype: torch.dtype, head_size: int, block_size: int, reason: str
) -> None:
    (provider,) = (p for p in PROVIDERS if p.name == name)
    assert reason in " ".join(provider.unsupported_reasons(CUDA, dtype, head_size, block_size))
    assert provider.unsupported_reasons(CUDA, BF16, 128, 256) == []


@pytest.mark.usefixtures("every_library")
def test_a_library_too_old_for_pages_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attn, "_load", lambda module, function: lambda query: query)
    reasons = PROVIDERS[0].unsupported_reasons(CUDA, BF16, 128, 16)
    assert reasons == ["the installed flash_attn_interface.flash_attn_with_kvcache has no page_table"]


def test_torch_varlen_takes_the_arguments_that_we_give() -> None:
    """The one provider that is installed here: its signature."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    (provider,) = (p for p in PROVIDERS if p.name == "torch varlen")
    known = inspect.signature(varlen_attn).parameters
    if "block_table" not in known:
        assert provider._import_reasons() == ["the installed torch.nn.attention.varlen.varlen_attn has no block_table"]
        return
    batch = VarlenBatch.of(common_of([3, 1], [3, 9]), [0, 1])
    assert set(provider.arguments(batch, 1.0)) <= set(known)


def common_of(query_lens: list[int], seq_lens: list[int]) -> AttentionMetadata:
    starts = [sum(query_lens[:b]) for b in range(len(query_lens) + 1)]
    table = torch.arange(len(query_lens) * 4, dtype=torch.int32).view(-1, 4)
    return AttentionMetadata(
        starts[-1], len(query_lens), max(query_lens), max(seq_lens), torch.tensor(starts, dtype=torch.int32),
        torch.tensor(seq_lens, dtype=torch.int32), table, torch.arange(starts[-1]), starts, seq_lens,
    )  # fmt: skip


def test_chunks_become_a_batch_of_their_own() -> None:
    common = common_of([3, 1, 2], [3, 9, 20])
    batch = VarlenBatch.of(common, [0, 2])
    assert batch.rows is not None and batch.rows.tolist() == [0, 1, 2, 4, 5]
    assert batch.cu_query_lens.tolist() == [0, 3, 5] and batch.cu_seq_lens.tolist() == [0, 3, 23]
    assert batch.seq_lens.tolist() == [3, 20] and batch.block_table.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert (batch.max_query_len, batch.max_seq_len) == (3, 20)
    query, out = torch.arange(6.0).view(6, 1, 1), torch.zeros(6, 1, 1)
    batch.scatter(batch.gather(query) + 1, out)
    assert out.flatten().tolist() == [1, 2, 3, 0, 5, 6]
    assert VarlenBatch.of(common, [0, 1, 2]).rows is None


def test_the_library_attends_for_chunks_only() -> None:
    metadata = PagedFlashBackend.build_metadata(common_of([3, 1, 2], [3, 9, 20]), 16, BF16)
    assert metadata.library_batch is not None and metadata.library_batch.seq_lens.tolist() == [3, 20]
    assert metadata.num_decodes == 1
    assert PagedFlashBackend.build_metadata(common_of([1, 1], [3, 9]), 16, BF16).library_batch is None
    assert TritonPagedBackend.build_metadata(common_of([3, 1], [3, 9]), 16, BF16).library_batch is None


def test_selecting_imports_no_triton() -> None:
    code = (
        "import sys; from folovllm.attention.selector import select_attention_backend as s; import torch;"
        "s('auto', torch.device('cpu'), torch.float32, 64, 16);"
        "assert not any('folovllm.attention.triton' in m for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_backends_are_all_known() -> None:
    assert set(selector.BATCH_INVARIANT_ON_CUDA) & set(selector.CUDA_BACKENDS) == {DeterministicPagedBackend}
    assert replace(PROVIDERS[0], name="x").fast
