"""Perplexity: which token is scored where, and that the number is transformers' own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import PreTrainedModel

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.llm_engine import LLMEngine
from folovllm.entrypoints.cli.main import main
from folovllm.quantize.perplexity import make_windows, measure_perplexity
from tests.tiny_models import VOCAB_SIZE, save_tiny_model


@given(num_tokens=st.integers(2, 300), window=st.integers(2, 64), data=st.data())
def test_every_token_but_the_first_is_scored_once_with_enough_context(
    num_tokens: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window - 1))
    scored = []
    for start, end, first in make_windows(num_tokens, window, stride):
        assert 0 <= start < first < end <= num_tokens and end - start <= window
        assert start == 0 or first - start >= window - stride
        scored += range(first, end)
    assert scored == list(range(1, num_tokens))


def test_the_drawing_in_the_module() -> None:
    assert make_windows(10, 6, 3) == [(0, 6, 1), (3, 9, 6), (6, 10, 9)]


@pytest.mark.badinput
@pytest.mark.parametrize(
    "num_tokens,window,stride,told",
    [(1, 4, 2, "1 tokens"), (9, 1, 1, "window=1"), (9, 4, 0, "stride=0"), (9, 4, 4, "stride=4")],
)
def test_bad_windows_are_refused(num_tokens: int, window: int, stride: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make_windows(num_tokens, window, stride)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, PreTrainedModel, LLMEngine]:
    folder = tmp_path_factory.mktemp("tiny")
    reference = save_tiny_model(folder, "llama")
    args = EngineArgs(
        model=str(folder), device="cpu", dtype="float32", skip_tokenizer_init=True, num_gpu_blocks_override=64
    )
    return str(folder), reference, LLMEngine.from_engine_args(args)


def reference_nats(model: PreTrainedModel, tokens: list[int], window: int, stride: int) -> float:
    """The sum over positions of -log p, each from the first window that holds it, one by one."""
    total = 0.0
    for position in range(1, len(tokens)):
        start = 0
        while start + window <= position:
            start += stride
        with torch.inference_mode():
            logits = model(torch.tensor([tokens[start:position]])).logits[0, -1]
        total -= float(F.log_softmax(logits.double(), dim=-1)[tokens[position]])
    return total / (len(tokens) - 1)


@pytest.mark.parametrize("window,stride", [(16, 8), (16, 15), (7, 1), (80, 40)])
def test_perplexity_is_that_of_the_reference(
    tiny: tuple[str, PreTrainedModel, LLMEngine], window: int, stride: int
) -> None:
    _, reference, engine = tiny
    tokens = torch.randint(3, VOCAB_SIZE, (61,), generator=torch.Generator().manual_seed(window)).tolist()
    result = measure_perplexity(engine, tokens, window, stride, use_tqdm=False)
    expected = reference_nats(reference, tokens, window, stride)
    assert result.nats_per_token == pytest.approx(expected, abs=1e-4)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-3)
    assert (result.num_tokens, result.num_scored_tokens) == (61, 60)
    assert result.num_windows == len(make_windows(61, window, stride))
    assert result.window == window and result.stride == stride and result.seconds > 0


@pytest.mark.badinput
def test_a_window_beyond_the_model_is_refused(tiny: tuple[str, PreTrainedModel, LLMEngine]) -> None:
    with pytest.raises(ValueError, match=r"window=256 .*\[2, 255\]"):
        measure_perplexity(tiny[2], list(range(3, 99)), 256, 10)


# The command


@pytest.fixture
def commanded(tiny: tuple[str, PreTrainedModel, LLMEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command with the tiny model and a tokenizer of one token per character."""
    folder, _, engine = tiny
    text = "Wisdom begins in wonder. " * 6
    (tmp_path / "text.txt").write_text(text)
    tokenizer = SimpleNamespace(encode=lambda content: [ord(c) for c in content])
    monkeypatch.setattr(engine, "tokenizer", tokenizer)
    asked: list[EngineArgs] = []

    def from_engine_args(args: EngineArgs) -> LLMEngine:
        asked.append(args)
        return engine

    monkeypatch.setattr(LLMEngine, "from_engine_args", staticmethod(from_engine_args))

    def run(*flags: str) -> int:
        return main(["eval", "perplexity", folder, str(tmp_path / "text.txt"), *flags])

    return SimpleNamespace(run=run, text=text, engine=engine, asked=asked, folder=folder)


def test_command_prints_json(commanded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert commanded.run("--json", "--window", "20", "--stride", "5", "--dtype", "float32") == 0
    record = json.loads(capsys.readouterr().out)
    expected = measure_perplexity(commanded.engine, [ord(c) for c in commanded.text], 20, 5, use_tqdm=False)
    assert record["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert record["num_tokens"] == len(commanded.text) == 150
    assert record["num_scored_tokens"] == 149
    assert (record["window"], record["stride"], record["model"]) == (20, 5, commanded.folder)
    assert commanded.asked[0].model == commanded.folder and commanded.asked[0].dtype == "float32"


def test_command_prints_text_and_has_defaults(commanded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert commanded.run("--max-tokens", "40") == 0
    out = capsys.readouterr().out
    assert out.startswith("perplexity ")
    assert "40 tokens, 39 scored, 1 windows of 255 tokens, stride 127" in out


@pytest.mark.badinput
@pytest.mark.parametrize(
    "flags,code",
    [
        (["--window", "1"], 2),
        (["--stride", "0"], 2),
        (["--max-tokens", "1"], 2),
        (["--model", "other"], 2),
        (["--window", "8", "--stride", "8"], 1),
        (["--window", "999"], 1),
    ],
)
def test_command_refuses(commanded: Any, flags: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert commanded.run(*flags) == code
    assert "error: " in capsys.readouterr().err


@pytest.mark.badinput
def test_command_refuses_a_missing_file(commanded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "perplexity", commanded.folder, "absent.txt"]) == 1
    assert "absent.txt" in capsys.readouterr().err
