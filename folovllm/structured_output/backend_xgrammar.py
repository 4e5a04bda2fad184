"""XgrammarBackend: specifications become grammars, grammars say which tokens may follow (vLLM: the same file).

The only module that imports xgrammar, and only when it is first needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from folovllm.core.sched.grammar import Grammar
from folovllm.sampling_params import StructuredOutputsParams
from folovllm.structured_output.json_schema import normalize_json_schema
from folovllm.structured_output.regex import normalize_regex
from folovllm.utils.common import cdiv

if TYPE_CHECKING:
    from types import ModuleType

ANY_JSON_OBJECT = '{"type":"object","additionalProperties":true}'
MAX_WHITESPACE = 16
"""Most white space between two parts of JSON: enough to indent with, too little to write nothing else for ever."""
COMPILE_THREADS = 1
"""Of one compilation; more of them would take the processor from the model."""

Spec = tuple[str, str]
"""(field of StructuredOutputsParams, its value as text): what makes two requests share a grammar."""


def import_xgrammar() -> ModuleType:
    """Return the module; ValueError where it is not installed."""
    try:
        import xgrammar
    except ImportError as error:
        raise ValueError(
            'structured_outputs need xgrammar, which is not installed: pip install "folovllm[structured]"'
        ) from error
    return xgrammar


def make_spec(params: StructuredOutputsParams) -> Spec:
    """Return what is to be compiled."""
    if params.json_object:
        return "json_object", ""
    if params.json is not None:
        return "json", params.json if isinstance(params.json, str) else json.dumps(params.json)
    if params.regex is not None:
        return "regex", params.regex
    if params.choice is not None:
        return "choice", json.dumps(params.choice)
    assert params.grammar is not None
    return "grammar", params.grammar


def _normalize(spec: Spec) -> tuple[str, str]:
    """Return ("json", "regex" or "grammar", its text as xgrammar is to be given it).

    Raises:
        ValueError: it holds something that xgrammar would ignore or misread.
    """
    kind, text = spec
    if kind == "json_object":
        return "json", ANY_JSON_OBJECT
    if kind in ("json", "regex"):
        try:
            return kind, normalize_json_schema(text) if kind == "json" else normalize_regex(text)
        except ValueError as error:
            raise ValueError(f"structured_outputs: {error}") from error
    if kind == "choice":
        literals = dict.fromkeys(_ebnf_literal(choice) for choice in json.loads(text))
        return "grammar", f"root ::= {' | '.join(literals)}"
    return kind, text


def _ebnf_literal(text: str) -> str:
    """Return `text` as a string of the grammar's language: printable ASCII as it is, all else as code points."""
    parts = [c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08x}" for c in text]
    return '"' + "".join(parts) + '"'


def validate(params: StructuredOutputsParams) -> None:
    """Raise ValueError unless it is a specification that can be compiled; takes a millisecond or a few."""
    kind, text = _normalize(make_spec(params))
    grammar = import_xgrammar().Grammar
    parse: dict[str, Callable[[str], object]] = {
        "json": grammar.from_json_schema,
        "regex": grammar.from_regex,
        "grammar": grammar.from_ebnf,
    }
    _translate_errors(parse[kind], text)


def _json_grammar(schema: str) -> str:
    """Return a JSON schema as a grammar."""
    options = {"any_whitespace": True, "max_whitespace_cnt": MAX_WHITESPACE}
    grammar = str(_translate_errors(import_xgrammar().Grammar.from_json_schema, schema, **options))
    # Strings of bounded length might hold control characters, which JSON must escape.
    return grammar.replace(r"[^\"\\\r\n]", r"[^\0-\x1f\"\\\r\n]")


def _translate_errors(call: Callable[..., Any], text: str, **kwargs: Any) -> Any:
    """Call xgrammar; its errors, which name places in its own source, become a ValueError."""
    try:
        return call(text, **kwargs)
    except (RuntimeError, ValueError, TypeError) as error:
        # "[time] /path/file.cc:12: what is wrong"; the last such prefix counts.
        message = str(error).strip().rsplit(".cc:", 1)[-1].split(": ", 1)[-1]
        raise ValueError(f"structured_outputs: {message[:500]}") from error


class XgrammarGrammar(Grammar):
    """One request's place in a compiled grammar."""

    def __init__(self, matcher: Any) -> None:
        """`matcher`: an xgrammar.GrammarMatcher at its beginning."""
        self._matcher = matcher

    def accept_token(self, token_id: int) -> bool:
        """See Grammar."""
        return bool(self._matcher.accept_token(token_id))

    def is_terminated(self) -> bool:
        """See Grammar."""
        return bool(self._matcher.is_terminated())

    def fill_bitmask(self, bitmask: npt.NDArray[np.int32], row: int) -> None:
        """Write which tokens may follow into a row: nothing may, once it is terminated."""
        if self._matcher.is_terminated():
            bitmask[row] = 0
        else:
            self._matcher.fill_next_token_bitmask(bitmask, row)


class CompiledGrammar:
    """What a specification compiles to; requests share it."""

    def __init__(self, compiled: Any) -> None:
        """`compiled`: an xgrammar.CompiledGrammar."""
        self._compiled = compiled
        self.num_bytes: int = compiled.memory_size_bytes
        """About what it takes."""

    def make_grammar(self, stop_token_ids: set[int]) -> XgrammarGrammar:
        """Return a new beginning; the stop tokens follow a complete text, and where there are none it just ends."""
        matcher = import_xgrammar().GrammarMatcher
        if not stop_token_ids:
            return XgrammarGrammar(matcher(self._compiled, terminate_without_stop_token=True))
        return XgrammarGrammar(matcher(self._compiled, override_stop_tokens=sorted(stop_token_ids)))


class XgrammarBackend:
    """Compiles for one tokenizer; calls from several threads do not disturb each other."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        """Read the vocabulary (0.1 s for 50,000 tokens).

        Args:
            tokenizer: a transformers tokenizer.
            vocab_size: V, the model's: ids from the tokenizer's size on can never be drawn.

        Raises:
            ValueError: no xgrammar, or a tokenizer that it does not understand.
        """
        xgrammar = import_xgrammar()
        self.vocab_size = vocab_size
        try:
            info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
            pieces: list[bytes] = list(info.decoded_vocab)
            # A special token is no text: it would vanish from the output, or end it. Only without its name, here,
            # does it not count as the letters that it is written with.
            for token_id in tokenizer.all_special_ids:
                if 0 <= token_id < len(pieces):
                    pieces[token_id] = b""
            info = xgrammar.TokenizerInfo(
                pieces,
                xgrammar.VocabType.RAW,
                vocab_size=vocab_size,
                stop_token_ids=list(info.stop_token_ids),
                add_prefix_space=info.add_prefix_space,
            )
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"structured_outputs: xgrammar does not understand this tokenizer: {error}") from error
        # Its own cache is off: ours knows who waits for what, and how often it helped.
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=COMPILE_THREADS, cache_enabled=False)

    def compile(self, spec: Spec) -> CompiledGrammar:
        """Compile; takes milliseconds to seconds, during which other threads of Python run.

        Raises:
            ValueError: it is none.
        """
        kind, text = _normalize(spec)
        call = self._compiler.compile_regex if kind == "regex" else self._compiler.compile_grammar
        return CompiledGrammar(_translate_errors(call, _json_grammar(text) if kind == "json" else text))

    def allocate_bitmask(self, num_rows: int) -> npt.NDArray[np.int32]:
        """Return [num_rows, ceil(V / 32)] int32 that allows everything."""
        return np.full((num_rows, cdiv(self.vocab_size, 32)), -1, dtype=np.int32)


def spec_to_text(spec: Spec) -> str:
    """Return a specification as it is shown in messages, cut short."""
    kind, text = spec
    return f"{kind} {json.dumps(text, ensure_ascii=False)[:80]}"
