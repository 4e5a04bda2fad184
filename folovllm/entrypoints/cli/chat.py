"""`folovllm chat`: a conversation in the terminal, answers streaming as they are made.

vLLM's `chat` (`entrypoints/cli/openai.py`) asks a running server; this runs the engine in the process.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from folovllm.engine.arg_utils import EngineArgs
from folovllm.entrypoints.cli.common import (
    Screen,
    add_chat_args,
    add_sampling_args,
    build_sampling_params,
    has_chat_template,
    load_llm,
    read_chat_template,
    sampling_overrides,
)
from folovllm.entrypoints.cli.streaming import Answer, closing_line, count, deferred_interrupt, stream_answers

if TYPE_CHECKING:
    from folovllm.entrypoints.llm import LLM
    from folovllm.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 1024
"""Larger than generate's: an answer that is cut is worse here than a long one, which Ctrl-C ends."""
PROMPT = "> "
FENCE = '"""'

HELP = f"""\
/reset   forget the conversation (the system message stays)
/stats   tokens and times of this session, and how the engine was started
/help    this list
/exit    leave; so do the end of the input and Ctrl-C
{FENCE}      alone on a line begins and ends a message of several lines
Ctrl-C ends an answer that is being written. A message that begins with "/" is sent with a space before it."""


_DESCRIPTION = """\
Talk to a model. Answers stream as they are made; messages come from the terminal, or one a line from a
pipe. After each answer: prompt tokens (the whole conversation), output tokens, seconds from the message to
the first token (TTFT), and tokens per second after it. /help lists the commands of the conversation."""


def add_subparser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the parser of `folovllm chat`."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description=_DESCRIPTION,
        usage="folovllm chat [flags]",
        allow_abbrev=False,
    )
    add_chat_args(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print the answers alone")
    add_sampling_args(parser, max_tokens=DEFAULT_MAX_TOKENS)
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `folovllm chat` and return the exit code.

    Raises:
        ValueError: the model has no chat template.
    """
    overrides = sampling_overrides(args)
    template = read_chat_template(args.chat_template)
    llm = load_llm(args)
    if template is None and not has_chat_template(llm):
        raise ValueError(
            f"model={args.model!r} has no chat template: give one with --chat-template, or let it continue "
            "plain text with `folovllm generate --raw`."
        )
    params = build_sampling_params(llm, overrides)
    session = ChatSession(llm, params, Screen(sys.stdout, args.quiet), args.system, template)
    return converse(session, sys.stdin)


class ChatSession:
    """One conversation: its messages, what it took, and the commands."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        screen: Screen,
        system: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        """`params` are used for every answer and must ask for DELTA output."""
        self.llm = llm
        self.params = params
        self.screen = screen
        self.chat_template = chat_template
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._num_system = len(self.messages)
        self.answers: list[Answer] = []
        self.num_failed = 0
        self._num_requests = 0
        self._num_context_tokens = 0

    def handle(self, line: str) -> bool:
        """Run one line, a command or a message, and return whether the conversation goes on."""
        if not line.startswith("/"):
            if line.strip():
                self.ask(line.strip())
            return True
        command = line.strip()
        if command == "/exit":
            return False
        if command == "/reset":
            del self.messages[self._num_system :]
            self._num_context_tokens = 0
            self.screen.note("[conversation forgotten]")
        elif command == "/stats":
            self.screen.note(self.stats())
        elif command == "/help":
            self.screen.note(HELP)
        else:
            self._complain(f"no command {command.split()[0]!r}; /help lists them.")
        return True

    def ask(self, text: str) -> None:
        """Send a message and stream the answer.

        Ctrl-C ends the answer; what was written of it stays in the conversation. A message that the engine
        refuses is withdrawn, with the reason on stderr.
        """
        start_s = time.perf_counter()
        self.messages.append({"role": "user", "content": text})
        num_tokens = 0
        try:
            prompt: Any = self.llm.preprocess_chat(self.messages, chat_template=self.chat_template)
            num_tokens = len(prompt["prompt_token_ids"])
            answer = self._stream(prompt, start_s)
        except ValueError as error:
            self._withdraw(str(error), num_tokens)
            return
        self.answers.append(answer)
        self.screen.note(self._close(answer))
        if answer.text:
            self.messages.append({"role": "assistant", "content": answer.text})
            self._num_context_tokens = answer.num_prompt_tokens + len(answer.token_ids)
        else:
            # Two user messages in a row are more than many templates take.
            self.messages.pop()
        if answer.finish_reason == "abort":
            self._complain(f"the engine gave up on this answer: {answer.stop_reason or 'no reason given'}")

    def _stream(self, prompt: Any, start_s: float) -> Answer:
        """Print the answer as it grows and return it, unfinished if Ctrl-C ended it."""
        self._num_requests += 1
        num_shown = 0
        with deferred_interrupt() as interrupted:
            for (answer,) in stream_answers(
                self.llm.llm_engine, [prompt], self.params, start_s, interrupted, f"chat-{self._num_requests}"
            ):
                self.screen.text("".join(answer.pieces[num_shown:]))
                num_shown = len(answer.pieces)
        return answer

    def _close(self, answer: Answer) -> str:
        return ("" if answer.finished else "[interrupted] ") + closing_line(answer, self.params.max_tokens)

    def _withdraw(self, reason: str, num_tokens: int) -> None:
        """Take back the last message, and say so and what to do."""
        self.messages.pop()
        limit = self._max_model_len()
        too_long = f"{num_tokens} tokens, and the model takes {limit - 1} (max_model_len - 1)"
        if num_tokens < limit:
            self._complain(f"{reason}\nThe message was withdrawn.")
        elif len(self.messages) > self._num_system:
            self._complain(
                f"the conversation would have {too_long}. The message was withdrawn: /reset forgets the "
                "conversation and makes room."
            )
        else:
            self._complain(
                f"the message has {too_long}. It was withdrawn: shorten it, or start with a larger "
                "--max-model-len, if the model allows it."
            )

    def _complain(self, message: str) -> None:
        self.num_failed += 1
        self.screen.end_line()
        print(f"error: {message}", file=sys.stderr, flush=True)

    def _max_model_len(self) -> int:
        limit: int | None = self.llm.llm_engine.vllm_config.model_config.max_model_len
        assert limit is not None
        return limit

    def stats(self) -> str:
        """Return the session's totals and the engine's start-up report."""
        answers = self.answers
        num_prompt = sum(answer.num_prompt_tokens for answer in answers)
        num_cached = sum(answer.num_cached_tokens for answer in answers)
        num_output = sum(len(answer.token_ids) for answer in answers)
        totals = (
            count(len(answers), "answer"),
            f"{count(num_prompt, 'prompt token')} ({num_cached} cached)",
            count(num_output, "output token"),
        )
        lines = [", ".join(totals)]
        ttfts_s = [answer.ttft_s for answer in answers if answer.ttft_s is not None]
        if ttfts_s:
            lines.append(f"TTFT {sum(ttfts_s) / len(ttfts_s):.3f} s on average, {max(ttfts_s):.3f} s at most")
        rates = [answer.tokens_per_s for answer in answers if answer.tokens_per_s is not None]
        if rates:
            lines.append(f"{sum(rates) / len(rates):.1f} tokens/s on average, {min(rates):.1f} at least")
        used = f"{self._num_context_tokens} of {self._max_model_len()} tokens"
        lines.append(f"the conversation takes {used}")
        return "\n".join([*lines, self.llm.llm_engine.startup_report])


def converse(session: ChatSession, stdin: TextIO) -> int:
    """Run the conversation until /exit or the end of the input, and return the exit code.

    At a terminal the code is 0; from a pipe it is 1 if a message failed, so that a script learns of it.
    """
    interactive = stdin.isatty() and session.screen.out.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() line editing and history
        session.screen.note("Type a message, or /help.")
    for line in _messages(_lines(stdin, interactive)):
        if not session.handle(line):
            break
    return int(session.num_failed > 0 and not interactive)


def _lines(stdin: TextIO, interactive: bool) -> Iterator[str]:
    """Yield the lines of the input without their line ends, asking for each at a terminal."""
    while True:
        if interactive:
            try:
                yield input(PROMPT)
            except EOFError:
                print()
                return
        else:
            line = stdin.readline()
            if not line:
                return
            yield line.rstrip("\r\n")


def _messages(lines: Iterator[str]) -> Iterator[str]:
    """Yield the lines, those between two FENCE lines as one message."""
    for line in lines:
        if line.strip() != FENCE:
            yield line
            continue
        inside = []
        for part in lines:
            if part.strip() == FENCE:
                break
            inside.append(part)
        # The space keeps a first line with "/" from being a command.
        yield " " + "\n".join(inside)
