"""What `generate` and `chat` share: sampling and chat template flags, loading the model, the screen."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from folovllm.engine.arg_utils import EngineArgs
from folovllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

if TYPE_CHECKING:
    from folovllm.entrypoints.llm import LLM

SAMPLING_PREFIX = "sampling_"
"""A sampling flag is parsed into this plus its SamplingParams field: the engine has a `seed` too."""


class UsageError(ValueError):
    """The command line is wrong in a way that argparse does not see; exit code 2."""


_NUMBERS: tuple[tuple[str, type, str], ...] = (
    ("min-tokens", int, "no end of text before this many output tokens"),
    ("temperature", float, "0 is greedy"),
    ("top-p", float, "keep the best tokens whose probability reaches this, in (0, 1]"),
    ("top-k", int, "keep this many best tokens; 0 keeps all"),
    ("min-p", float, "drop tokens less likely than this times the best one, in [0, 1]"),
    ("presence-penalty", float, "lower tokens that are in the output, in [-2, 2]"),
    ("frequency-penalty", float, "lower tokens by how often they are in the output, in [-2, 2]"),
    ("repetition-penalty", float, "above 1 lowers tokens of prompt and output"),
)
_SWITCHES = (
    ("ignore-eos", "go on after the end-of-sequence token"),
    ("include-stop-str-in-output", "keep the stop text in the output"),
)
_TEXTS = (
    ("stop", "end the output at this text; may be repeated"),
    ("bad-words", "never write this; may be repeated"),
)
_TOKEN_IDS = (
    ("stop-token-ids", "end the output at one of these tokens"),
    ("allowed-token-ids", "draw only these tokens"),
)


def add_sampling_args(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Add the sampling flags, named as SamplingParams' fields; --max-tokens is `max_tokens` by default."""
    group = parser.add_argument_group(
        "sampling", "A flag that is not given leaves the model's own default (its generation_config.json)."
    )

    def add(name: str, **kwargs: Any) -> None:
        group.add_argument(f"--{name}", dest=SAMPLING_PREFIX + name.replace("-", "_"), **kwargs)

    text = f"most output tokens (default: {max_tokens})"
    add("max-tokens", type=int, metavar="N", default=max_tokens, help=text)
    for name, kind, text in _NUMBERS:
        add(name, type=kind, metavar="N" if kind is int else "X", help=text)
    group.add_argument("--sampling-seed", type=int, metavar="N", help="same seed, same draws (--seed is the engine's)")
    for name, text in _TEXTS:
        add(name, action="append", metavar="TEXT", help=text)
    for name, text in _TOKEN_IDS:
        add(name, action="extend", type=_token_ids, metavar="ID[,ID...]", help=text)
    text = "add VALUE to the logit of token ID; may be repeated"
    add("logit-bias", action="append", type=_logit_bias, metavar="ID=VALUE", help=text)
    for name, text in _SWITCHES:
        add(name, action="store_true", default=None, help=text)
    text = 'what the output must be: {"json": schema}, {"regex": ...}, {"choice": [...]}, {"grammar": ...} (xgrammar)'
    add("structured-outputs", type=_structured_outputs, metavar="JSON", help=text)
    text = "whether to leave special tokens out of the text"
    add("skip-special-tokens", action=argparse.BooleanOptionalAction, help=text)


def _token_ids(text: str) -> list[int]:
    """Parse "1,2,3"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a token id, or several with commas") from None


def _logit_bias(text: str) -> tuple[int, float]:
    """Parse "ID=VALUE"."""
    try:
        token_id, value = text.split("=")
        return int(token_id), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=VALUE, like 42=-1.5") from None


def _structured_outputs(text: str) -> StructuredOutputsParams:
    """Parse a JSON object of StructuredOutputsParams' fields."""
    try:
        return StructuredOutputsParams(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def sampling_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling flags that were given, as keywords of SamplingParams.

    Raises:
        UsageError: SamplingParams refuses one of them. Checked here, before a model is loaded.
    """
    given = {
        name.removeprefix(SAMPLING_PREFIX): value
        for name, value in vars(args).items()
        if name.startswith(SAMPLING_PREFIX) and value is not None
    }
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    try:
        SamplingParams(**given)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return given


def build_sampling_params(llm: LLM, overrides: dict[str, Any]) -> SamplingParams:
    """Return the model's default sampling parameters with `overrides` in their place, for streaming.

    Raises:
        ValueError: the two do not go together (n=2 with a model whose default is greedy, say).
    """
    defaults: SamplingParams = llm.get_default_sampling_params()
    return replace(defaults, **overrides, output_kind=RequestOutputKind.DELTA)


def add_chat_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a conversation becomes a prompt."""
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja chat template to use instead of the model's: a file, or the template itself",
    )


def read_chat_template(value: str | None) -> str | None:
    """Return the template that --chat-template names: a file's content, or the value itself if it has a "{".

    Raises:
        UsageError: neither a file nor a template.
    """
    if value is None or "{" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--chat-template {value!r} is no readable UTF-8 file: {error}") from error


def has_chat_template(llm: LLM) -> bool:
    """Return whether the model's tokenizer came with a chat template."""
    return getattr(llm.get_tokenizer(), "chat_template", None) is not None


def load_llm(args: argparse.Namespace) -> LLM:
    """Load the model that the engine flags name.

    What is printed meanwhile goes to stderr: stdout is for answers.

    Raises:
        ValueError: a flag or the model cannot be used; the message says why.
    """
    engine_args = EngineArgs.from_cli_args(args)
    from folovllm.entrypoints.llm import LLM  # imports torch: seconds, so not before it is needed

    with contextlib.redirect_stdout(sys.stderr):
        return LLM(**vars(engine_args))


_VISIBLE_CONTROLS: dict[int, int] = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


class Screen:
    """What a person reads on stdout: answers as they come, notes about them (dim on a terminal)."""

    def __init__(self, out: TextIO, quiet: bool = False) -> None:
        """`quiet` leaves the notes out."""
        self.out = out
        self.quiet = quiet
        self._terminal = out.isatty()
        self._dim = self._terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._at_line_start = True

    def text(self, text: str) -> None:
        """Write a piece of an answer at once."""
        if not text:
            return
        self._at_line_start = text.endswith("\n")
        self.out.write(self._visible(text))
        self.out.flush()

    def end_line(self) -> None:
        """Start a new line unless at the start of one."""
        if not self._at_line_start:
            self.out.write("\n")
            self._at_line_start = True
        self.out.flush()

    def note(self, text: str) -> None:
        """Write a line of its own that is not part of an answer."""
        self.end_line()
        if self.quiet:
            return
        text = self._visible(text)
        self.out.write(f"\x1b[2m{text}\x1b[0m\n" if self._dim else f"{text}\n")
        self.out.flush()

    def _visible(self, text: str) -> str:
        """Make control characters visible on a terminal: a model's text must not steer the cursor there."""
        return text.translate(_VISIBLE_CONTROLS) if self._terminal else text
