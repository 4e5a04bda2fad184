"""Incremental detokenization and stop strings (vLLM: `v1/engine/detokenizer.py`).

Tokens cannot be turned into text one by one: a character may be spread over several tokens, and some decoders
treat the first token of a text differently (they drop its leading space). So a short window of tokens is
decoded at every step, and only what is new in its text, and cannot change any more, is handed on:

    tokens of prompt and output    ... | context | not fully handed on | new |
    window                             |---------------------------------------|
    its text                           |  sent   | new and certain | �  <- held back: may become a character

Text thus runs at most one unfinished character behind the tokens; `flush` hands on what never became one.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

from tokenizers import Tokenizer

from folovllm.request import EngineCoreRequest
from folovllm.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"
"""What decoders put where bytes are no (or not yet) valid UTF-8."""
MAX_UNFINISHED = 3
"""Most bytes, hence replacement characters, of an unfinished character: UTF-8 has up to 4 bytes each."""
MAX_WINDOW_TOKENS = 12
"""Length at which the window is shortened: bounds the work per token, whatever the model emits."""


class IncrementalDetokenizer:
    """Collects token ids, makes no text: for requests without a tokenizer, and as the others' interface."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []

    @classmethod
    def from_new_request(cls, tokenizer: Any, request: EngineCoreRequest) -> IncrementalDetokenizer:
        """Return the detokenizer for a request.

        Args:
            tokenizer: None (no text is made), a transformers tokenizer, or any object with
                `decode(ids, skip_special_tokens=...)`.
            request: its sampling parameters say what text is wanted and which strings end it.
        """
        if tokenizer is None:
            return IncrementalDetokenizer()
        if isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
            return FastIncrementalDetokenizer(tokenizer, request)
        return SlowIncrementalDetokenizer(tokenizer, request)

    @property
    def output_token_ids(self) -> list[int]:
        """Output tokens so far; a live list, copy it to keep it."""
        return self.token_ids

    def num_output_tokens(self) -> int:
        """Return the number of output tokens so far."""
        return len(self.token_ids)

    def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        """Take in new tokens; return the stop string that their text completes, if any.

        `stop_terminated`: the last one is a stop token, whose text is left out unless
        include_stop_str_in_output asks for it. After a stop string nothing more may be given.
        """
        self.token_ids.extend(new_token_ids)
        return None

    def flush(self) -> str | None:
        """Hand on what was held back, at the end of the output; return the stop string that this completes.

        Does nothing the second time, or after a stop string.
        """
        return None

    def get_next_output_text(self, finished: bool, delta: bool) -> str:
        """Return the text so far, or with `delta` what is new since the last call.

        Unless `finished`, the last characters are kept back if a stop string might begin there that would be
        cut.
        """
        return ""


class BaseIncrementalDetokenizer(IncrementalDetokenizer, ABC):
    """Stop strings and hold-back; how tokens become text is left to subclasses."""

    def __init__(self, request: EngineCoreRequest) -> None:
        super().__init__()
        params = request.sampling_params
        self.stop: list[str] = [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
        self.min_tokens = params.min_tokens
        self.include_stop_str_in_output = params.include_stop_str_in_output
        self.output_text = ""
        # Characters that may be the beginning of a stop string, which must then never have been shown.
        self.stop_buffer_length = 0
        if self.stop and not self.include_stop_str_in_output:
            self.stop_buffer_length = max(map(len, self.stop)) - 1
        self._last_output_text_offset = 0
        self._ended = False

    @abstractmethod
    def decode_next(self, next_token_id: int) -> str:
        """Return the text that becomes certain with this token (already appended to `token_ids`)."""

    def decode_rest(self) -> str:
        """Return the text of what decode_next still holds back, at the end of the output."""
        return ""

    def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        """See IncrementalDetokenizer.update."""
        silent = stop_terminated and not self.include_stop_str_in_output
        check_from = len(self.output_text)
        for token_id in new_token_ids[:-1] if silent else new_token_ids:
            self.token_ids.append(token_id)
            self.output_text += self.decode_next(token_id)
            if len(self.token_ids) <= self.min_tokens:
                # What the first min_tokens tokens say cannot stop the request, now or later.
                check_from = len(self.output_text)
        if silent:
            self.token_ids.extend(new_token_ids[-1:])
        return self._cut_at_stop_string(check_from)

    def flush(self) -> str | None:
        """See IncrementalDetokenizer.flush."""
        if self._ended:
            return None
        self._ended = True
        check_from = len(self.output_text)
        self.output_text += self.decode_rest()
        return self._cut_at_stop_string(check_from)

    def _cut_at_stop_string(self, check_from: int) -> str | None:
        """End the text at the first stop string that is complete only with output_text[check_from:]."""
        if not self.stop or len(self.token_ids) <= self.min_tokens:
            return None
        num_new_chars = len(self.output_text) - check_from
        found = check_stop_strings(self.output_text, num_new_chars, self.stop, self.include_stop_str_in_output)
        if found is None:
            return None
        stop_string, truncate_to = found
        if truncate_to != -1:
            self.output_text = self.output_text[:truncate_to]
        self._ended = True
        return stop_string

    def get_next_output_text(self, finished: bool, delta: bool) -> str:
        """See IncrementalDetokenizer.get_next_output_text."""
        if finished:
            self.flush()
        end = max(0, len(self.output_text) - (0 if finished else self.stop_buffer_length))
        if not delta:
            return self.output_text[:end]
        start = self._last_output_text_offset
        self._last_output_text_offset = max(start, end)
        return self.output_text[start:end]


class SlowIncrementalDetokenizer(BaseIncrementalDetokenizer):
    """Decodes the window with the tokenizer's own `decode`; see the drawing at the top of this file.

    The concatenated text equals decode(prompt + output) after the prompt's text, and decode(output) if the
    prompt ends within a character. The one exception are decoders with byte fallback (sentencepiece): they
    read a run of byte tokens as a whole, so that an invalid byte would also spoil valid characters before it,
    which may have been shown already; here they stay.
    """

    def __init__(self, tokenizer: Any, request: EngineCoreRequest) -> None:
        super().__init__(request)
        self._decode = self._make_decode(tokenizer, request.sampling_params)
        self._window: list[int] = self._find_context(request.prompt_token_ids or [])
        # Text of the window, and the part of it that has been handed on (or is the prompt's).
        self._text = self._sent = self._decode(self._window)
        # Tokens that the window had when nothing was held back: the last time, and the time before.
        self._num_clean = len(self._window)
        self._context_start = 0

    @staticmethod
    def _make_decode(tokenizer: Any, params: SamplingParams) -> Callable[[list[int]], str]:
        """Return a function from token ids to text."""
        options = {"skip_special_tokens": params.skip_special_tokens}
        if "spaces_between_special_tokens" in inspect.signature(tokenizer.decode).parameters:
            options["spaces_between_special_tokens"] = params.spaces_between_special_tokens
        return partial(tokenizer.decode, **options)

    def _find_context(self, prompt_token_ids: list[int]) -> list[int]:
        """Return the last tokens of the prompt that are whole characters, [] if it ends within one.

        A character has up to 4 tokens, so one of four sizes begins with a whole one (with byte fallback it must);
        more tokens are needed only where these are special ones without text.
        """
        for size in (6, 7, 8, 9, len(prompt_token_ids)):
            context = prompt_token_ids[-size:]
            text = self._decode(context)
            if text and not text.endswith(REPLACEMENT):
                return context
        return [] if text else context

    def decode_next(self, next_token_id: int) -> str:
        """See BaseIncrementalDetokenizer.decode_next."""
        self._window.append(next_token_id)
        text = self._decode(self._window)
        if text and text == self._text and not self._decode([next_token_id]):
            self._window.pop()  # a special token that is skipped
            return ""
        if not text.startswith(self._sent):
            # Byte fallback: this byte changed how those before it are read. What has been handed on stays, and
            # the rest is decoded by itself.
            self._window = self._window[self._num_clean :]
            self._sent, self._num_clean, self._context_start = "", 0, 0
            text = self._decode(self._window)
        start, end = len(self._sent), len(text)
        while end > max(start, len(text) - MAX_UNFINISHED) and text[end - 1] == REPLACEMENT:
            end -= 1
        self._text, self._sent = text, text[:end]
        if end == len(text):
            self._context_start, self._num_clean = self._num_clean, len(self._window)
        if len(self._window) >= MAX_WINDOW_TOKENS:
            self._shorten_window(num_held=len(text) - end)
        return text[start:end]

    def decode_rest(self) -> str:
        """See BaseIncrementalDetokenizer.decode_rest."""
        return self._text[len(self._sent) :]

    def _shorten_window(self, num_held: int) -> None:
        """Keep the tokens of the last text, which begin and end with whole characters, as context.

        While text is held back this must wait, but not for ever: a model may emit nothing but invalid bytes.
        Then any 16 tokens will do, since the 3 characters held back have at most 9.
        """
        window = self._window[self._context_start :]
        if num_held:
            window = self._window[-16:]
            if len(self._window) < 3 * MAX_WINDOW_TOKENS:
                return
        text = self._decode(window)
        if not text:
            return  # a lone space, which decoders drop at the start of a text: no context to rely on
        self._window, self._text, self._sent = window, text, text[: len(text) - num_held]
        # With byte fallback, each token that is held back has one replacement character.
        self._num_clean = len(self._window) - num_held
        self._context_start = 0


class FastIncrementalDetokenizer(SlowIncrementalDetokenizer):
    """The same, decoding with the `tokenizers` library itself, several times quicker.

    Simplified (vLLM: tokenizers.decoders.DecodeStream): that is a window too, but it shows the prompt's end
    when the prompt ends within a character, takes ever longer while a model emits invalid UTF-8, fails on
    some byte-fallback sequences ("Invalid prefix encountered"), and cannot be flushed.
    """

    @staticmethod
    def _make_decode(tokenizer: Any, params: SamplingParams) -> Callable[[list[int]], str]:
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=params.skip_special_tokens)


def check_stop_strings(
    output_text: str, new_char_count: int, stop: list[str], include_in_output: bool
) -> tuple[str, int] | None:
    """Find the stop string that is complete first within the last `new_char_count` characters.

    Returns:
        None, or the stop string and the length that the text must be cut to (-1: no cut needed). Of several
        that are complete at the same character the first in the list counts, so that the result does not
        depend on how the text was split.
    """
    best: tuple[int, str] | None = None
    for stop_string in stop if new_char_count > 0 else ():
        first_start = max(0, len(output_text) - new_char_count - len(stop_string) + 1)
        start = output_text.find(stop_string, first_start)
        if start != -1 and (best is None or start + len(stop_string) < best[0]):
            best = (start + len(stop_string), stop_string)
    if best is None:
        return None
    end, stop_string = best
    if not include_in_output:
        return stop_string, end - len(stop_string)
    return stop_string, -1 if end == len(output_text) else end
