"""SamplingParams: how one request wants its tokens drawn, when to stop, what to return (vLLM: `sampling_params.py`).

Everything is checked on construction; what depends on the model (vocabulary, tokenizer, limits) is checked by the
Processor before the request is queued.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any

from folovllm.utils.common import check_bool, check_range

SAMPLING_EPS = 1e-5
"""A temperature below this is greedy."""
MAX_N = 1024
MAX_STOPS = 256
MAX_SEED = 2**63 - 1
MAX_GRAMMAR_BYTES = 1 << 16
"""Most bytes of a JSON schema, regex, grammar, or of all choices together."""
MAX_CHOICES = 4096


class SamplingType(IntEnum):
    """How a request's tokens are drawn."""

    GREEDY = 0
    RANDOM = 1


class RequestOutputKind(Enum):
    """What each RequestOutput of a streaming request holds."""

    CUMULATIVE = 0
    """Everything so far."""
    DELTA = 1
    """Only what is new."""
    FINAL_ONLY = 2
    """Nothing until the request has finished, then everything."""


@dataclass
class StructuredOutputsParams:
    """What the text must look like: exactly one of these (vLLM: `sampling_params.py`).

    Raises:
        ValueError: none or several given, one of the wrong type, empty or too large. What it says is checked when the
            request is made (structured_output/).
    """

    json: str | dict[str, Any] | None = None
    """JSON of this schema, a dict or its text."""
    regex: str | None = None
    """Text that this regular expression matches as a whole."""
    choice: list[str] | None = None
    """One of these texts."""
    grammar: str | None = None
    """Text of this grammar, in EBNF as llama.cpp writes it (GBNF): its first rule is `root ::= ...`."""
    json_object: bool | None = None
    """True: any JSON object."""

    def __post_init__(self) -> None:
        names = [name for name, value in vars(self).items() if value is not None and value is not False]
        if len(names) != 1:
            raise ValueError(
                f"structured_outputs: give exactly one of {', '.join(vars(self))}, not {', '.join(names) or 'none'}."
            )
        (name,) = names
        value = getattr(self, name)
        if name == "json_object":
            check_bool("structured_outputs.json_object", value)
            self.json_object = True
            return
        if name == "choice":
            self.choice = value = _as_list("structured_outputs.choice", value, str)
            if not 1 <= len(value) <= MAX_CHOICES or not all(value):
                raise ValueError(f"structured_outputs.choice must hold 1 to {MAX_CHOICES} non-empty strings.")
        elif not isinstance(value, str) and not (name == "json" and isinstance(value, dict)):
            raise ValueError(f"structured_outputs.{name}={value!r:.80} must be a str{' or dict' * (name == 'json')}.")
        self._check_size(name, value)

    @staticmethod
    def _check_size(name: str, value: Any) -> None:
        try:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            num_bytes = len(text.encode())
        except (TypeError, ValueError, RecursionError) as error:  # no JSON, or half of a surrogate pair
            raise ValueError(f"structured_outputs.{name}: {error}.") from error
        if not 0 < num_bytes <= MAX_GRAMMAR_BYTES:
            raise ValueError(
                f"structured_outputs.{name} has {num_bytes} bytes; 1 to {MAX_GRAMMAR_BYTES} are allowed. Shorten it."
            )


@dataclass
class SamplingParams:
    """Parameters of one request; defaults are OpenAI's, names are vLLM's.

    Raises:
        ValueError: on construction, for a value outside its range; the message names field, value and range.
        TypeError: for an unknown keyword.
    """

    n: int = 1
    """Independent outputs for the prompt, 1 to MAX_N."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of a token that is already in the output; -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted as often as the token is in the output; -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides positive, multiplies negative logits of tokens in prompt or output; above 0."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy: the exact argmax."""
    top_p: float = 1.0
    """Keep the smallest set of best tokens whose probability reaches this; in (0, 1]."""
    top_k: int = 0
    """Keep this many best tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the best one; in [0, 1]."""
    seed: int | None = None
    """Makes the draws repeatable, whatever else runs; None lets the engine choose one."""
    stop: str | list[str] | None = None
    """Strings that end the output; kept as a list."""
    stop_token_ids: list[int] | None = None
    """Tokens that end the output; kept as a list."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    max_tokens: int | None = 16
    """Most output tokens; None means up to max_model_len."""
    min_tokens: int = 0
    """No end-of-sequence or stop token before this many output tokens."""
    logprobs: int | None = None
    """Log probabilities of the drawn token and of this many best ones; 0: the drawn one only; -1: all; None: none."""
    prompt_logprobs: int | None = None
    """The same for prompt tokens."""
    detokenize: bool = True
    """Make text; False leaves it empty."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    spaces_between_special_tokens: bool = True
    """Put spaces between special tokens in the text; only tokenizers whose `decode` takes the option do it."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the stop token's text, in the output."""
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    """What a streamed output holds."""
    logit_bias: dict[int, float] | None = None
    """Token id -> value added to its logit."""
    allowed_token_ids: list[int] | None = None
    """Only these tokens may be drawn."""
    bad_words: list[str] | None = None
    """Words that may not be generated; kept as a list."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the text must look like; ends where that is complete, so not with ignore_eos."""
    bad_words_token_ids: list[list[int]] | None = field(default=None, repr=False)
    """Derived by update_from_tokenizer."""
    eos_token_id: int | None = field(default=None, repr=False)
    """Derived by update_from_generation_config; None under ignore_eos."""
    all_stop_token_ids: set[int] = field(default_factory=set, repr=False)
    """Derived: every id that min_tokens must hold back."""

    def __post_init__(self) -> None:
        self.stop = _as_list("stop", self.stop, str)
        self.bad_words = _as_list("bad_words", self.bad_words, str)
        self.stop_token_ids = _as_list("stop_token_ids", self.stop_token_ids, int)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _as_list("allowed_token_ids", self.allowed_token_ids, int)
        if self.top_k == -1:
            self.top_k = 0
        self._check_ranges()
        self._check_lists()
        self._check_structured_outputs()
        if self.logit_bias is not None:
            self.logit_bias = _check_logit_bias(self.logit_bias)
        self.all_stop_token_ids = set(self.all_stop_token_ids) | set(self.stop_token_ids)

    def _check_ranges(self) -> None:
        for name in ("n", "top_k", "min_tokens"):  # check_range lets None pass
            if getattr(self, name) is None:
                raise ValueError(f"{name}=None must be an int; leave it out for the default.")
        check_range("n", self.n, low=1, high=MAX_N)
        for name in ("presence_penalty", "frequency_penalty"):
            _check_number(name, getattr(self, name), low=-2.0, high=2.0)
        _check_number("repetition_penalty", self.repetition_penalty, low=0.0, open_low=True, remedy="1 is off.")
        _check_number("temperature", self.temperature, low=0.0, remedy="0 is greedy.")
        _check_number("top_p", self.top_p, low=0.0, high=1.0, open_low=True, remedy="1 is off.")
        _check_number("min_p", self.min_p, low=0.0, high=1.0, remedy="0 is off.")
        check_range("top_k", self.top_k, low=0, remedy="0 or -1 is off.")
        check_range("seed", self.seed, low=0, high=MAX_SEED)
        check_range("max_tokens", self.max_tokens, low=1)
        check_range("min_tokens", self.min_tokens, low=0)
        check_range("logprobs", self.logprobs, low=-1)
        check_range("prompt_logprobs", self.prompt_logprobs, low=-1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} must not exceed max_tokens={self.max_tokens}; "
                "lower it or raise max_tokens."
            )
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"):
            check_bool(name, getattr(self, name))
        check_bool("include_stop_str_in_output", self.include_stop_str_in_output)
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ValueError(f"output_kind={self.output_kind!r} must be a RequestOutputKind.")
        if self.n > 1 and self.temperature < SAMPLING_EPS:
            raise ValueError(f"n={self.n} must be 1 with temperature=0: greedy outputs would all be the same.")

    def _check_lists(self) -> None:
        assert isinstance(self.stop, list) and self.bad_words is not None and self.stop_token_ids is not None
        if len(self.stop) > MAX_STOPS:
            raise ValueError(f"stop has {len(self.stop)} strings; at most {MAX_STOPS} are allowed.")
        for name, values in (("stop", self.stop), ("bad_words", self.bad_words)):
            if any(not text for text in values):
                raise ValueError(f"{name}={values!r} holds an empty string; remove it.")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True; use stop_token_ids without it.")
        for name in ("stop_token_ids", "allowed_token_ids"):
            values = getattr(self, name)
            if values is not None and any(not _is_int(i) or i < 0 for i in values):
                raise ValueError(f"{name}={values!r} must hold token ids: ints of at least 0.")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids=[] would forbid every token; leave it None to allow all.")

    def _check_structured_outputs(self) -> None:
        if self.structured_outputs is None:
            return
        if not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise ValueError(f"structured_outputs={self.structured_outputs!r:.80} must be a StructuredOutputsParams.")
        if self.ignore_eos:
            raise ValueError(
                "ignore_eos=True with structured_outputs is not supported: the output ends where it is complete. "
                "Leave one of them out."
            )

    @property
    def sampling_type(self) -> SamplingType:
        """GREEDY where temperature is (nearly) 0, else RANDOM."""
        return SamplingType.GREEDY if self.temperature < SAMPLING_EPS else SamplingType.RANDOM

    def update_from_generation_config(
        self, generation_config: Mapping[str, Any], eos_token_id: int | None = None
    ) -> None:
        """Take over the ids that end a sequence: the tokenizer's `eos_token_id` united with generation_config's.

        Under ignore_eos none of them stops the request (its own stop_token_ids still do), but min_tokens still
        holds them back.
        """
        if eos_token_id is not None:
            self.all_stop_token_ids.add(eos_token_id)
            if not self.ignore_eos:
                self.eos_token_id = eos_token_id
        configured = generation_config.get("eos_token_id")
        if configured is None:
            return
        extra = {configured} if isinstance(configured, int) else set(configured)
        extra.discard(eos_token_id)
        self.all_stop_token_ids |= extra
        if not self.ignore_eos:
            assert self.stop_token_ids is not None
            self.stop_token_ids = sorted(extra | set(self.stop_token_ids))

    def update_from_tokenizer(self, tokenizer: Any) -> None:
        """Derive `bad_words_token_ids`: each bad word at the start of a text and after a space.

        Raises:
            ValueError: a word gives no tokens. The Processor checks them against the vocabulary.
        """
        if not self.bad_words:
            return
        self.bad_words_token_ids = []
        for word in self.bad_words:
            bare = tokenizer.encode(word.lstrip(), add_special_tokens=False)
            spaced = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
            if not bare:
                raise ValueError(f"bad_words: {word!r} gives no tokens with this tokenizer; remove it.")
            self.bad_words_token_ids.append(bare)
            # The spaced form matters where the space melts into the first token (byte-level BPE) and
            # says nothing new where it stays a token of its own in front of the same ids.
            if spaced and spaced[0] != bare[0] and len(spaced) == len(bare):
                self.bad_words_token_ids.append(spaced)

    def clone(self) -> SamplingParams:
        """Return an independent deep copy."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (list, dict, set, StructuredOutputsParams)):  # all else is immutable
                setattr(other, name, copy.deepcopy(value))
        return other


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_list(name: str, value: Any, kind: type) -> list[Any]:
    """None -> [], a single string -> [string], any other sequence -> list; elements must be of `kind`."""
    if value is None:
        return []
    if isinstance(value, str):
        if kind is not str:
            raise ValueError(f"{name}={value!r} must be a list of {kind.__name__}.")
        return [value]
    if not isinstance(value, Sequence) and not isinstance(value, (set, frozenset)):
        raise ValueError(f"{name}={value!r} must be a list of {kind.__name__}.")
    values = list(value)
    if any(not isinstance(item, kind) or isinstance(item, bool) for item in values):
        raise ValueError(f"{name}={values!r} must be a list of {kind.__name__}.")
    return values


def _check_number(
    name: str, value: Any, low: float, high: float | None = None, open_low: bool = False, remedy: str = ""
) -> None:
    """check_range for a field that may not be None, NaN or infinite."""
    if value is None or value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{name}={value!r} must be a finite number.")
    check_range(name, value, low=low, high=high, open_low=open_low, remedy=remedy)


def _check_logit_bias(bias: Any) -> dict[int, float]:
    """Return {token id: bias} with int keys (JSON has them as strings of digits) and finite values."""
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias={bias!r} must map token ids to numbers.")
    checked: dict[int, float] = {}
    for key, value in bias.items():
        token_id = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not _is_int(token_id) or token_id < 0 or not is_number or not -100.0 <= value <= 100.0:
            raise ValueError(f"logit_bias: {key!r}: {value!r} needs a token id >= 0 and a number in [-100, 100].")
        checked[token_id] = float(value)
    return checked
