"""Which attention backend runs: a name is taken at its word or refused, "auto" says why it chose what it chose."""

from __future__ import annotations

import pytest
import torch

from folovllm.attention import selector
from folovllm.attention.backends.paged import PagedBackend
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.attention.selector import select_attention_backend
from folovllm.config import ATTENTION_BACKENDS

HERE = (torch.device("cpu"), torch.float32, 64, 16)


class NeverBackend(TorchNaiveBackend):
    """Runs nowhere."""

    @staticmethod
    def get_name() -> str:
        return "never"

    @classmethod
    def unsupported_reasons(
        cls, device: torch.device, dtype: torch.dtype, head_size: int, block_size: int
    ) -> list[str]:
        return [f"head size {head_size} is odd", "no such instruction"]


@pytest.mark.parametrize(("name", "backend"), [("paged", PagedBackend), ("torch_naive", TorchNaiveBackend)])
def test_a_named_backend_is_taken(name: str, backend: type) -> None:
    assert select_attention_backend(name, *HERE) == (backend, "chosen by attention_backend")


def test_auto_takes_the_first_and_says_why() -> None:
    backend, reason = select_attention_backend("auto", torch.device("cpu"), torch.bfloat16, 64, 16)
    assert backend is PagedBackend
    assert "that runs on cpu in bfloat16" in reason and "paged, torch_naive" in reason


def test_auto_passes_over_what_cannot_run_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector, "BACKENDS", (NeverBackend, TorchNaiveBackend))
    backend, reason = select_attention_backend("auto", *HERE)
    assert backend is TorchNaiveBackend
    assert "never does not: head size 64 is odd, no such instruction" in reason


@pytest.mark.badinput
def test_auto_with_no_backend_left_lists_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector, "BACKENDS", (NeverBackend,))
    with pytest.raises(ValueError, match=r"No attention backend can run here: never .*head size 64 is odd"):
        select_attention_backend("auto", *HERE)


@pytest.mark.badinput
def test_an_unknown_name_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"attention_backend='warp' is unknown; choose one of auto, .*paged"):
        select_attention_backend("warp", *HERE)


@pytest.mark.badinput
def test_a_named_backend_that_cannot_run_is_refused_with_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector, "BACKENDS", (NeverBackend, TorchNaiveBackend))
    with pytest.raises(ValueError, match=r"'never' cannot run here: head size 64 is odd; no such instruction\. Use"):
        select_attention_backend("never", *HERE)


def test_every_configurable_name_exists() -> None:
    """What the configuration accepts the selector knows, and the other way round."""
    assert set(ATTENTION_BACKENDS) == {"auto", *(backend.get_name() for backend in selector.BACKENDS)}
