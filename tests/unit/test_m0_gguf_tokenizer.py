"""Tokenizers built from GGUF metadata, against plain reference implementations and transformers' own
classes."""

from __future__ import annotations

import itertools
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import regex
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from folovllm.model_executor.model_loader.gguf_tokenizer import PRE_TOKENIZERS, build_gguf_tokenizer
from folovllm.model_executor.model_loader.source import resolve_model_source

FILE = Path("some/model.gguf")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

TEXTS = [
    "Hello world, it's 2024! We've paid $1,234.56 for 1000000 apples; I'LL PAY 7 more.",
    "café naïve Ünïcode Ångström — “quotes” … cafe\u0301 A\u030angstro\u0308m",
    "emoji 🎉🚀 👩‍👩‍👧‍👦 🇫🇷 and ½ ② Ⅷ ٣ 四五 数字123漢字",
    "def f(x):\n    return x**2  # squared\n\n\n\tif x != 10:\r\n\t\tprint(f'{x:>08.3f}')\n",
    "  leading, trailing and    inner   spaces  \n\n  \n",
    "русский текст, ελληνικά, עברית, हिन्दी, ไทย 100%",
    "https://example.org/a_b-c?d=e&f=42#g [x](y) <tag attr='1'/> \\n \\\\",
    "don't DON'T we'Re they'LL o'clock 's 'S ''",
    "",
    " ",
    "\n",
    "1",
    "12345678901",
    "a1b2 3c",
]
ALPHABET = [
    *"aeEtsnzZ  \n\n\t\r'\"-_.,!?()0123456789½",
    "é",
    "e\u0301",
    "ñ",
    "ß",
    "日",
    "本",
    "й",
    "🎉",
    "👩",
    "\u200d",
    "\u00a0",
    "'s",
    "'LL",
    "the",
    " the",
    "ing",
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(ALPHABET, k=rng.randint(1, 30))) for _ in range(count)]


ALL_TEXTS = TEXTS + random_texts(300)


# Byte-level BPE: a reference in plain Python

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = {
    "gpt-2": GPT2_WORDS,
    "smollm": GPT2_WORDS,
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
    "llama-bpe": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
}


def byte_symbols() -> dict[int, str]:
    """Return GPT-2's printable stand-in for every byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(others)}


SYMBOLS = byte_symbols()


def merge_piece(piece: str, vocab: dict[str, int], ranks: dict[tuple[str, str], int], whole: bool) -> list[int]:
    """Apply the best-ranked merge again and again; `whole`: a piece that is a token stays one."""
    parts = [SYMBOLS[byte] for byte in piece.encode()]
    if whole and "".join(parts) in vocab:
        return [vocab["".join(parts)]]
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get((parts[i], parts[i + 1]), 1 << 30))
        if (parts[best], parts[best + 1]) not in ranks:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return [vocab[part] for part in parts]


class ReferenceBpe:
    """Byte-level BPE with the rule named `pre`, taking added tokens out of the text first."""

    def __init__(self, pre: str, metadata: dict[str, Any]) -> None:
        self.pre = pre
        self.vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
        self.ranks = {tuple(m.split(" ")): i for i, m in enumerate(metadata["tokenizer.ggml.merges"])}
        kinds = zip(self.vocab, metadata["tokenizer.ggml.token_type"], strict=True)
        self.added = sorted((t for t, kind in kinds if kind in (CONTROL, USER_DEFINED)), key=len, reverse=True)

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in regex.split("(" + "|".join(map(regex.escape, self.added)) + ")", text):
            if part in self.added:
                ids.append(self.vocab[part])
                continue
            part = unicodedata.normalize("NFC", part) if self.pre == "qwen2" else part
            pieces = regex.split(r"(\p{N})", part) if self.pre == "smollm" else [part]
            for word in [word for piece in pieces for word in regex.findall(WORDS[self.pre], piece)]:
                ids += merge_piece(word, self.vocab, self.ranks, whole=self.pre == "llama-bpe")
        return ids


def trained_bpe() -> tuple[list[str], list[str]]:
    """Return a small vocabulary, in id order, and its merges, learnt from the test texts with no word
    rule."""
    tokenizer = Tokenizer(models.BPE())
    # Not by words: merges across every kind of boundary, so that a wrong rule shows.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=sorted(SYMBOLS.values()), show_progress=False, max_token_length=6
    )
    tokenizer.train_from_iterator(TEXTS * 3 + random_texts(2000), trainer)
    state = json.loads(tokenizer.to_str())["model"]
    vocab = sorted(state["vocab"], key=state["vocab"].get)
    return vocab, [merge if isinstance(merge, str) else " ".join(merge) for merge in state["merges"]]


VOCAB, MERGES = trained_bpe()
ADDED = {
    "<|endoftext|>": CONTROL,
    "<|im_start|>": CONTROL,
    "<|im_end|>": CONTROL,
    "<tool call>": USER_DEFINED,
}


def bpe_metadata(pre: str | None, **changes: Any) -> dict[str, Any]:
    """Return the metadata of a byte-level tokenizer; changes are of "tokenizer.ggml." entries, None removes
    one."""
    entries = {
        "model": "gpt2",
        "pre": pre,
        "tokens": VOCAB + list(ADDED),
        "token_type": [NORMAL] * len(VOCAB) + list(ADDED.values()),
        "merges": MERGES,
        "bos_token_id": len(VOCAB),
        "eos_token_id": len(VOCAB) + 2,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in {**entries, **changes}.items() if v is not None}


@pytest.mark.parametrize("pre", list(WORDS))
def test_byte_level_tokenizers_equal_the_reference(pre: str) -> None:
    metadata = bpe_metadata(pre, add_bos_token=False)
    tokenizer, reference = build_gguf_tokenizer(metadata, FILE), ReferenceBpe(pre, metadata)
    for text in ALL_TEXTS:
        for variant in (text, f"<|im_start|>{text}<|im_end|>\n{text}<tool call> {text}"):
            ids = tokenizer.encode(variant)
            assert ids == reference.encode(variant), variant
            expected = unicodedata.normalize("NFC", variant) if pre == "qwen2" else variant
            assert tokenizer.decode(ids) == expected


def test_the_rules_differ_on_these_texts() -> None:
    """The comparison above would mean little if all rules cut these texts alike."""
    encoded = {}
    for pre in WORDS:
        tokenizer = build_gguf_tokenizer(bpe_metadata(pre, add_bos_token=False), FILE)
        encoded[pre] = [tokenizer.encode(text) for text in TEXTS]
    assert len({str(ids) for ids in encoded.values()}) == len(WORDS)


def test_qwen2_and_gpt2_equal_transformers_own_classes() -> None:
    from transformers import GPT2Tokenizer, Qwen2Tokenizer

    vocab = {token: i for i, token in enumerate(VOCAB)}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    for pre, cls in (("qwen2", Qwen2Tokenizer), ("gpt-2", GPT2Tokenizer)):
        theirs = cls(vocab=vocab, merges=merges)
        ours = build_gguf_tokenizer(bpe_metadata(pre), FILE)
        for text in ALL_TEXTS:
            assert ours.encode(text) == theirs.encode(text), text


def test_digits_and_accents_of_each_rule() -> None:
    """Cut "12345" and decomposed "é" by hand, so that the reference itself is checked."""
    vocab = [*sorted(SYMBOLS.values()), "12", "34", "123", "45", "\u00c3\u00a9"]
    merges = ["1 2", "3 4", "12 3", "4 5", "\u00c3 \u00a9"]

    def tokens(pre: str, text: str) -> list[str]:
        metadata = bpe_metadata(pre, tokens=vocab, token_type=None, merges=merges, bos_token_id=None, eos_token_id=None)
        tokenizer = build_gguf_tokenizer(metadata, FILE)
        return tokenizer.convert_ids_to_tokens(tokenizer.encode(text))

    assert tokens("smollm", "12345") == list("12345")
    assert tokens("qwen2", "12345") == list("12345")
    assert tokens("gpt-2", "12345") == ["12", "34", "5"]
    assert tokens("llama-bpe", "12345") == ["123", "45"]
    assert tokens("qwen2", "e\u0301") == ["\u00c3\u00a9"]  # composed first: the two bytes of é, merged
    assert len(tokens("gpt-2", "e\u0301")) == 3


def test_llama_bpe_takes_whole_words_before_merging() -> None:
    vocab = [*sorted(SYMBOLS.values()), "ab", "cd", "abc"]
    changes = {"tokens": vocab, "token_type": None, "merges": ["c d", "a b", "ab c"]}
    changes |= {"bos_token_id": None, "eos_token_id": None}
    for pre in ("llama-bpe", "gpt-2"):
        tokenizer = build_gguf_tokenizer(bpe_metadata(pre, **changes), FILE)
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode("abc")) == ["abc"]
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode("abcd")) == ["ab", "cd"]
    changes |= {"tokens": [*vocab, "bc", "zab"], "merges": ["c d", "b c", "a b", "ab c", "z ab"]}
    whole = build_gguf_tokenizer(bpe_metadata("llama-bpe", **changes), FILE)
    merged = build_gguf_tokenizer(bpe_metadata("gpt-2", **changes), FILE)
    assert whole.convert_ids_to_tokens(whole.encode("abc")) == ["abc"]
    assert merged.convert_ids_to_tokens(merged.encode("abc")) == ["a", "bc"]


# Special tokens


def test_control_tokens_are_special_and_user_defined_ones_are_text() -> None:
    tokenizer = build_gguf_tokenizer(bpe_metadata("smollm"), FILE)
    first = len(VOCAB)
    ids = tokenizer.encode("a<|im_start|>b<tool call>c<|im_end|>")
    assert [i for i in ids if i >= first] == [first + 1, first + 3, first + 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<tool call>c"
    assert tokenizer.decode(ids) == "a<|im_start|>b<tool call>c<|im_end|>"
    assert set(tokenizer.all_special_ids) == {first, first + 1, first + 2}
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (first, first + 2)
    assert tokenizer.pad_token is None and len(tokenizer) == first + len(ADDED)


@pytest.mark.parametrize(
    ("pre", "changes", "bos", "eos"),
    [
        ("smollm", {}, False, False),
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"add_bos_token": False}, False, False),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, True, True),
        ("llama-bpe", {"bos_token_id": None}, False, False),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(pre: str, changes: dict[str, Any], bos: bool, eos: bool) -> None:
    tokenizer = build_gguf_tokenizer(bpe_metadata(pre, **changes), FILE)
    plain = tokenizer.encode("hello 12", add_special_tokens=False)
    expected = [len(VOCAB)] * bos + plain + [len(VOCAB) + 2] * eos
    assert tokenizer.encode("hello 12") == expected
    assert tokenizer("hello 12").input_ids == expected


def test_chat_templates() -> None:
    metadata = bpe_metadata("smollm")
    assert build_gguf_tokenizer(metadata, FILE).chat_template is None
    metadata["tokenizer.chat_template"] = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer = build_gguf_tokenizer(metadata, FILE)
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|endoftext|>[a][b]"
    metadata |= {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "tools"}
    tokenizer = build_gguf_tokenizer(metadata, FILE)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|endoftext|>[a][b]"
    assert tokenizer.apply_chat_template(messages, tokenize=False, chat_template="tool_use") == "tools"


# SentencePiece


def trained_sentence_piece() -> tuple[list[str], list[float], list[int]]:
    """Return tokens, scores and types of a small vocabulary with byte tokens, better merges scoring
    higher."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, max_token_length=8)
    texts = [" " + text for text in TEXTS if "🎉" not in text and "日" not in text]
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in texts], trainer)
    vocab = tokenizer.get_vocab()
    pieces = sorted(vocab, key=vocab.__getitem__)
    start = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # As in Llama's vocabulary: merged pieces first, by rank, then single characters.
    ordered = [p for p in pieces if len(p) > 1] + [p for p in pieces if len(p) == 1]
    scores = [0.0] * len(start) + [-float(i) for i in range(len(ordered))]
    return start + ordered, scores, [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(ordered)


SP_TOKENS, SP_SCORES, SP_KINDS = trained_sentence_piece()


def sp_metadata(**changes: Any) -> dict[str, Any]:
    entries = {
        "model": "llama",
        "pre": "default",
        "tokens": SP_TOKENS,
        "scores": SP_SCORES,
        "token_type": SP_KINDS,
    }
    entries |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **changes}
    return {f"tokenizer.ggml.{k}": v for k, v in entries.items() if v is not None}


def reference_sentence_piece(text: str, prefix: bool) -> list[int]:
    """Join the neighbours whose union has the best score, leftmost first, until none is a token; then use
    bytes."""
    vocab = {token: i for i, token in enumerate(SP_TOKENS)}
    parts = list((" " * prefix + text).replace(" ", "▁")) if text else []
    while True:
        pairs = [a + b for a, b in itertools.pairwise(parts)]
        joins = [(SP_SCORES[vocab[pair]], -i) for i, pair in enumerate(pairs) if pair in vocab]
        if not joins:
            break
        at = -max(joins)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids = []
    for part in parts:
        ids += [vocab[part]] if part in vocab else [vocab[f"<0x{byte:02X}>"] for byte in part.encode()]
    return ids


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_equals_the_reference(prefix: bool) -> None:
    tokenizer = build_gguf_tokenizer(sp_metadata(add_space_prefix=prefix), FILE)
    for text in ALL_TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference_sentence_piece(text, prefix), text
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == [1, *ids]
    between = tokenizer.encode("</s>hello</s>world", add_special_tokens=False)
    expected = [2, *reference_sentence_piece("hello", prefix), 2, *reference_sentence_piece("world", prefix)]
    assert between == expected


def test_sentence_piece_equals_transformers_llama() -> None:
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    vocab = {token: i for i, token in enumerate(SP_TOKENS)}
    scores = {t: s for t, s, kind in zip(SP_TOKENS, SP_SCORES, SP_KINDS, strict=True) if kind == NORMAL}
    theirs = LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores))
    ours = build_gguf_tokenizer(sp_metadata(), FILE)
    # A text with leading spaces gets its prefix from SentencePiece and llama.cpp, but not from this class.
    for text in [text for text in ALL_TEXTS if not text.startswith(" ")]:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == expected, text


# Errors


@pytest.mark.badinput
@pytest.mark.parametrize(
    ("metadata", "pattern"),
    [
        ({}, r"has no tokenizer; .*tokenizer=.*skip_tokenizer_init=True.*prompt_token_ids"),
        ({"tokenizer.ggml.model": "bert"}, r"a tokenizer of kind 'bert'; supported: gpt2, llama"),
        (
            bpe_metadata("tekken"),
            r"tokenizer.ggml.pre='tekken' is not supported; supported: gpt-2, smollm, qwen2, llama-bpe",
        ),
        (bpe_metadata(None), r"tokenizer.ggml.pre=None is not supported"),
        (bpe_metadata("default"), r"tokenizer.ggml.pre='default' is not supported"),
        (bpe_metadata("qwen2", tokens=None), r"no list tokenizer.ggml.tokens"),
        (bpe_metadata("qwen2", merges=None), r"no list tokenizer.ggml.merges"),
        (bpe_metadata("qwen2", merges=["ab"]), r"merge 'ab' does not join two tokens"),
        (bpe_metadata("qwen2", merges=["a zzz"]), r"merge 'a zzz' does not join two tokens"),
        (bpe_metadata("qwen2", token_type=[1]), r"tokens but 1 token types"),
        (bpe_metadata("qwen2", tokens=["a", "b", "a"], token_type=None), r"token 'a' has two ids"),
        (bpe_metadata("qwen2", eos_token_id=5000), r"eos_token_id=5000 is not in the vocabulary of"),
        (bpe_metadata("qwen2", bos_token_id="x"), r"bos_token_id='x' is not in the vocabulary"),
        (sp_metadata(scores=None), r"no list tokenizer.ggml.scores"),
        (sp_metadata(scores=[0.0]), r"tokens but 1 scores"),
    ],
)
def test_bad_tokenizers(metadata: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern) as error:
        build_gguf_tokenizer(metadata, FILE)
    if str(FILE) not in str(error.value):
        pytest.fail("the message does not name the file")


# The built-in model


@pytest.mark.network
def test_the_real_smollm2() -> None:
    source = resolve_model_source("smollm2-135m-instruct")
    config = source.hf_config()
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["rope_theta"]) == (
        9,
        3,
        100000.0,
    )
    assert source.generation_config() == {"eos_token_id": [0, 2]}
    tokenizer = source.tokenizer()
    reference = ReferenceBpe("smollm", source._file.metadata)  # type: ignore[attr-defined]
    for text in ALL_TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids == reference.encode(text), text
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("in 1984")) == ["in", "Ġ", "1", "9", "8", "4"]
    assert tokenizer.encode("<|im_start|>user\nHi<|im_end|>")[0] == 1
    assert tokenizer.encode("<|im_start|>user\nHi<|im_end|>")[-1] == tokenizer.eos_token_id == 2
    chat = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    shapes = {name: tuple(tensor.shape) for name, tensor in source.weights()}
    assert len(shapes) == 272 and shapes["model.layers.29.self_attn.k_proj.weight"] == (192, 576)


def test_every_rule_has_a_reference() -> None:
    assert set(WORDS) | {"llama3", "llama-v3"} == set(PRE_TOKENIZERS)
