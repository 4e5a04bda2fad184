"""A small byte-level BPE tokenizer for tiny models: every byte, and some pairs that JSON likes."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>")
EOS_ID = 2
PAIRS = ('{"', '":', '",', "},", "[]", '""', "tr", "ue", "fa", "nu", "ll", "12", "00", "ab", "ba", "aa", "yes", "no")


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return it: 3 special tokens, 256 bytes, and a token for each of PAIRS' beginnings of two characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = sorted({(pair[0], pair[1]) for pair in PAIRS})
    words = [*SPECIAL, *alphabet, *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_byte_tokenizer(path: Path) -> None:
    """Write it to a model's folder."""
    make_byte_tokenizer().save_pretrained(path)
