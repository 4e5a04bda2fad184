"""Incremental detokenization: every split of a text into tokens gives the same text, and never half a character."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from folovllm.engine import EngineCoreRequest
from folovllm.engine.detokenizer import (
    FastIncrementalDetokenizer,
    IncrementalDetokenizer,
    SlowIncrementalDetokenizer,
)
from folovllm.sampling_params import SamplingParams
from tests.fakes import FakeTokenizer

KINDS = ("fast", "slow")
TEXTS = {
    "accents": "àé ñ",
    "cjk": "日本a",
    "emoji": "a😀é",
    "combining": "e\u0301x",
    "cr": "\r\n\u2028",
}
FAMILY = "👩‍👩‍👧‍👦 ok"
"""25 bytes of one visible character, made of emoji joined by U+200D."""


def byte_to_char() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in printable}
    others = [b for b in range(256) if b not in table]
    return table | {b: chr(256 + i) for i, b in enumerate(others)}


def fast_tokenizer(pieces: list[bytes]) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose ids 0 and 1 are special, and whose other ids are `pieces`."""
    table = byte_to_char()
    vocab = {"<s>": 0, "</s>": 1} | {"".join(table[b] for b in piece): 2 + i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


class Pieces:
    """A tokenizer, fast or slow, one id per piece."""

    def __init__(self, kind: str, pieces: list[bytes]) -> None:
        pieces = sorted({*pieces, *(bytes([b]) for b in range(256))})
        self.tokenizer: Any
        if kind == "fast":
            self.tokenizer = fast_tokenizer(pieces)
            self.ids = {piece: 2 + i for i, piece in enumerate(pieces)}
        else:
            self.tokenizer = FakeTokenizer(pieces)
            self.ids = {piece: 4 + 256 + i for i, piece in enumerate(pieces)}

    def encode(self, pieces: list[bytes]) -> list[int]:
        return [self.ids[piece] for piece in pieces]


def request(prompt: list[int], **params: Any) -> EngineCoreRequest:
    return EngineCoreRequest("id", prompt, SamplingParams(**params), arrival_time=0.0)


def stream(
    tokenizer: Any, prompt: list[int], ids: list[int], **params: Any
) -> tuple[list[str], IncrementalDetokenizer]:
    """Return the delta after each token, then that of the end."""
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request(prompt, **params))
    deltas = []
    for token_id in ids:
        assert detokenizer.update([token_id], stop_terminated=False) is None
        deltas.append(detokenizer.get_next_output_text(finished=False, delta=True))
    deltas.append(detokenizer.get_next_output_text(finished=True, delta=True))
    return deltas, detokenizer


def substrings(data: bytes) -> list[bytes]:
    return [data[i:j] for i, j in itertools.combinations(range(len(data) + 1), 2)]


def all_splits(data: bytes) -> Iterator[list[bytes]]:
    """Every way of cutting `data` into pieces: 2 ** (len(data) - 1) of them."""
    for cuts in itertools.product((False, True), repeat=len(data) - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [len(data)]
        yield [data[i:j] for i, j in zip([0, *ends], ends, strict=False)]


def longest_valid(data: bytes) -> str:
    """The text of `data` without a character that is cut off at its end."""
    return data.decode(errors="ignore")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_split_of_multibyte_text(kind: str, text: str) -> None:
    data = text.encode()
    pieces = Pieces(kind, substrings(data))
    prompt = pieces.encode([b"h", b"i"])
    for split in all_splits(data):
        deltas, _ = stream(pieces.tokenizer, prompt, pieces.encode(split))
        # After every token exactly the whole characters so far have been shown: nothing early, nothing late.
        shown = list(itertools.accumulate(deltas))
        ends = list(itertools.accumulate(map(len, split)))
        assert shown == [*(longest_valid(data[:end]) for end in ends), text], split


@pytest.mark.parametrize("kind", KINDS)
def test_splits_of_a_joined_emoji(kind: str) -> None:
    data = FAMILY.encode()
    pieces = Pieces(kind, substrings(data))
    rng = random.Random(0)
    cuts = [(i,) for i in range(1, len(data))] + list(itertools.combinations(range(1, len(data)), 2))
    cuts += [tuple(sorted(rng.sample(range(1, len(data)), rng.randint(3, 20)))) for _ in range(100)]
    cuts.append(tuple(range(1, len(data))))
    for cut in cuts:
        ends = [*cut, len(data)]
        split = [data[i:j] for i, j in zip([0, *cut], ends, strict=True)]
        deltas, _ = stream(pieces.tokenizer, [], pieces.encode(split))
        shown = list(itertools.accumulate(deltas))
        assert shown == [*(longest_valid(data[:end]) for end in ends), FAMILY], split


@pytest.mark.parametrize("kind", KINDS)
def test_several_tokens_in_one_update(kind: str) -> None:
    pieces = Pieces(kind, [])
    ids = pieces.encode([bytes([b]) for b in "a😀é".encode()])
    detokenizer = IncrementalDetokenizer.from_new_request(pieces.tokenizer, request([]))
    detokenizer.update(ids[:3], False)
    assert detokenizer.get_next_output_text(False, delta=True) == "a"
    detokenizer.update(ids[3:], False)
    assert detokenizer.get_next_output_text(False, delta=True) == "😀é"
    assert detokenizer.get_next_output_text(False, delta=False) == "a😀é"
    assert detokenizer.output_token_ids == ids and detokenizer.num_output_tokens() == len(ids)


BYTES = st.sampled_from([0x41, 0x80, 0xBF, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0xFF])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@example(data=[*b"AAAAAA\x80\xf0\xbf\xf0\xbf\x80AAAA"])
@given(data=st.one_of(st.lists(BYTES, max_size=8), st.lists(BYTES, min_size=20, max_size=60)))
def test_any_bytes_end_as_decode_has_them(kind: str, data: list[int]) -> None:
    """Valid or not: what was shown is never taken back, and in the end equals decode of all tokens."""
    pieces = PIECES[kind]
    ids = pieces.encode([bytes([b]) for b in data])
    deltas, _ = stream(pieces.tokenizer, [], ids)
    assert "".join(deltas) == pieces.tokenizer.decode(ids)


PIECES = {kind: Pieces(kind, []) for kind in KINDS}
ODD = [b"a\xf0", b"\x9f\x98", b"\x80\xe2", b"\x82\xacb", b"\xa9\xc3", b"\xff\x80", " 日".encode(), b"\xe6\x97"]
ODD_PIECES = {kind: Pieces(kind, ODD) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=100, deadline=None)
@given(
    prompt=st.sampled_from([[], [b"x"], [b"x", b"\xf0"]]),
    items=st.lists(st.one_of(st.sampled_from(ODD), st.sampled_from([b"\x98", b"\x80", b"\xf0", 0, 1])), max_size=60),
)
def test_any_tokens_with_special_ones_between(
    kind: str, skip: bool, prompt: list[bytes], items: list[bytes | int]
) -> None:
    pieces = ODD_PIECES[kind]
    ids = [item if isinstance(item, int) else pieces.ids[item] for item in items]
    deltas, _ = stream(pieces.tokenizer, pieces.encode(prompt), ids, skip_special_tokens=skip)
    assert "".join(deltas) == pieces.tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [b"\x80", b"\xf0", b"\xe2\x82", b"\xf0\xbf\x80"])
def test_a_model_that_emits_invalid_bytes_for_ever(kind: str, broken: bytes) -> None:
    """Text keeps coming, and the work per token stays bounded."""
    pieces = PIECES[kind]
    ids = pieces.encode([bytes([b]) for b in b"ok" + broken * 300])
    deltas, detokenizer = stream(pieces.tokenizer, [], ids)
    assert "".join(deltas) == pieces.tokenizer.decode(ids)
    assert deltas[:2] == ["o", "k"]
    assert sum(map(len, deltas[:-1])) >= len("".join(deltas)) - 3, "held back more than an unfinished character"
    assert isinstance(detokenizer, SlowIncrementalDetokenizer)
    assert len(detokenizer._window) < 40


@pytest.mark.parametrize("kind", KINDS)
def test_unfinished_character_at_the_end_is_shown_as_the_replacement_character(kind: str) -> None:
    pieces = PIECES[kind]
    ids = pieces.encode([b"a", b"\xf0", b"\x9f"])
    deltas, detokenizer = stream(pieces.tokenizer, [], ids)
    assert deltas == ["a", "", "", "\ufffd"]
    assert detokenizer.get_next_output_text(True, delta=False) == pieces.tokenizer.decode(ids)
    assert detokenizer.get_next_output_text(True, delta=True) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_real_replacement_characters_survive(kind: str) -> None:
    """U+FFFD in the text itself looks like an unfinished character and must not get lost."""
    text = "\ufffd\ufffd\ufffd\ufffda\ufffd"
    pieces = Pieces(kind, ["\ufffd".encode()])
    ids = pieces.encode(["\ufffd".encode()] * 4 + [b"a", "\ufffd".encode()])
    deltas, _ = stream(pieces.tokenizer, [], ids)
    assert "".join(deltas) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["", "hello ", "日", "x" * 40])
def test_prompt_is_never_shown(kind: str, prompt: str) -> None:
    pieces = PIECES[kind]
    prompt_ids = pieces.encode([bytes([b]) for b in prompt.encode()])
    ids = pieces.encode([bytes([b]) for b in "é!".encode()])
    deltas, _ = stream(pieces.tokenizer, prompt_ids, ids)
    assert "".join(deltas) == "é!"


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_that_ends_within_a_character(kind: str) -> None:
    """The output is then decoded by itself; the prompt's text before the cut does not leak into it."""
    pieces = PIECES[kind]
    prompt = pieces.encode([b"H", b"i", b"\xf0", b"\x9f"])
    for output in ([b"\x98", b"\x80", b"b"], [b"\x98", b"b"], [b"b"], [b"\x98"]):
        ids = pieces.encode(output)
        deltas, _ = stream(pieces.tokenizer, prompt, ids)
        assert "".join(deltas) == pieces.tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens(kind: str, skip: bool) -> None:
    pieces = PIECES[kind]
    ids = [0, *pieces.encode([b"a", b"\xc3"]), 1, *pieces.encode([b"b", "é".encode()[:1], b"\xa9"]), 1, 1]
    deltas, _ = stream(pieces.tokenizer, [0], ids, skip_special_tokens=skip)
    assert "".join(deltas) == pieces.tokenizer.decode(ids, skip_special_tokens=skip)
    names = [pieces.tokenizer.decode([i]) for i in (0, 1)]
    assert all((name in "".join(deltas)) is not skip for name in names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("include", [True, False])
def test_stop_token_is_left_out_of_the_text_but_not_of_the_tokens(kind: str, include: bool) -> None:
    pieces = PIECES[kind]
    *ids, stop = pieces.encode([b"a", b"\xe2", b"!"])
    params = {"include_stop_str_in_output": include, "stop_token_ids": [stop]}
    detokenizer = IncrementalDetokenizer.from_new_request(pieces.tokenizer, request([], **params))
    detokenizer.update(ids, stop_terminated=False)
    assert detokenizer.update([stop], stop_terminated=True) is None
    assert detokenizer.get_next_output_text(True, delta=True) == ("a\ufffd!" if include else "a\ufffd")
    assert detokenizer.output_token_ids == [*ids, stop]


def test_long_text_equals_decode() -> None:
    """The window moves on many times, over characters of every length."""
    text = "".join(itertools.islice(itertools.cycle("aé日😀 \n"), 400))
    for kind in KINDS:
        pieces = PIECES[kind]
        ids = pieces.encode([bytes([b]) for b in text.encode()])
        deltas, detokenizer = stream(pieces.tokenizer, [], ids)
        assert "".join(deltas) == text
        assert isinstance(detokenizer, SlowIncrementalDetokenizer) and len(detokenizer._window) < 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [[b"o", b"k"], [b"o", b"k", b"\xf0"]])
def test_skipped_special_tokens_for_ever_cost_nothing(kind: str, before: list[bytes]) -> None:
    pieces = PIECES[kind]
    ids = [*pieces.encode(before), *[1] * 100]
    deltas, detokenizer = stream(pieces.tokenizer, [], ids)
    assert "".join(deltas) == pieces.tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(detokenizer, SlowIncrementalDetokenizer) and len(detokenizer._window) == len(before)


def test_without_tokenizer_there_is_no_text() -> None:
    deltas, detokenizer = stream(None, [1], [5, 6])
    assert deltas == ["", "", ""]
    assert detokenizer.output_token_ids == [5, 6]
    assert detokenizer.flush() is None


def test_the_tokenizer_decides_which_detokenizer() -> None:
    for kind, cls in (("fast", FastIncrementalDetokenizer), ("slow", SlowIncrementalDetokenizer)):
        made = IncrementalDetokenizer.from_new_request(PIECES[kind].tokenizer, request([]))
        assert type(made) is cls


@pytest.mark.parametrize("spaces", [True, False])
def test_spaces_between_special_tokens_reaches_tokenizers_that_know_it(spaces: bool) -> None:
    class Spaced(FakeTokenizer):
        def decode(
            self,
            token_ids: Any,
            skip_special_tokens: bool = False,
            spaces_between_special_tokens: bool = True,
        ) -> str:
            glue = " " if spaces_between_special_tokens else ""
            return "".join(self.special[i] + glue if i < 4 else self.pieces[i].decode() for i in token_ids)

    deltas, _ = stream(
        Spaced(), [], [1, 1, 4 + ord("a")], skip_special_tokens=False, spaces_between_special_tokens=spaces
    )
    assert "".join(deltas) == ("<eos> <eos> a" if spaces else "<eos><eos>a")


# sentencepiece-style vocabularies: words with a leading "▁", single bytes <0xNN> for everything else.


@pytest.fixture(scope="module")
def sentencepiece() -> tuple[PreTrainedTokenizerFast, Callable[..., list[int]]]:
    """A Llama 2 kind of tokenizer, and a function that turns bytes and words into ids."""
    vocab = {f"<0x{b:02X}>": b for b in range(256)}
    vocab |= {word: 256 + i for i, word in enumerate(("<s>", "▁a", "▁the", "A", "日", "▁"))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True)])

    def encode(*items: str | bytes) -> list[int]:
        return [i for item in items for i in (item if isinstance(item, bytes) else [vocab[item]])]

    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"), encode


@pytest.mark.parametrize("prompt", [(), ("<s>",), ("<s>", "▁the"), ("<s>", "▁the", *["<s>"] * 9)])
def test_leading_space_depends_on_what_came_before(
    sentencepiece: tuple[PreTrainedTokenizerFast, Callable[..., list[int]]], prompt: tuple[str, ...]
) -> None:
    """These decoders drop the space at the start of a text, so each token must be read in its context."""
    tokenizer, encode = sentencepiece
    prompt_ids, ids = encode(*prompt), encode(*["▁a", "▁the", "A"] * 10)
    deltas, _ = stream(tokenizer, prompt_ids, ids)
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    after = tokenizer.decode(prompt_ids + ids, skip_special_tokens=True)
    assert "".join(deltas) == after[len(before) :]


@pytest.mark.parametrize("prompt", [(), ("<s>",), ("▁",), ("<s>", "▁the")])
def test_spaces_at_the_start_of_the_output(
    sentencepiece: tuple[PreTrainedTokenizerFast, Callable[..., list[int]]], prompt: tuple[str, ...]
) -> None:
    tokenizer, encode = sentencepiece
    deltas, _ = stream(tokenizer, encode(*prompt), encode("▁", "▁", "▁the"))
    assert "".join(deltas) == ("  the" if prompt in ((), ("<s>",)) else "   the")


def test_context_of_a_prompt_of_bytes_is_short_and_of_whole_characters(
    sentencepiece: tuple[PreTrainedTokenizerFast, Callable[..., list[int]]],
) -> None:
    tokenizer, encode = sentencepiece
    for text in ("é", "日", "😀"):
        prompt = encode("▁the", (text * 100).encode())
        made = IncrementalDetokenizer.from_new_request(tokenizer, request(prompt))
        assert isinstance(made, SlowIncrementalDetokenizer) and len(made._window) <= 9
        deltas, _ = stream(tokenizer, prompt, encode("▁a", "é".encode()))
        assert "".join(deltas) == " aé"


@pytest.mark.parametrize("text", ["é日😀", "日A日", "a\u0301"])
def test_byte_fallback_shows_whole_characters(
    sentencepiece: tuple[PreTrainedTokenizerFast, Callable[..., list[int]]], text: str
) -> None:
    tokenizer, encode = sentencepiece
    data = text.encode()
    deltas, _ = stream(tokenizer, encode("▁the"), encode(data))
    assert list(itertools.accumulate(deltas)) == [
        *(longest_valid(data[: i + 1]) for i in range(len(data))),
        text,
    ]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_byte_fallback_with_any_valid_text(
    sentencepiece: tuple[PreTrainedTokenizerFast, Callable[..., list[int]]], data: st.DataObject
) -> None:
    tokenizer, encode = sentencepiece
    items = st.sampled_from(["<s>", "▁a", "▁the", "A", "日", "▁", *(c.encode() for c in ("é", "日", "😀", "x"))])
    prompt = encode(*data.draw(st.lists(items, max_size=20)))
    ids = encode(*data.draw(st.lists(items, max_size=40)))
    deltas, _ = stream(tokenizer, prompt, ids)
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    assert "".join(deltas) == tokenizer.decode(prompt + ids, skip_special_tokens=True)[len(before) :]


@pytest.mark.parametrize(
    ("items", "shown"),
    [
        # An invalid byte spoils the run of bytes it stands in, for decode; "é" has been shown and stays.
        ((b"\xc3\xa9\xe2", "A"), "é\ufffdA"),
        ((b"\xc3\xa9\xe2\x82", "A", b"\xc3\xa9"), "é\ufffd\ufffdAé"),
        ((b"\xc3\xa9\x80\x80\x80\x80\x80\x80", "▁a"), "é" + "\ufffd" * 6 + " a"),
        ((b"\x80" * 6 + "日日".encode(), "A"), "\ufffd" * 12 + "A"),
        # A space as a byte token, at the moment when the window is shortened.
        (("A",) * 10 + (b" ", "😀".encode(), "A"), "A" * 10 + " 😀A"),
    ],
)
def test_byte_fallback_with_invalid_bytes_goes_on(
    sentencepiece: tuple[PreTrainedTokenizerFast, Callable[..., list[int]]],
    items: tuple[str | bytes, ...],
    shown: str,
) -> None:
    tokenizer, encode = sentencepiece
    deltas, _ = stream(tokenizer, encode("▁the"), encode(*items))
    assert "".join(deltas[:-1]) == shown, "all of it is certain with the last token"
    assert deltas[-1] == ""


def test_byte_fallback_in_a_long_run_of_invalid_bytes_loses_nothing(
    sentencepiece: tuple[PreTrainedTokenizerFast, Callable[..., list[int]]],
) -> None:
    """The window is shortened within the run, and its last bytes, by themselves, are valid."""
    tokenizer, encode = sentencepiece
    deltas, _ = stream(tokenizer, encode("▁the"), encode(b"\x80" * 19 + ("日" * 6).encode(), "A"))
    shown = "".join(deltas)
    assert shown.startswith("\ufffd" * 37) and shown.endswith("A") and len(shown) <= 40


def test_byte_fallback_with_an_unfinished_character_at_the_end(
    sentencepiece: tuple[PreTrainedTokenizerFast, Callable[..., list[int]]],
) -> None:
    tokenizer, encode = sentencepiece
    deltas, _ = stream(tokenizer, encode("▁the"), encode(b"\xc3\xa9\xe2\x82"))
    assert deltas == ["", "é", "", "", "\ufffd\ufffd"]
