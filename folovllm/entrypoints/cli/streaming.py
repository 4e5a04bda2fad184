"""Driving the engine for a person who watches: step by step, with a clock beside it and Ctrl-C between steps.

How times are taken: see `Answer`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from folovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from folovllm.engine.llm_engine import LLMEngine
    from folovllm.outputs import CompletionOutput, Logprob, RequestOutput


@dataclass
class Answer:
    """One sample of one prompt while it grows, and its times.

    Times are `time.perf_counter()` seconds. `start_s` is when the prompt was handed over, before chat
    template and tokenizer; loading the model is never part of it. A token is there when the engine step that
    made it has returned with its text. Prompts given together start together: waiting behind others is part
    of `ttft_s`.
    """

    prompt_index: int
    """Place of the prompt on the command line."""
    index: int
    """Sample, 0 to n - 1."""
    start_s: float
    """When the prompt was handed over."""
    pieces: list[str] = field(default_factory=list)
    """Text, as it came."""
    token_ids: list[int] = field(default_factory=list)
    """Output tokens."""
    logprobs: list[dict[int, Logprob]] | None = None
    """Per output token, where asked for."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """Per prompt token, where asked for; one list for all samples of a prompt."""
    cumulative_logprob: float | None = None
    """Sum over the output tokens, where logprobs were asked for."""
    num_prompt_tokens: int = 0
    """Known with the first output."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache held."""
    finish_reason: str | None = None
    """None while it grows."""
    stop_reason: int | str | None = None
    """What ended it, where something did."""
    first_s: float | None = None
    """When the first token was there."""
    last_s: float | None = None
    """When the last token was there."""
    num_first_tokens: int = 0
    """Tokens that came at `first_s`: one, unless the engine hands out several at a time."""

    def add(self, request: RequestOutput, delta: CompletionOutput, now_s: float) -> None:
        """Append what one step brought for this sample."""
        self.num_prompt_tokens = len(request.prompt_token_ids or ())
        self.num_cached_tokens = request.num_cached_tokens or 0
        if delta.text:
            self.pieces.append(delta.text)
        if delta.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs.extend(delta.logprobs)
            self.cumulative_logprob = delta.cumulative_logprob
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        if not delta.token_ids:
            return
        self.token_ids.extend(delta.token_ids)
        if self.first_s is None:
            self.first_s = now_s
            self.num_first_tokens = len(self.token_ids)
        self.last_s = now_s

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self.pieces)

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token; None before it."""
        return None if self.first_s is None else self.first_s - self.start_s

    @property
    def total_s(self) -> float | None:
        """Seconds to the last token; None before any."""
        return None if self.last_s is None else self.last_s - self.start_s

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first, by the seconds they took: the speed of decoding. None for one token."""
        if self.first_s is None or self.last_s is None or self.last_s <= self.first_s:
            return None
        return (len(self.token_ids) - self.num_first_tokens) / (self.last_s - self.first_s)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C only set a flag, which the yielded function reads; a second Ctrl-C raises KeyboardInterrupt.

    An exception out of the middle of an engine step would leave the scheduler and the worker at odds; between
    two steps a request can be aborted cleanly. Outside the main thread, which alone may handle signals, this
    does nothing.
    """
    interrupted = False

    def on_sigint(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, on_sigint)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if previous is None else previous)


def stream_answers(
    engine: LLMEngine,
    prompts: Sequence[Any],
    params: SamplingParams,
    start_s: float,
    stop: Callable[[], bool],
    request_prefix: str = "generate",
) -> Iterator[list[Answer]]:
    """Run `prompts`, yielding all answers after each engine step; they are the same objects every time.

    Answers are ordered by prompt, then sample. Closing the iterator aborts what still runs.

    Args:
        engine: runs nothing else meanwhile.
        prompts: as `LLMEngine.add_request` takes them; all are checked before the first step.
        params: for all of them; DELTA output.
        start_s: when the prompts were handed over (see Answer).
        stop: asked after each step; once true, what still runs is aborted and the iterator ends.
        request_prefix: request ids are this and the prompt's place; new for each call on one engine.

    Raises:
        ValueError: a prompt or parameter that the engine refuses; nothing has run then.
    """
    answers = [Answer(p, i, start_s) for p in range(len(prompts)) for i in range(params.n)]
    running: dict[str, int] = {}
    try:
        for p, prompt in enumerate(prompts):
            request_id = f"{request_prefix}-{p}"
            try:
                engine.add_request(request_id, prompt, params.clone())
            except ValueError as error:
                where = f"prompt {p + 1} of {len(prompts)}: " if len(prompts) > 1 else ""
                raise ValueError(f"{where}{error}") from error
            running[request_id] = p
        while running:
            _step(engine, running, answers, params.n)
            yield answers
            if running and stop():
                engine.abort_request(list(running))
                return
    except (ValueError, GeneratorExit):
        # Other exceptions mean that the engine is broken: it is not asked for anything more.
        if running:
            engine.abort_request(list(running))
        raise


def _step(engine: LLMEngine, running: dict[str, int], answers: list[Answer], n: int) -> None:
    """Take one engine step, give each answer its share and remove from `running` what has finished."""
    if not engine.has_unfinished_requests():
        raise RuntimeError(f"the engine lost these requests: {', '.join(running)}")
    outputs = engine.step()
    now_s = time.perf_counter()
    for request in outputs:
        first = running[request.request_id] * n
        samples = answers[first : first + n]
        for delta in request.outputs:
            samples[delta.index].add(request, delta, now_s)
        if request.prompt_logprobs:  # comes once, with whichever sample is first; empty afterwards
            for answer in samples:
                answer.prompt_logprobs = request.prompt_logprobs
        if request.finished:
            del running[request.request_id]


def count(n: int, noun: str) -> str:
    """Return "1 noun", "2 nouns"."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def closing_line(answer: Answer, max_tokens: int | None) -> str:
    """Return "[N prompt tokens, N output tokens, TTFT S s, X tokens/s]", and why where the text was cut."""
    cached = f" ({answer.num_cached_tokens} cached)" if answer.num_cached_tokens else ""
    prompt_tokens = count(answer.num_prompt_tokens, "prompt token")
    parts = [f"{prompt_tokens}{cached}", count(len(answer.token_ids), "output token")]
    if answer.ttft_s is not None:
        parts.append(f"TTFT {answer.ttft_s:.3f} s")
    if answer.tokens_per_s is not None:
        parts.append(f"{answer.tokens_per_s:.1f} tokens/s")
    if answer.finish_reason == "length":
        at_max_tokens = max_tokens is not None and len(answer.token_ids) >= max_tokens
        parts.append(f"cut at --max-tokens {max_tokens}" if at_max_tokens else "cut: max_model_len reached")
    elif answer.finish_reason == "abort":
        parts.append(f"aborted: {answer.stop_reason}" if answer.stop_reason else "aborted")
    return f"[{', '.join(parts)}]"
