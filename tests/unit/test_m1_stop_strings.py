"""Stop strings: found at every token boundary, the earliest first, and streamed text equals the whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.engine import EngineCoreRequest
from folovllm.engine.detokenizer import IncrementalDetokenizer, check_stop_strings
from folovllm.sampling_params import SamplingParams
from tests.fakes import FakeTokenizer


class Run:
    """Text given in pieces, one token each, to a detokenizer with stop strings: what happened."""

    def __init__(self, pieces: list[str | bytes], stop: list[str], **params: Any) -> None:
        tokenizer = FakeTokenizer(sorted(set(pieces), key=str))
        ids = [4 + 256 + tokenizer.words.index(piece) for piece in pieces]
        request = EngineCoreRequest("id", [4], SamplingParams(stop=stop, **params), arrival_time=0.0)
        detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
        self.deltas: list[str] = []
        self.cumulative: list[str] = []
        self.stop: str | None = None
        for token_id in ids:
            self.stop = detokenizer.update([token_id], stop_terminated=False)
            if self.stop is None and token_id is ids[-1] and len(self.deltas) == len(ids) - 1:
                self.stop = detokenizer.flush()
            finished = self.stop is not None or len(self.deltas) == len(ids) - 1
            self.deltas.append(detokenizer.get_next_output_text(finished, delta=True))
            self.cumulative.append(detokenizer.get_next_output_text(finished, delta=False))
            if finished:
                break
        self.num_tokens = len(self.deltas)
        self.text = self.cumulative[-1]


def all_splits(text: str) -> Iterator[list[str]]:
    """Every way of cutting `text` into pieces."""
    for cuts in itertools.product((False, True), repeat=len(text) - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [len(text)]
        yield [text[i:j] for i, j in zip([0, *ends], ends, strict=False)]


def reference(
    pieces: list[str], stop: list[str], include: bool = False, min_tokens: int = 0
) -> tuple[str, str | None, int]:
    """Return text, stop string and tokens used, by looking at every character in turn."""
    text = ""
    for num_tokens, piece in enumerate(pieces, start=1):
        for char in piece:
            text += char
            for word in stop:
                if num_tokens > min_tokens and text.endswith(word):
                    return text if include else text[: -len(word)], word, num_tokens
    return text, None, len(pieces)


def check(pieces: list[str], stop: list[str], include: bool = False, min_tokens: int = 0) -> None:
    """Compare a run with the reference, and its streamed text with its whole."""
    text, word, num_tokens = reference(pieces, stop, include, min_tokens)
    run = Run(list(pieces), stop, include_stop_str_in_output=include, min_tokens=min_tokens, max_tokens=None)
    assert (run.text, run.stop, run.num_tokens) == (text, word, num_tokens), pieces
    assert "".join(run.deltas) == text, pieces
    # What was shown, in either form, is never taken back.
    assert list(itertools.accumulate(run.deltas)) == run.cumulative
    assert all(text.startswith(shown) for shown in run.cumulative)


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_at_every_token_boundary(include: bool) -> None:
    for pieces in all_splits("abSTOPcd"):
        check(pieces, ["STOP"], include)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    "stop", [["ab", "bc"], ["bc", "ab"], ["abc", "b"], ["b", "abc"], ["cd", "d", "bcde"], ["zz", "xaab"]]
)
def test_several_stop_strings_the_earliest_wins(stop: list[str], include: bool) -> None:
    for pieces in all_splits("xaabcde"):
        check(pieces, stop, include)


@pytest.mark.parametrize("include", [False, True])
@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=8),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    min_tokens=st.integers(0, 4),
)
def test_random_texts_equal_the_reference(include: bool, pieces: list[str], stop: list[str], min_tokens: int) -> None:
    check(pieces, stop, include, min_tokens)


def test_text_that_might_begin_a_stop_string_is_held_back() -> None:
    run = Run(["a", "b", "S", "T", "x", "y", "S", "T", "O", "P"], ["STOP"])
    assert run.cumulative == ["", "", "", "a", "ab", "abS", "abST", "abSTx", "abSTxy", "abSTxy"]
    assert run.stop == "STOP"


def test_nothing_is_held_back_where_the_stop_string_is_shown_anyway() -> None:
    run = Run(["a", "b", "S", "T"], ["STOP"], include_stop_str_in_output=True)
    assert run.deltas == ["a", "b", "S", "T"]


def test_held_back_text_comes_at_the_end() -> None:
    run = Run(["a", "ST"], ["STOP"])
    assert run.deltas == ["", "aST"] and run.stop is None


@pytest.mark.parametrize("include", [False, True])
def test_stop_at_the_very_first_token(include: bool) -> None:
    run = Run(["STOPx", "y"], ["STOP"], include_stop_str_in_output=include)
    assert (run.text, run.stop, run.num_tokens) == ("STOP" if include else "", "STOP", 1)


@pytest.mark.parametrize(("min_tokens", "num_tokens", "text"), [(0, 1, ""), (1, 3, ".b"), (2, 3, ".b"), (3, 5, ".b.d")])
def test_stop_strings_within_min_tokens_do_not_count(min_tokens: int, num_tokens: int, text: str) -> None:
    run = Run([".", "b", ".", "d", "."], ["."], min_tokens=min_tokens)
    assert (run.num_tokens, run.text, run.stop) == (num_tokens, text, ".")


def test_min_tokens_with_several_tokens_in_one_update() -> None:
    for tokens, min_tokens, stop in (([0, 1], 1, None), ([1, 0], 1, "."), ([0, 1, 0], 1, "."), ([1, 0], 2, None)):
        tokenizer = FakeTokenizer([".", "b"])
        request = EngineCoreRequest("id", [4], SamplingParams(stop=["."], min_tokens=min_tokens), arrival_time=0.0)
        detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
        assert detokenizer.update([4 + 256 + t for t in tokens], stop_terminated=False) == stop


def test_min_tokens_hold_for_what_only_the_end_reveals() -> None:
    for min_tokens, stop in ((1, "\ufffd"), (2, None)):
        assert Run([b"a", b"\xf0\x9f"], ["\ufffd"], min_tokens=min_tokens).stop == stop


def test_stop_string_begun_within_min_tokens_and_completed_after_them() -> None:
    run = Run(["S", "T", "O", "P", "x"], ["STOP"], min_tokens=3)
    assert (run.num_tokens, run.text) == (4, "")


def test_stop_string_of_characters_that_span_tokens() -> None:
    data = "aé日b".encode()
    run = Run([data[i : i + 1] for i in range(len(data))], ["é日"])
    assert (run.text, run.stop, run.num_tokens) == ("a", "é日", 6)
    assert "".join(run.deltas) == "a"


def test_stop_string_beside_an_unfinished_character() -> None:
    """The bytes after the stop string complete no character; it ends the text all the same, and at once."""
    run = Run([b"a", b"STOP\xf0", b"\x9f", b"b"], ["STOP"])
    assert (run.text, run.stop, run.num_tokens) == ("a", "STOP", 2)


def test_stop_string_in_what_only_the_end_reveals() -> None:
    run = Run([b"a", b"\xf0\x9f"], ["\ufffd"])
    assert (run.text, run.stop) == ("a", "\ufffd")


def test_check_stop_strings() -> None:
    text = " The user is a"
    for stop in (["a", "is"], ["is", "a"]):
        assert check_stop_strings(text, 5, stop, include_in_output=False) == ("is", 10)
        assert check_stop_strings(text, 5, stop, include_in_output=True) == ("is", 12)
    # Complete at the same character: the first in the list.
    assert check_stop_strings("ab", 2, ["ab", "b"], include_in_output=False) == ("ab", 0)
    assert check_stop_strings("ab", 2, ["b", "ab"], include_in_output=False) == ("b", 1)
    # At the very end nothing needs cutting.
    assert check_stop_strings("hello.", 1, ["."], include_in_output=True) == (".", -1)
    # Only what is complete within the new characters counts.
    assert check_stop_strings("a.b", 1, ["."], include_in_output=False) is None
    assert check_stop_strings("a.b", 2, ["."], include_in_output=False) == (".", 1)
    assert check_stop_strings("a.b", 0, ["b"], include_in_output=False) is None
    assert check_stop_strings("a.b", 3, [], include_in_output=False) is None
