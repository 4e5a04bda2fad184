"""SamplingParams: defaults, what is refused and how it says so, and what model and tokenizer add."""

from __future__ import annotations

import re
from typing import Any

import pytest

from folovllm.sampling_params import MAX_N, MAX_SEED, MAX_STOPS, RequestOutputKind, SamplingParams, SamplingType
from tests.fakes import FakeTokenizer

NAN, INF = float("nan"), float("inf")


def test_defaults_are_openais() -> None:
    params = SamplingParams()
    expected = {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": None,
        "max_tokens": 16,
        "min_tokens": 0,
        "stop": [],
        "stop_token_ids": [],
        "ignore_eos": False,
        "logprobs": None,
        "prompt_logprobs": None,
        "detokenize": True,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "output_kind": RequestOutputKind.CUMULATIVE,
        "logit_bias": None,
        "allowed_token_ids": None,
        "bad_words": [],
        "bad_words_token_ids": None,
        "eos_token_id": None,
        "all_stop_token_ids": set(),
    }
    assert {name: getattr(params, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"stop": "abc"}, {"stop": ["abc"]}),
        ({"stop": ("a", "b")}, {"stop": ["a", "b"]}),
        ({"stop": None, "bad_words": None, "stop_token_ids": None}, {"stop": [], "bad_words": []}),
        ({"bad_words": "word"}, {"bad_words": ["word"]}),
        ({"stop_token_ids": (3, 3, 5)}, {"stop_token_ids": [3, 3, 5], "all_stop_token_ids": {3, 5}}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"allowed_token_ids": (1, 2)}, {"allowed_token_ids": [1, 2]}),
        ({"logit_bias": {"7": 1, 8: -2.5}}, {"logit_bias": {7: 1.0, 8: -2.5}}),
        ({"logprobs": 0, "prompt_logprobs": -1}, {"logprobs": 0, "prompt_logprobs": -1}),
        ({"max_tokens": None, "min_tokens": 99}, {"max_tokens": None}),
        ({"min_tokens": 16}, {"min_tokens": 16}),
    ],
)
def test_accepted_forms(given: dict[str, Any], kept: dict[str, Any]) -> None:
    params = SamplingParams(**given)
    assert {name: getattr(params, name) for name in kept} == kept


def test_lists_are_copies() -> None:
    stop, ids, allowed, bias = ["a"], [1], [2], {3: 1.0}
    params = SamplingParams(stop=stop, stop_token_ids=ids, allowed_token_ids=allowed, logit_bias=bias)
    stop.append("")
    ids.append(-1)
    allowed.clear()
    bias[-5] = NAN
    assert (params.stop, params.stop_token_ids, params.allowed_token_ids, params.logit_bias) == (
        ["a"],
        [1],
        [2],
        {3: 1.0},
    )


@pytest.mark.parametrize(
    "limits",
    [
        {"n": MAX_N},
        {"temperature": 0},
        {"temperature": 100.0},
        {"top_p": 1e-9},
        {"min_p": 1},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"repetition_penalty": 1e-3},
        {"seed": 0},
        {"seed": MAX_SEED},
        {"stop": ["x"] * MAX_STOPS},
        {"logit_bias": {0: -100, 1: 100}},
        {"max_tokens": 1},
    ],
)
def test_limits_are_inside(limits: dict[str, Any]) -> None:
    SamplingParams(**limits)


REFUSED: dict[str, list[Any]] = {
    "n": [0, -1, MAX_N + 1, 1.0, True, "1", None],
    "temperature": [-0.1, NAN, INF, None, "hot", True],
    "top_p": [0, -0.5, 1.0001, NAN, None],
    "top_k": [-2, 1.5, True, "5", None],
    "min_p": [-0.1, 1.1, NAN, None],
    "presence_penalty": [-2.1, 2.1, NAN, None],
    "frequency_penalty": [-2.1, 2.1, INF],
    "repetition_penalty": [0, -1.0, INF, None],
    "seed": [-1, MAX_SEED + 1, 1.5, True],
    "max_tokens": [0, -1, 1.0, "16"],
    "min_tokens": [-1, 1.5, None],
    "stop": [5, [5], "", ["a", ""], [b"x"], {"a": 1}],
    "bad_words": [5, [5], "", [""]],
    "stop_token_ids": [5, "5", [1.0], [True], [-1]],
    "allowed_token_ids": [5, "12", [], [1.0], [True], [-1]],
    "logit_bias": [
        [1],
        {"a": 1},
        {1.5: 1},
        {True: 1},
        {"5_0": 1},
        {-1: 1},
        {1: 101},
        {1: -100.5},
        {1: NAN},
        {1: "1"},
        {1: None},
        {1: True},
    ],
    "logprobs": [-2, 1.0, True],
    "prompt_logprobs": [-2, "1"],
    "ignore_eos": [1, None],
    "detokenize": ["yes"],
    "skip_special_tokens": [0],
    "include_stop_str_in_output": [None],
    "output_kind": [0, "delta", None],
}


@pytest.mark.badinput
@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in REFUSED.items() for v in values])
def test_refused_values_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(field)):
        SamplingParams(**{field: value})


@pytest.mark.badinput
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1}, r"temperature=-1 must be a number in \[0\.0, inf\)\. 0 is greedy\."),
        ({"top_p": 0}, r"top_p=0 must be a number in \(0\.0, 1\.0\]\. 1 is off\."),
        ({"max_tokens": 0}, r"max_tokens=0 must be an int in \[1, inf\)"),
        ({"min_tokens": 5, "max_tokens": 4}, r"min_tokens=5 must not exceed max_tokens=4; lower it or raise"),
        ({"n": 2, "temperature": 0}, r"n=2 must be 1 with temperature=0"),
        ({"stop": "x", "detokenize": False}, r"stop strings need detokenize=True; use stop_token_ids"),
        ({"allowed_token_ids": []}, r"allowed_token_ids=\[\] would forbid every token; leave it None"),
        ({"stop": ["x"] * (MAX_STOPS + 1)}, rf"stop has {MAX_STOPS + 1} strings; at most {MAX_STOPS}"),
    ],
)
def test_messages_give_field_value_range_and_remedy(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**given)


@pytest.mark.badinput
def test_an_unknown_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("temperature", "kind"),
    [(0, SamplingType.GREEDY), (1e-6, SamplingType.GREEDY), (1e-5, SamplingType.RANDOM), (1, SamplingType.RANDOM)],
)
def test_sampling_type(temperature: float, kind: SamplingType) -> None:
    assert SamplingParams(temperature=temperature).sampling_type is kind


def test_clone_is_independent() -> None:
    params = SamplingParams(stop=["a"], logit_bias={1: 1.0}, stop_token_ids=[4])
    clone = params.clone()
    assert clone == params
    clone.stop.append("b")  # type: ignore[union-attr]
    clone.logit_bias[2] = 1.0  # type: ignore[index]
    clone.all_stop_token_ids.add(9)
    assert params == SamplingParams(stop=["a"], logit_bias={1: 1.0}, stop_token_ids=[4])


# What the model adds.


@pytest.mark.parametrize("configured", [None, 7, [7], [7, 9], [9, 2], []])
def test_eos_is_a_union(configured: Any) -> None:
    params = SamplingParams(stop_token_ids=[2])
    params.update_from_generation_config({"eos_token_id": configured} if configured is not None else {}, 7)
    extra = set([configured] if isinstance(configured, int) else configured or []) - {7}
    assert params.eos_token_id == 7
    assert sorted(params.stop_token_ids or []) == sorted({2} | extra)
    assert params.all_stop_token_ids == {2, 7} | extra


def test_ignore_eos_stops_at_none_of_them_but_min_tokens_knows_them() -> None:
    params = SamplingParams(stop_token_ids=[2], ignore_eos=True)
    params.update_from_generation_config({"eos_token_id": [7, 9]}, 7)
    assert params.eos_token_id is None and params.stop_token_ids == [2]
    assert params.all_stop_token_ids == {2, 7, 9}


def test_without_a_tokenizers_eos_the_configured_ones_stop() -> None:
    params = SamplingParams()
    params.update_from_generation_config({"eos_token_id": 7})
    assert params.eos_token_id is None and params.stop_token_ids == [7]


def test_bad_words_are_forbidden_bare_and_after_a_space() -> None:
    tokenizer = FakeTokenizer(["the", " the", "ing"])
    the, spaced_the, ing = (tokenizer.encode(w, add_special_tokens=False) for w in ("the", " the", "ing"))
    params = SamplingParams(bad_words=["the", "ing", "the ing"])
    params.update_from_tokenizer(tokenizer)
    space = tokenizer.encode(" ", add_special_tokens=False)
    # "the" has a form with a melted space; " ing" is a space and "ing", which forbids nothing new.
    assert params.bad_words_token_ids == [the, spaced_the, ing, the + space + ing, spaced_the + space + ing]
    untouched = SamplingParams()
    untouched.update_from_tokenizer(tokenizer)
    assert untouched.bad_words_token_ids is None


@pytest.mark.badinput
def test_a_bad_word_without_tokens_is_refused() -> None:
    params = SamplingParams(bad_words=[" "])
    with pytest.raises(ValueError, match=r"bad_words: ' ' gives no tokens with this tokenizer; remove it"):
        params.update_from_tokenizer(FakeTokenizer())
