"""`folovllm chat`: the conversation, its commands, Ctrl-C, and messages that the engine refuses."""

from __future__ import annotations

import signal
import sys
from typing import Any

import pytest

from folovllm.entrypoints.cli.main import main
from folovllm.sampling_params import SamplingParams
from tests.fake_llm import FakeLLM, Stdin, Terminal, fake_clock, use


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    """A fake that the command loads."""
    fake = FakeLLM()
    use(monkeypatch, fake)
    return fake


def talk(monkeypatch: pytest.MonkeyPatch, lines: str, *flags: str) -> int:
    """Run the chat with `lines` piped in."""
    monkeypatch.setattr(sys, "stdin", Stdin(lines))
    return main(["chat", *flags])


def test_chat_keeps_the_history_until_reset(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_clock(monkeypatch, llm.llm_engine)
    assert talk(monkeypatch, "one\n\n  two \n/reset\nthree", "--system", "S") == 0
    assert llm.seen_texts == [
        "<system>S<user>one<assistant>",
        "<system>S<user>one<assistant>Hello world<user>two<assistant>",
        "<system>S<user>three<assistant>",
    ]
    out = capsys.readouterr().out
    closing = "[29 prompt tokens (3 cached), 4 output tokens, TTFT 2.000 s, 2.0 tokens/s]"
    assert out.startswith(f"Hello world\n{closing}\nHello world\n[")
    assert out.count("Hello world\n[") == 3 and "[conversation forgotten]\n" in out


def test_chat_streams(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    seen: list[str] = []
    llm.llm_engine.on_step = lambda step: seen.append(out.getvalue())
    assert talk(monkeypatch, "Hi", "--quiet") == 0
    assert seen == ["", "He", "Hello", "Hello wor"] and out.getvalue() == "Hello world\n"


def test_chat_commands(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_clock(monkeypatch, llm.llm_engine)
    assert talk(monkeypatch, "/stats\nHi\n/stats\n/reset\n/stats\n/help\n/exit\nnever sent\n") == 0
    assert llm.seen_texts == ["<user>Hi<assistant>"], "nothing after /exit"
    out = capsys.readouterr().out
    assert out.startswith(
        "0 answers, 0 prompt tokens (0 cached), 0 output tokens\n"
        "the conversation takes 0 of 200 tokens\nfake model, no backend\nHello world\n"
    )
    assert (
        "1 answer, 19 prompt tokens (3 cached), 4 output tokens\nTTFT 2.000 s on average, 2.000 s at most\n"
        "2.0 tokens/s on average, 2.0 at least\nthe conversation takes 23 of 200 tokens\n"
    ) in out
    assert out.count("the conversation takes 0 of 200 tokens\n") == 2, "/reset empties it"
    assert all(f"{command} " in out for command in ("/reset", "/stats", "/help", "/exit"))


@pytest.mark.badinput
def test_chat_unknown_command_is_not_sent(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = talk(monkeypatch, "/etc is what?\n /etc is what?\n")
    err = capsys.readouterr().err
    if code != 1 or "error: no command '/etc'; /help" not in err:
        pytest.fail(f"{code}: {err}")
    if llm.seen_texts != ["<user>/etc is what?<assistant>"]:
        pytest.fail(f"{llm.seen_texts}")


def test_chat_message_of_several_lines(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert talk(monkeypatch, '"""\n/a\n\n  b\n"""\nlast\n') == 0
    assert [m["content"] for m in llm.conversations[0][0]] == ["/a\n\n  b"]
    assert llm.conversations[1][0][-1]["content"] == "last"


@pytest.mark.badinput
def test_chat_that_outgrew_the_model_withdraws_the_message(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "x" * 170
    code = talk(monkeypatch, f"Hi\n{long}\nHo\n/reset\n{long}\n{long}{long}\n")
    err = capsys.readouterr().err
    conversation, message = err.splitlines()
    expected = [
        "<user>Hi<assistant>Hello world<user>Ho<assistant>",
        f"<user>{long}<assistant>",
    ]
    if code != 1 or llm.seen_texts[1:] != expected:
        pytest.fail(f"{code}: {llm.seen_texts}")
    if "217 tokens, and the model takes 199" not in conversation or "/reset" not in conversation:
        pytest.fail(conversation)
    # The message alone is too long, but there is a conversation before it.
    if "/reset" not in message or "withdrawn" not in message:
        pytest.fail(message)


@pytest.mark.badinput
def test_chat_first_message_too_long_asks_to_shorten_it(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = talk(monkeypatch, "x" * 300)
    err = capsys.readouterr().err
    if code != 1 or "shorten it" not in err or "/reset" in err or "317 tokens" not in err:
        pytest.fail(f"{code}: {err}")


@pytest.mark.badinput
def test_chat_other_refusals_keep_the_conversation(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add = llm.llm_engine.add_request

    def refuse_twos(request_id: str, prompt: Any, params: SamplingParams) -> None:
        if prompt["prompt"].endswith("two<assistant>"):
            raise ValueError("no twos")
        add(request_id, prompt, params)

    monkeypatch.setattr(llm.llm_engine, "add_request", refuse_twos)
    code = talk(monkeypatch, "one\ntwo\nthree\n")
    err = capsys.readouterr().err
    if code != 1 or err != "error: no twos\nThe message was withdrawn.\n":
        pytest.fail(f"{code}: {err}")
    if llm.seen_texts[-1] != "<user>one<assistant>Hello world<user>three<assistant>":
        pytest.fail(f"{llm.seen_texts}")


def test_chat_ctrl_c_ends_the_answer_and_keeps_what_was_written(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.llm_engine.on_step = lambda step: signal.raise_signal(signal.SIGINT) if step == 2 else None
    assert talk(monkeypatch, "one\ntwo\n") == 0
    assert llm.llm_engine.aborted == ["chat-1-0"]
    assert llm.seen_texts[1] == "<user>one<assistant>Hello<user>two<assistant>"
    out = capsys.readouterr().out
    assert out.startswith("Hello\n[interrupted] [20 prompt tokens (3 cached), 2 output tokens, TTFT")
    assert "Hello world\n[" in out


def test_chat_answer_without_text_withdraws_the_message(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.llm_engine.script["chat-1-0"] = [""]
    assert talk(monkeypatch, "one\ntwo\n") == 0
    assert llm.seen_texts[1] == "<user>two<assistant>"


def test_chat_engine_gives_up(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.llm_engine.finish_reason, llm.llm_engine.stop_reason = "abort", "the KV cache is full"
    assert talk(monkeypatch, "one\n") == 1
    captured = capsys.readouterr()
    assert "the engine gave up on this answer: the KV cache is full" in captured.err


@pytest.mark.badinput
def test_chat_needs_a_template(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.chat_template = None
    code = talk(monkeypatch, "Hi\n", "--model", "base")
    err = capsys.readouterr().err
    if code != 1 or "model='base' has no chat template" not in err or llm.seen_texts:
        pytest.fail(f"{code}: {err}")
    if talk(monkeypatch, "Hi\n", "--chat-template", "{{ mine }}") != 0:
        pytest.fail("a template of one's own was refused")
    if llm.conversations != [([{"role": "user", "content": "Hi"}], "{{ mine }}")]:
        pytest.fail(f"{llm.conversations}")


@pytest.mark.parametrize("last,code", [(EOFError, 0), (KeyboardInterrupt, 130)])
def test_chat_at_a_terminal(
    last: type[BaseException],
    code: int,
    llm: FakeLLM,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed = iter(["Hi", "/nonsense", "", last])

    def ask(prompt: str) -> str:
        assert prompt == "> "
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    out = Terminal()
    monkeypatch.setattr(sys, "stdin", Stdin("", terminal=True))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr("builtins.input", ask)
    assert main(["chat"]) == code, "a failed message is no failure of a session with a person"
    assert llm.seen_texts == ["<user>Hi<assistant>"]
    assert "Type a message, or /help." in out.getvalue()
    assert capsys.readouterr().err == "error: no command '/nonsense'; /help lists them.\n" + (
        "interrupted\n" if code else ""
    )
