"""`folovllm generate "prompt" ...`: answer prompts given on the command line.

All prompts run together; answers are printed in their order, each streaming while it is the first unfinished.
vLLM's `complete` (`entrypoints/cli/openai.py`) asks a running server; this runs the engine in the process.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from folovllm.engine.arg_utils import EngineArgs
from folovllm.entrypoints.cli.common import (
    SAMPLING_PREFIX,
    Screen,
    UsageError,
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
    from folovllm.outputs import Logprob
    from folovllm.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 128
MIN_LOGPROB = -9999.0
"""Stands for a log probability of minus infinity, which JSON cannot hold (vLLM's server does the same)."""

_DESCRIPTION = """\
Answer prompts. Each is put into the model's chat template, if it has one; --raw continues the text as it
stands. The answers go to stdout as they come, each with a closing line: prompt tokens, output tokens,
seconds from handing the prompts over to the first token (TTFT; loading the model is not part of it), and
tokens per second after the first."""


def add_subparser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the parser of `folovllm generate`."""
    parser = subparsers.add_parser(
        "generate",
        help="answer prompts given on the command line",
        description=_DESCRIPTION,
        usage="folovllm generate [flags] PROMPT [PROMPT ...]",
        allow_abbrev=False,
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help='text; "-" reads one prompt from stdin')
    parser.add_argument("--raw", action="store_true", help="continue the text, without a chat template")
    add_chat_args(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object per answer and line, nothing else")
    parser.add_argument("-q", "--quiet", action="store_true", help="print the text alone")
    add_sampling_args(parser, max_tokens=DEFAULT_MAX_TOKENS)
    samples = parser.add_argument_group("several answers, log probabilities")
    samples.add_argument("-n", "--n", dest=f"{SAMPLING_PREFIX}n", type=int, metavar="N", help="answers for each prompt")
    for name in ("logprobs", "prompt_logprobs"):
        samples.add_argument(
            f"--{name.replace('_', '-')}",
            dest=SAMPLING_PREFIX + name,
            type=int,
            metavar="N",
            help=f"with --json: log probabilities of {'prompt' if 'prompt' in name else 'drawn'} tokens "
            "and of the N best ones",
        )
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `folovllm generate` and return the exit code."""
    overrides = sampling_overrides(args)
    prompts = read_prompts(args.prompts, sys.stdin)
    template = read_chat_template(args.chat_template)
    if args.raw and (args.system is not None or template is not None):
        raise UsageError("--raw uses no chat template: leave out --system and --chat-template.")
    if not args.json and ("logprobs" in overrides or "prompt_logprobs" in overrides):
        raise UsageError("--logprobs and --prompt-logprobs need --json, which prints them.")
    llm = load_llm(args)
    return generate(
        llm,
        prompts,
        build_sampling_params(llm, overrides),
        raw=args.raw,
        system=args.system,
        chat_template=template,
        as_json=args.json,
        quiet=args.quiet,
    )


def read_prompts(prompts: Sequence[str], stdin: TextIO) -> list[str]:
    """Return the prompts with "-" replaced by what stdin holds, less one newline at its end.

    Raises:
        UsageError: a prompt that is empty or not UTF-8, or "-" given twice.
    """
    if list(prompts).count("-") > 1:
        raise UsageError('"-" (stdin) can be given once only.')
    texts = []
    for i, prompt in enumerate(prompts, start=1):
        try:
            # The bytes that the caller meant, whatever the locale made of them.
            raw = stdin.buffer.read() if prompt == "-" else prompt.encode("utf-8", "surrogateescape")
            text = raw.decode("utf-8")
        except UnicodeError as error:
            raise UsageError(f"prompt {i} is not UTF-8 text: {error}") from error
        if prompt == "-":
            text = text.removesuffix("\n").removesuffix("\r")
        if not text:
            raise UsageError(f"prompt {i} is empty.")
        texts.append(text)
    return texts


def generate(
    llm: LLM,
    prompts: list[str],
    params: SamplingParams,
    *,
    raw: bool = False,
    system: str | None = None,
    chat_template: str | None = None,
    as_json: bool = False,
    quiet: bool = False,
) -> int:
    """Answer `prompts` on stdout; 1 if the engine gave up on one of them, else 0.

    Raises:
        ValueError: the engine refuses a prompt or parameter, or a system message has no chat template.
        KeyboardInterrupt: Ctrl-C; what still ran has been aborted.
    """
    start_s = time.perf_counter()
    inputs = make_inputs(llm, prompts, raw, system, chat_template)
    with deferred_interrupt() as interrupted:
        steps = stream_answers(llm.llm_engine, inputs, params, start_s, stop=interrupted)
        if as_json:
            answers = print_json(steps, prompts, sys.stdout)
        else:
            answers = print_text(steps, prompts, params, Screen(sys.stdout, quiet))
        if not all(answer.finished for answer in answers):
            raise KeyboardInterrupt
    return int(any(answer.finish_reason == "abort" for answer in answers))


def make_inputs(llm: LLM, prompts: list[str], raw: bool, system: str | None, chat_template: str | None) -> list[Any]:
    """Return what the engine takes for each prompt: the text, or the tokens of a templated conversation."""
    if raw:
        return list(prompts)
    if chat_template is None and not has_chat_template(llm):
        if system is not None:
            raise ValueError("--system needs a chat template, and the model has none: give --chat-template.")
        print("The model has no chat template: the prompts are continued as they stand.", file=sys.stderr)
        return list(prompts)
    head = [] if system is None else [{"role": "system", "content": system}]
    return [
        llm.preprocess_chat([*head, {"role": "user", "content": text}], chat_template=chat_template) for text in prompts
    ]


def print_text(
    steps: Iterator[list[Answer]], prompts: list[str], params: SamplingParams, screen: Screen
) -> list[Answer]:
    """Print the answers for a person, each with its closing line, and return them."""
    several = len(prompts) * params.n > 1
    answers: list[Answer] = []
    current, num_headed, num_shown = 0, 0, 0
    for answers in steps:
        while current < len(answers):
            answer = answers[current]
            if several and num_headed == current:
                screen.note(_heading(answer, prompts, params.n))
                num_headed += 1
            screen.text("".join(answer.pieces[num_shown:]))
            num_shown = len(answer.pieces)
            if not answer.finished:
                break
            screen.note(closing_line(answer, params.max_tokens))
            current, num_shown = current + 1, 0
    screen.end_line()
    if several and current == len(answers):
        screen.note(_summary(answers))
    return answers


def _heading(answer: Answer, prompts: list[str], n: int) -> str:
    """Say which prompt, by its place and beginning, and which sample comes next."""
    text = " ".join(prompts[answer.prompt_index].split())
    beginning = text if len(text) <= 60 else f"{text[:57]}..."
    sample = f", answer {answer.index + 1} of {n}" if n > 1 else ""
    return f"--- prompt {answer.prompt_index + 1} of {len(prompts)}{sample}: {beginning}"


def _summary(answers: list[Answer]) -> str:
    """Say what all answers took together."""
    num_prompt_tokens = sum(answer.num_prompt_tokens for answer in answers if answer.index == 0)
    num_output_tokens = sum(len(answer.token_ids) for answer in answers)
    total_s = max((answer.total_s or 0.0 for answer in answers), default=0.0)
    rate = f", {num_output_tokens / total_s:.1f} output tokens/s" if total_s > 0 else ""
    return (
        f"[all {len(answers)} answers: {count(num_prompt_tokens, 'prompt token')}, "
        f"{count(num_output_tokens, 'output token')}, {total_s:.3f} s{rate}]"
    )


def print_json(steps: Iterator[list[Answer]], prompts: list[str], out: TextIO) -> list[Answer]:
    """Print one JSON object per answer, as soon as it and those before it have finished, and return them."""
    answers: list[Answer] = []
    current = 0
    for answers in steps:
        while current < len(answers) and answers[current].finished:
            record = answer_record(answers[current], prompts[answers[current].prompt_index])
            out.write(json.dumps(record, allow_nan=False) + "\n")
            out.flush()
            current += 1
    return answers


def answer_record(answer: Answer, prompt: str) -> dict[str, Any]:
    """Return the object that --json prints.

    Times are in seconds (see Answer); ttft_s, total_s and tokens_per_s are null where there was nothing to
    measure. `logprobs` and `prompt_logprobs` are there only if asked for.
    """
    record: dict[str, Any] = {
        "prompt_index": answer.prompt_index,
        "index": answer.index,
        "prompt": prompt,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "prompt_tokens": answer.num_prompt_tokens,
        "cached_tokens": answer.num_cached_tokens,
        "output_tokens": len(answer.token_ids),
        "ttft_s": answer.ttft_s,
        "total_s": answer.total_s,
        "tokens_per_s": answer.tokens_per_s,
    }
    if answer.logprobs is not None:
        record["cumulative_logprob"] = _finite(answer.cumulative_logprob)
        record["logprobs"] = [
            {**_entry(token_id, position[token_id]), "top": _entries(position)}
            for token_id, position in zip(answer.token_ids, answer.logprobs, strict=True)
        ]
    if answer.prompt_logprobs is not None:
        record["prompt_logprobs"] = [
            None if position is None else _entries(position) for position in answer.prompt_logprobs
        ]
    return record


def _entries(position: dict[int, Logprob]) -> list[dict[str, Any]]:
    """One position's tokens, the most likely first."""
    ranked = sorted(position.items(), key=lambda item: -item[1].logprob)
    return [_entry(token_id, logprob) for token_id, logprob in ranked]


def _entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
    return {
        "token_id": int(token_id),
        "token": logprob.decoded_token,
        "logprob": _finite(logprob.logprob),
        "rank": logprob.rank,
    }


def _finite(value: float | None) -> float | None:
    return None if value is None else max(float(value), MIN_LOGPROB)
