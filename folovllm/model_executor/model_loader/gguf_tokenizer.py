"""Build a Hugging Face tokenizer from a GGUF file's metadata, with the `tokenizers` library.

Why not transformers' own conversion: earlier 5.x releases ignore `tokenizer.ggml.pre`, the name of the rule
that cuts text into words before merging, and so get numbers (SmolLM2) and accents (Qwen2) wrong; later ones
follow it but carry on in silence when they do not know its value. llama.cpp keeps these rules in
`src/llama-vocab.cpp`. Two kinds of vocabulary exist here:

- "gpt2": byte-level BPE with explicit merges. The text is cut by a regular expression, then merged within
  each piece.
- "llama": SentencePiece BPE with a score per token and no merges. The whole text is one piece, spaces are
  "▁", and what is not in the vocabulary becomes byte tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from folovllm.model_executor.model_loader.source import NO_TOKENIZER_REMEDY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

# Control tokens that end a generation whatever the file calls its eos token, as llama.cpp has them.
END_OF_GENERATION = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>", "<|end_of_text|>", "<|eom_id|>")

# The words of GPT-4's tokenizer; models differ in how many digits stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _PreTokenizer:
    """One value of `tokenizer.ggml.pre`: how text is cut before merging, and what goes with it."""

    regex: str | None = None
    """Cut by this expression; None means GPT-2's, which ByteLevel has built in."""
    single_digits: bool = False
    """First cut every digit from its neighbours."""
    nfc: bool = False
    """Normalize to composed characters."""
    ignore_merges: bool = False
    """A piece that is itself in the vocabulary is that token, whatever the merges say."""
    add_bos: bool = False
    """Begin with the bos token if the file does not say."""


_LLAMA3 = _PreTokenizer(regex=_WORDS % "{1,3}", ignore_merges=True, add_bos=True)
PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(),
    "smollm": _PreTokenizer(single_digits=True),
    "qwen2": _PreTokenizer(regex=_WORDS % "", nfc=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}


def end_of_generation_ids(metadata: dict[str, Any]) -> list[int]:
    """Return, sorted, the ids that end a generation: the file's eos, eot and eom, and END_OF_GENERATION's."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = {metadata[f"tokenizer.ggml.{key}"] for key in keys if f"tokenizer.ggml.{key}" in metadata}
    if not all(isinstance(index, int) for index in ids):
        raise ValueError(f"GGUF metadata: {', '.join(keys)} must be token ids, got {ids}.")
    tokens = metadata.get("tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(kinds, list):
        return sorted(ids)  # no vocabulary, or one that names no control tokens
    ids.update(
        i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == _CONTROL and token in END_OF_GENERATION
    )
    return sorted(ids)


def build_gguf_tokenizer(metadata: dict[str, Any], path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a GGUF file describes, with its special tokens and chat templates.

    Args:
        metadata: the file's metadata.
        path: the file, for messages.

    Raises:
        ValueError: there is no tokenizer, it is of an unknown kind, or its parts contradict each other.
    """
    return _Builder(metadata, path).build()


class _Builder:
    """Builds one tokenizer; exists so that every step can name the file in its errors."""

    def __init__(self, metadata: dict[str, Any], path: Path) -> None:
        self._metadata = metadata
        self._path = path
        self._model = self._get("model", "no_vocab")
        if self._model not in ("gpt2", "llama"):
            none = self._model in ("no_vocab", "none")
            what = "no tokenizer" if none else f"a tokenizer of kind {self._model!r}"
            raise ValueError(f"{path} has {what}; supported: gpt2, llama. {NO_TOKENIZER_REMEDY}")
        self._tokens: list[str] = self._list("tokens", str)
        self._kinds: list[int] = self._list("token_type", int, [_NORMAL] * len(self._tokens))
        self._vocab = {token: i for i, token in enumerate(self._tokens)}
        if len(self._kinds) != len(self._tokens):
            raise ValueError(f"{path}: {len(self._tokens)} tokens but {len(self._kinds)} token types.")
        if len(self._vocab) != len(self._tokens):
            twice = next(token for i, token in enumerate(self._tokens) if self._vocab[token] != i)
            raise ValueError(f"{path}: token {twice!r} has two ids in the vocabulary. {NO_TOKENIZER_REMEDY}")

    def build(self) -> PreTrainedTokenizerBase:
        """Assemble model, added tokens and post-processor, and wrap them in transformers' class."""
        from transformers import PreTrainedTokenizerFast

        tokenizer, add_bos = self._byte_level() if self._model == "gpt2" else self._sentence_piece()
        added = [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(self._tokens, self._kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
        tokenizer.add_tokens(added)
        add_bos = self._get("add_bos_token", add_bos)
        add_eos = self._get("add_eos_token", False)
        bos, eos = self._special("bos"), self._special("eos")
        tokenizer.post_processor = self._post_processor(bos if add_bos else None, eos if add_eos else None)
        unk, pad = self._special("unknown"), self._special("padding")
        named = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": pad}
        wrap: Any = PreTrainedTokenizerFast
        wrapped: PreTrainedTokenizerBase = wrap(
            tokenizer_object=tokenizer,
            **{name: token for name, token in named.items() if token is not None},
            extra_special_tokens=[token.content for token in added if token.special],
            chat_template=self._chat_template(),
            clean_up_tokenization_spaces=False,
            add_bos_token=bool(add_bos and bos),
            add_eos_token=bool(add_eos and eos),
        )
        return wrapped

    def _get(self, key: str, default: Any) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def _list(self, key: str, kind: type, default: list[Any] | None = None) -> list[Any]:
        """Return an entry that is a list of `kind`."""
        value = self._get(key, default)
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise ValueError(
                f"{self._path}: the metadata has no list tokenizer.ggml.{key} of {kind.__name__}. {NO_TOKENIZER_REMEDY}"
            )
        return value

    def _special(self, name: str) -> str | None:
        """Return the token whose id is `tokenizer.ggml.{name}_token_id`, None without such an entry."""
        index = self._get(f"{name}_token_id", None)
        if index is None:
            return None
        if not isinstance(index, int) or not 0 <= index < len(self._tokens):
            raise ValueError(
                f"{self._path}: tokenizer.ggml.{name}_token_id={index!r} is not in the vocabulary of "
                f"{len(self._tokens)}."
            )
        return self._tokens[index]

    def _byte_level(self) -> tuple[Tokenizer, bool]:
        """Return GPT-2-style BPE, and whether it begins with bos by default."""
        name = self._get("pre", None)
        if not isinstance(name, str) or name not in PRE_TOKENIZERS:
            raise ValueError(
                f"{self._path}: tokenizer.ggml.pre={name!r} is not supported; supported: "
                f"{', '.join(PRE_TOKENIZERS)}. Another rule would cut text differently from the model's "
                f"training. {NO_TOKENIZER_REMEDY}"
            )
        rule = PRE_TOKENIZERS[name]
        merges = []
        for merge in self._list("merges", str):
            left, space, right = merge.partition(" ")
            if not (space and left in self._vocab and right in self._vocab and left + right in self._vocab):
                raise ValueError(f"{self._path}: merge {merge!r} does not join two tokens of the vocabulary into one.")
            merges.append((left, right))
        tokenizer = Tokenizer(models.BPE(vocab=self._vocab, merges=merges, ignore_merges=rule.ignore_merges))
        if rule.nfc:
            tokenizer.normalizer = normalizers.NFC()
        steps: list[Any] = []
        if rule.single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if rule.regex is not None:
            steps.append(pre_tokenizers.Split(Regex(rule.regex), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.regex is None))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer, rule.add_bos

    def _sentence_piece(self) -> tuple[Tokenizer, bool]:
        """Return SentencePiece-style BPE, and that it begins with bos by default."""
        prefix = self._get("add_space_prefix", True)
        unknown = self._special("unknown")
        tokenizer = Tokenizer(
            models.BPE(
                vocab=self._vocab,
                merges=self._merges_from_scores(),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        # As llama.cpp: each stretch of text between special tokens gets the prefix, not only the first.
        prepend = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        return tokenizer, True

    def _merges_from_scores(self) -> list[tuple[str, str]]:
        """Return the merges that join the pair with the best-scored result first, as SentencePiece does.

        Every split of a token into two tokens is one merge; their rank is the token's score. Control,
        user-defined and byte tokens are never made by merging.
        """
        scores: list[float] = self._list("scores", float)
        if len(scores) != len(self._tokens):
            raise ValueError(f"{self._path}: {len(self._tokens)} tokens but {len(scores)} scores.")
        mergeable = {t: i for i, (t, kind) in enumerate(zip(self._tokens, self._kinds, strict=True)) if kind == _NORMAL}
        merges = [
            (scores[index], token[:cut], token[cut:])
            for token, index in mergeable.items()
            for cut in range(1, len(token))
            if token[:cut] in mergeable and token[cut:] in mergeable
        ]
        # Scores are distinct in practice; among equals the longer left part first, as in transformers.
        merges.sort(key=lambda merge: (-merge[0], -len(merge[1]), -len(merge[2])))
        return [(left, right) for _, left, right in merges]

    def _post_processor(self, bos: str | None, eos: str | None) -> Any:
        """Return what puts bos and eos around an encoded text."""
        pieces = [token for token in (bos, "$A", eos) if token is not None]
        return processors.TemplateProcessing(
            single=pieces,
            pair=[*pieces, *("$B" if piece == "$A" else piece for piece in pieces)],
            special_tokens=[(token, self._vocab[token]) for token in (bos, eos) if token is not None],
        )

    def _chat_template(self) -> str | dict[str, str] | None:
        """Return the file's chat template, all of them by name if there are several, None without one."""
        default = self._metadata.get("tokenizer.chat_template")
        names = self._metadata.get("tokenizer.chat_templates")
        listed = names if isinstance(names, list) else []
        templates = {str(name): self._metadata.get(f"tokenizer.chat_template.{name}") for name in listed}
        named: dict[str, str] = {name: t for name, t in templates.items() if isinstance(t, str)}
        if isinstance(default, str):
            named["default"] = default
        return default if isinstance(default, str) and len(named) == 1 else named or None
