"""`folovllm generate`: what a person and a machine read."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from folovllm.entrypoints.cli import common
from folovllm.entrypoints.cli.main import main
from tests.fake_llm import FakeLLM, Stdin, Terminal, fake_clock, use


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    """A fake that the command loads."""
    fake = FakeLLM()
    use(monkeypatch, fake)
    return fake


def test_one_prompt_streams_and_ends_with_the_closing_line(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "dumb")
    fake_clock(monkeypatch, llm.llm_engine)
    seen: list[str] = []
    llm.llm_engine.on_step = lambda step: seen.append(out.getvalue())
    assert main(["generate", "Hi"]) == 0
    assert seen == ["", "He", "Hello", "Hello wor"], "each step's text is out before the next step"
    # TTFT 2 s; three tokens in the 1.5 s after it.
    closing = "[19 prompt tokens (3 cached), 4 output tokens, TTFT 2.000 s, 2.0 tokens/s]"
    assert out.getvalue() == f"Hello world\n{closing}\n"


def test_answers_of_several_prompts_come_in_their_order(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_clock(monkeypatch, llm.llm_engine)
    llm.llm_engine.script = {"generate-0": ["a", "b", "c"], "generate-1": ["z"]}
    assert main(["generate", "First\nline", "x" * 100]) == 0
    assert llm.llm_engine.num_steps == 3, "they run together"
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "--- prompt 1 of 2: First line",
        "abc",
        "[27 prompt tokens (3 cached), 3 output tokens, TTFT 2.000 s, 2.0 tokens/s]",
        f"--- prompt 2 of 2: {'x' * 57}...",
        "z",
        "[117 prompt tokens (3 cached), 1 output token, TTFT 2.000 s]",
        "[all 2 answers: 144 prompt tokens, 4 output tokens, 3.000 s, 1.3 output tokens/s]",
    ]


def test_samples_are_told_apart(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Hi", "--n", "2"]) == 0
    out = capsys.readouterr().out
    first, second = out.split("--- prompt 1 of 1, answer 2 of 2: Hi\n")
    assert first.startswith("--- prompt 1 of 1, answer 1 of 2: Hi\nHello world\n")
    assert second.startswith("HELLO WORLD\n")
    assert "[all 2 answers: 19 prompt tokens, 8 output tokens" in second, "the prompt counts once"


def test_quiet_prints_the_text_alone(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-q", "Hi", "Ho"]) == 0
    assert capsys.readouterr().out == "Hello world\nHello world\n"


@pytest.mark.parametrize(
    "flags,limit,told",
    [(["--max-tokens", "2"], 2, "cut at --max-tokens 2"), ([], 9, "cut: max_model_len reached")],
)
def test_a_cut_answer_says_so(
    flags: list[str], limit: int, told: str, llm: FakeLLM, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.llm_engine.finish_reason = "length"
    assert main(["generate", "Hi", *flags]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"{told}]")


def test_an_answer_that_the_engine_gave_up_is_an_error(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.llm_engine.finish_reason, llm.llm_engine.stop_reason = "abort", "the KV cache is full"
    assert main(["generate", "Hi"]) == 1
    assert "aborted: the KV cache is full]" in capsys.readouterr().out


def test_the_chat_template_is_the_default_and_raw_leaves_it_out(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["generate", "Hi", "--system", "Be kind"])
    main(["generate", "Hi", "--raw"])
    template = tmp_path / "t.jinja"
    template.write_text("é{{ messages }}", encoding="utf-8")
    main(["generate", "Hi", "--chat-template", str(template)])
    main(["generate", "Hi", "--chat-template", "{{ inline }}"])
    assert llm.seen_texts == ["<system>Be kind<user>Hi<assistant>", "Hi", *["<user>Hi<assistant>"] * 2]
    assert [template for _, template in llm.conversations] == [None, "é{{ messages }}", "{{ inline }}"]

    llm.chat_template = None
    capsys.readouterr()
    assert main(["generate", "plain"]) == 0
    assert llm.seen_texts[-1] == "plain" and "no chat template" in capsys.readouterr().err
    assert main(["generate", "Hi", "--system", "s"]) == 1
    assert "--system needs a chat template" in capsys.readouterr().err


def test_dash_reads_stdin(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin("two\nlines é\n\n"))
    assert main(["generate", "--raw", "a", "-"]) == 0
    assert llm.seen_texts == ["a", "two\nlines é\n"], "one newline at the end belongs to the shell"


@pytest.mark.badinput
@pytest.mark.parametrize("content,message", [(b"\xff\xfe", "not UTF-8"), (b"\n", "is empty")])
def test_unusable_stdin(
    content: bytes,
    message: str,
    llm: FakeLLM,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(content))
    code = main(["generate", "-"])
    err = capsys.readouterr().err
    if code != 2 or message not in err:
        pytest.fail(f"{code}: {err}")


KEYS = [
    "prompt_index",
    "index",
    "prompt",
    "text",
    "token_ids",
    "finish_reason",
    "stop_reason",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "ttft_s",
    "total_s",
    "tokens_per_s",
]


def test_json_lines(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_clock(monkeypatch, llm.llm_engine)
    llm.llm_engine.script["generate-1"] = ["é\n"]
    llm.llm_engine.stop_reason = "STOP"
    assert main(["generate", "Hi", "ü", "--json", "-n", "2"]) == 0
    captured = capsys.readouterr()
    records = [json.loads(line) for line in captured.out.splitlines()]
    assert captured.err == ""
    assert [list(record) for record in records] == [KEYS] * 4
    assert [(r["prompt_index"], r["index"]) for r in records] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert records[1] == {
        "prompt_index": 0,
        "index": 1,
        "prompt": "Hi",
        "text": "HELLO WORLD",
        "token_ids": [2, 3, 4, 2],
        "finish_reason": "stop",
        "stop_reason": "STOP",
        "prompt_tokens": 19,
        "cached_tokens": 3,
        "output_tokens": 4,
        "ttft_s": 2.0,
        "total_s": 3.5,
        "tokens_per_s": 2.0,
    }
    assert records[2]["prompt"] == "ü" and records[2]["text"] == "é\n"
    assert records[2]["tokens_per_s"] is None, "one token has no decoding speed"


def test_json_logprobs(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.llm_engine.script["generate-0"] = ["a", "bc"]
    assert main(["generate", "Hi", "--raw", "--json", "--logprobs", "2", "--prompt-logprobs", "0"]) == 0
    record = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
    assert list(record) == [*KEYS, "cumulative_logprob", "logprobs", "prompt_logprobs"]
    assert record["cumulative_logprob"] == -3.0
    assert [entry["token"] for entry in record["logprobs"]] == ["a", "bc"]
    likeliest = {"token_id": 7, "token": "x", "logprob": -0.5, "rank": 1}
    drawn = {"token_id": 1, "token": "a", "logprob": -1.5, "rank": 2}
    never = {"token_id": 99, "token": "never", "logprob": -9999.0, "rank": 3}
    assert record["logprobs"][0] == {**drawn, "top": [likeliest, drawn, never]}
    second = {"token_id": ord("i"), "token": "i", "logprob": -0.25, "rank": 1}
    assert record["prompt_logprobs"] == [None, [second]]


def test_json_prompt_logprobs_are_with_every_sample(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine sends them once, with whichever sample comes first."""
    assert main(["generate", "Hi", "--raw", "--json", "-n", "2", "--prompt-logprobs", "0"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == 2 and len(records[0]["prompt_logprobs"]) == 2
    assert records[0]["prompt_logprobs"] == records[1]["prompt_logprobs"]


def test_json_comes_as_soon_as_its_turn_is_there(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.llm_engine.script = {"generate-0": ["a"], "generate-1": ["b", "c", "d"], "generate-2": ["e", "f"]}
    seen: list[int] = []
    llm.llm_engine.on_step = lambda step: seen.append(capsys.readouterr().out.count("\n"))
    assert main(["generate", "1", "2", "3", "--json"]) == 0
    assert seen == [0, 1, 0] and capsys.readouterr().out.count("\n") == 2


def test_notes_are_dim_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def written(out: io.StringIO) -> str:
        screen = common.Screen(out)
        screen.text("a")
        screen.note("b")
        return out.getvalue()

    assert written(Terminal()) == "a\n\x1b[2mb\x1b[0m\n"
    assert written(io.StringIO()) == "a\nb\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert written(Terminal()) == "a\nb\n"


def test_a_model_cannot_steer_the_terminal() -> None:
    attack = "\x1b]0;title\x07\x9b2J\r\x7f\ttab\n"
    terminal, pipe = Terminal(), io.StringIO()
    common.Screen(terminal).text(attack)
    common.Screen(pipe).text(attack)
    assert terminal.getvalue() == "␛]0;title␇\ufffd2J␍␡\ttab\n"
    assert pipe.getvalue() == attack, "a file gets the text as it is"
