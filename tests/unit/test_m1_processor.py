"""Processor: what a request becomes, and what is refused before anything is queued."""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import pytest

from folovllm.config import ModelConfig, SchedulerConfig, VllmConfig
from folovllm.engine.processor import Processor
from folovllm.sampling_params import SamplingParams
from tests.fakes import FakeTokenizer

TOKENIZER = FakeTokenizer()
V = len(TOKENIZER)
MAX_MODEL_LEN = 32
badinput = pytest.mark.badinput


def make_processor(
    tokenizer: Any = TOKENIZER,
    generation_config: dict[str, Any] | None = None,
    policy: str = "fcfs",
    vocab_size: int = V,
    **model: Any,
) -> Processor:
    hf_config = {"vocab_size": vocab_size, "max_position_embeddings": MAX_MODEL_LEN}
    config = VllmConfig(
        model_config=ModelConfig("fake", hf_config=hf_config, **model),
        scheduler_config=SchedulerConfig(max_model_len=MAX_MODEL_LEN, policy=policy),
    )
    return Processor(config, tokenizer, generation_config or {})


def process(prompt: Any = "hello", params: SamplingParams | None = None, **kwargs: Any) -> Any:
    """Return the request that a processor with defaults makes."""
    return make_processor().process_inputs("id", prompt, params or SamplingParams(), **kwargs)[1]


# Prompts.


def test_text_is_tokenized_with_special_tokens() -> None:
    text, request = make_processor().process_inputs("id", "hello", SamplingParams())
    assert text == "hello"
    assert request.prompt_token_ids == [TOKENIZER.bos_token_id, *TOKENIZER.encode("hello", False)]
    assert (request.request_id, request.external_req_id, request.cache_salt) == ("id", "id", None)


def test_text_from_a_chat_template_gets_no_second_bos() -> None:
    assert process("hello", add_special_tokens=False).prompt_token_ids == TOKENIZER.encode("hello", False)


@pytest.mark.parametrize(
    ("prompt", "text", "ids"),
    [
        ({"prompt": "hello"}, "hello", TOKENIZER.encode("hello")),
        ({"prompt_token_ids": [5, 6]}, None, [5, 6]),
        ({"prompt_token_ids": (5, 6), "prompt": "shown"}, "shown", [5, 6]),
        ({"prompt_token_ids": [5, 6], "prompt": ""}, "", [5, 6]),
        ({"prompt": None, "prompt_token_ids": [0, V - 1]}, None, [0, V - 1]),
        ([5, 6], None, [5, 6]),
        ((5,), None, [5]),
    ],
)
def test_forms_of_a_prompt(prompt: Any, text: str | None, ids: list[int]) -> None:
    before = copy.deepcopy(prompt)
    shown, request = make_processor().process_inputs("id", prompt, SamplingParams())
    assert shown == text and request.prompt_token_ids == ids
    assert prompt == before
    if isinstance(prompt, list):
        assert request.prompt_token_ids is not prompt


def test_cache_salt_priority_and_arrival_time() -> None:
    processor = make_processor(policy="priority")
    prompt = {"prompt": "hello", "cache_salt": "tenant"}
    _, request = processor.process_inputs("id", prompt, SamplingParams(), arrival_time=5.0, priority=-3)
    assert (request.cache_salt, request.arrival_time, request.priority) == ("tenant", 5.0, -3)
    before = time.time()
    assert before <= process().arrival_time <= time.time()


@badinput
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", r"prompt is empty \(''\)"),
        ({"prompt": ""}, r"prompt is empty"),
        ([], r"prompt is empty: it must have at least one token"),
        ({"prompt_token_ids": []}, r"prompt is empty"),
        ({}, r"neither 'prompt' \(text\) nor 'prompt_token_ids'"),
        ({"prompt": None}, r"neither 'prompt'"),
        (5, r"prompt is a int; give a str, a list of token ids, or a dict"),
        (None, r"prompt is a NoneType"),
        (b"bytes", r"prompt is a bytes"),
        (np.array([1, 2]), r"prompt is a ndarray"),
        ({"prompt": 5}, r"prompt text is a int; it must be a str"),
        ({"prompt": ["a"]}, r"prompt text is a list"),
        ({"prompt_token_ids": "12"}, r"prompt_token_ids is a str; give a list of ints"),
        ({"prompt_token_ids": np.array([1])}, r"prompt_token_ids is a ndarray"),
        ({"prompt": "a", "multi_modal_data": {}}, r"unsupported 'multi_modal_data'; a prompt may have 'prompt',"),
        ({"prompt": "a", 7: 1}, r"unsupported 7;"),
        ({"prompt": "a", "cache_salt": ""}, r"cache_salt='' must be a non-empty str"),
        ({"prompt": "a", "cache_salt": 3}, r"cache_salt=3 must be"),
        (["a", "b"], r"prompt_token_ids\[0\]='a' is a str"),
        ([1, 2.0], r"prompt_token_ids\[1\]=2.0 is a float; token ids are ints"),
        ([1, True], r"prompt_token_ids\[1\]=True is a bool"),
        ([1, np.int64(2)], r"is a int64; token ids are ints \(use .tolist\(\)\)"),
        ([-1], rf"prompt_token_ids\[0\]=-1 is outside the vocabulary: token ids are in \[0, {V - 1}\]"),
        ([1, V], rf"prompt_token_ids\[1\]={V} is outside the vocabulary"),
        ("half \ud83d", r"at character 5: half of a surrogate pair"),
        ([1] * MAX_MODEL_LEN, r"prompt has 32 tokens; at most max_model_len - 1 = 31 fit.*Shorten it"),
        ("a" * 31, r"prompt has 32 tokens"),
        ({"prompt_token_ids": [1] * 500}, r"prompt has 500 tokens"),
    ],
)
def test_bad_prompts_are_refused(prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process(prompt)


@pytest.mark.parametrize("length", [1, MAX_MODEL_LEN - 1])
def test_longest_and_shortest_prompt_pass_whole(length: int) -> None:
    assert process([7] * length).prompt_token_ids == [7] * length


@badinput
def test_a_tokenizer_of_another_model_is_noticed() -> None:
    processor = make_processor(vocab_size=50)
    with pytest.raises(ValueError, match=r"outside the vocabulary.*Is this the model's own tokenizer\?"):
        processor.process_inputs("id", "hello", SamplingParams())


@badinput
def test_priority_needs_the_priority_policy() -> None:
    with pytest.raises(ValueError, match=r"priority=1 has no effect under the scheduling policy 'fcfs'"):
        process(priority=1)
    with pytest.raises(ValueError, match=r"priority=1.5 must be an int"):
        process(priority=1.5)


@badinput
def test_wrong_types_are_type_errors() -> None:
    with pytest.raises(TypeError, match=r"params must be a SamplingParams, got dict"):
        process(params={"temperature": 0})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"request_id must be a str, got int"):
        make_processor().process_inputs(3, "hello", SamplingParams())  # type: ignore[arg-type]


# Parameters.


def test_the_callers_params_are_never_changed() -> None:
    params = SamplingParams(max_tokens=None, stop=["a"], bad_words=["the"], logit_bias={5: 1.0}, stop_token_ids=[9])
    before = copy.deepcopy(params)
    request = make_processor(generation_config={"eos_token_id": [3]}).process_inputs("id", "hello", params)[1]
    assert params == before
    mine = request.sampling_params
    assert mine is not params and mine.stop is not params.stop and mine.logit_bias is not params.logit_bias
    assert mine != params


def test_max_tokens_defaults_to_what_is_left() -> None:
    assert process([1] * 10, SamplingParams(max_tokens=None)).sampling_params.max_tokens == MAX_MODEL_LEN - 10
    # More than is left is no error: the output ends with finish_reason "length".
    assert process([1] * 10, SamplingParams(max_tokens=999)).sampling_params.max_tokens == 999


def test_eos_is_the_union_of_tokenizer_and_generation_config() -> None:
    for configured, extra in (([3, 1, 9], {3, 9}), (3, {3}), (1, set()), (None, set()), ([], set())):
        processor = make_processor(generation_config={"eos_token_id": configured})
        params = processor.process_inputs("id", "hello", SamplingParams(stop_token_ids=[7]))[1].sampling_params
        assert params.eos_token_id == TOKENIZER.eos_token_id == 1
        assert set(params.stop_token_ids) == {7} | extra
        assert params.all_stop_token_ids == {1, 7} | extra


def test_eos_ids_that_the_model_cannot_emit_are_left_out() -> None:
    tokenizer = FakeTokenizer()
    tokenizer.eos_token_id = V + 5
    processor = make_processor(tokenizer, {"eos_token_id": [3, V, -1]})
    params = processor.process_inputs("id", "hello", SamplingParams())[1].sampling_params
    assert params.eos_token_id is None and params.all_stop_token_ids == {3}


def test_ignore_eos_leaves_only_the_requests_own_stop_tokens() -> None:
    processor = make_processor(generation_config={"eos_token_id": [3]})
    params = SamplingParams(ignore_eos=True, stop_token_ids=[7])
    mine = processor.process_inputs("id", "hello", params)[1].sampling_params
    assert mine.eos_token_id is None and mine.stop_token_ids == [7]


def test_bad_words_become_token_ids() -> None:
    params = process(params=SamplingParams(bad_words=["ing", "xy"])).sampling_params
    assert TOKENIZER.encode("ing", False) in params.bad_words_token_ids
    assert TOKENIZER.encode("xy", False) in params.bad_words_token_ids


def test_seeds_are_drawn_once_per_request_and_repeat_with_the_engine() -> None:
    def seeds(seed: int) -> list[int | None]:
        processor = make_processor(seed=seed)
        return [processor.process_inputs("id", "a", SamplingParams())[1].sampling_params.seed for _ in range(20)]

    drawn = seeds(0)
    assert drawn == seeds(0) and drawn != seeds(1)
    assert len(set(drawn)) == 20 and all(isinstance(s, int) and 0 <= s < 2**63 for s in drawn)
    assert process(params=SamplingParams(seed=5)).sampling_params.seed == 5


def test_refused_requests_use_up_no_seed() -> None:
    processor, other = make_processor(), make_processor()
    for bad in ("", [V], "a" * 99):
        with pytest.raises(ValueError):
            processor.process_inputs("id", bad, SamplingParams())
    with pytest.raises(ValueError):
        processor.process_inputs("id", "a", SamplingParams(stop_token_ids=[V]))
    first, second = (p.process_inputs("id", "a", SamplingParams())[1] for p in (processor, other))
    assert first.sampling_params.seed == second.sampling_params.seed


@badinput
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop_token_ids": [V]}, rf"stop_token_ids\[0\]={V} is outside the vocabulary"),
        ({"allowed_token_ids": [1, V + 3]}, rf"allowed_token_ids\[1\]={V + 3} is outside"),
        ({"logit_bias": {V: 1.0}}, rf"logit_bias\[0\]={V} is outside"),
        ({"logprobs": 21}, r"logprobs=21 exceeds what the engine allows: at most 20.*max_logprobs"),
        ({"logprobs": -1}, r"logprobs=-1 exceeds"),
        ({"prompt_logprobs": 21}, r"prompt_logprobs=21 exceeds"),
        ({"min_tokens": 28, "max_tokens": 28}, r"min_tokens=28 cannot be reached.*leaves 27"),
    ],
)
def test_params_that_do_not_fit_the_model_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process([1] * 5, SamplingParams(**params))


@badinput
def test_params_spoilt_after_construction_are_refused() -> None:
    params = SamplingParams()
    params.temperature = -1.0
    with pytest.raises(ValueError, match=r"temperature=-1.0"):
        process(params=params)


@badinput
@pytest.mark.parametrize(
    ("max_logprobs", "vocab_size", "allowed", "refused"),
    [(20, V, (0, 20), (21, -1)), (0, V, (0,), (1,)), (-1, V, (-1, V), (V + 1,)), (999, V, (-1, V), (V + 1,))],
)
def test_limits_of_logprobs(
    max_logprobs: int, vocab_size: int, allowed: tuple[int, ...], refused: tuple[int, ...]
) -> None:
    processor = make_processor(max_logprobs=max_logprobs, vocab_size=vocab_size)
    for name in ("logprobs", "prompt_logprobs"):
        for value in allowed:
            request = processor.process_inputs("id", [1], SamplingParams(**{name: value}))[1]
            if getattr(request.sampling_params, name) != value:
                pytest.fail(f"{name}={value} was changed")
        for value in refused:
            with pytest.raises(ValueError, match=f"{name}={value} exceeds"):
                processor.process_inputs("id", [1], SamplingParams(**{name: value}))


# Without a tokenizer.


def test_token_ids_need_no_tokenizer() -> None:
    processor = make_processor(tokenizer=None, generation_config={"eos_token_id": 3})
    text, request = processor.process_inputs("id", [5], SamplingParams())
    assert text is None and request.prompt_token_ids == [5]
    assert request.sampling_params.stop_token_ids == [3] and request.sampling_params.eos_token_id is None


@badinput
@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("hello", {}, r"prompt is text, but the engine has no tokenizer.*prompt_token_ids"),
        ([5], {"stop": ["x"]}, r"stop=\['x'\] needs a tokenizer.*stop_token_ids"),
        ([5], {"bad_words": ["x"]}, r"bad_words=\['x'\] needs a tokenizer"),
    ],
)
def test_what_needs_a_tokenizer_is_refused_without(prompt: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_processor(tokenizer=None).process_inputs("id", prompt, SamplingParams(**params))


# Defaults from the model.

GENERATION_CONFIG = {
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "max_new_tokens": 20,
    "eos_token_id": [3],
    "do_sample": True,
    "transformers_version": "5.0",
    "pad_token_id": None,
}


def test_params_default_to_the_models_own() -> None:
    processor = make_processor(generation_config=GENERATION_CONFIG)
    default = processor.get_default_sampling_params()
    assert default == SamplingParams(
        temperature=0.6, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1, max_tokens=20
    )
    mine = processor.process_inputs("id", "hello")[1].sampling_params
    assert (mine.temperature, mine.max_tokens, mine.stop_token_ids) == (0.6, 20, [3])
    unset = make_processor(generation_config={"temperature": None, "max_new_tokens": None})
    assert unset.get_default_sampling_params() == SamplingParams()


def test_generation_config_vllm_keeps_eos_but_no_sampling_defaults() -> None:
    hf_config = {"vocab_size": V, "max_position_embeddings": MAX_MODEL_LEN}
    config = VllmConfig(ModelConfig("fake", hf_config=hf_config, generation_config="vllm"))
    processor = Processor(config, TOKENIZER, GENERATION_CONFIG)
    assert processor.get_default_sampling_params() == SamplingParams()
    assert processor.process_inputs("id", "hello")[1].sampling_params.stop_token_ids == [3]


@badinput
def test_a_broken_generation_config_says_where_it_comes_from() -> None:
    processor = make_processor(generation_config={"top_p": 7})
    with pytest.raises(ValueError, match=r"generation_config.json: top_p=7 .*generation_config='vllm'"):
        processor.get_default_sampling_params()
