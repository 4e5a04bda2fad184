"""The fakes themselves: the tokenizer is reversible, the executor notices what a scheduler does wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from folovllm.kv_cache_interface import KVCacheConfig
from folovllm.sampling_params import SamplingParams
from tests.fakes import FakeExecutor, FakeTokenizer, expected_tokens, next_token


@pytest.mark.parametrize("text", ["", "hello world, stopping", "日本語 é 😀\n\n\x00", "<eos>"])
def test_tokenizer_is_reversible(text: str) -> None:
    tokenizer = FakeTokenizer()
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(ids) == "<bos>" + text
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids)) == ids
    assert len(tokenizer.get_vocab()) == len(tokenizer) == tokenizer.vocab_size


def test_chat_template() -> None:
    tokenizer = FakeTokenizer()
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "user: hi<end>\nassistant: "
    assert tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False) == "user: hi"


def test_next_token_depends_on_everything_and_avoids_the_forbidden() -> None:
    assert next_token([1, 2], 50) != next_token([2, 2], 50)
    token = next_token([1, 2], 50)
    assert next_token([1, 2], 50, forbidden=[token, token + 1]) == token + 2
    assert len(expected_tokens([1], 5, 50)) == 5


def step(
    new: list[Any] = (),
    cached: list[tuple[Any, ...]] = (),
    finished: set[str] | None = None,
    **scheduled: int,  # type: ignore[assignment]
) -> SimpleNamespace:
    """A SchedulerOutput; `cached` holds (id, new block ids, computed tokens)."""
    return SimpleNamespace(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[c[0] for c in cached],
            new_block_ids=[None if c[1] is None else (c[1],) for c in cached],
            num_computed_tokens=[c[2] for c in cached],
            resumed_req_ids={c[0] for c in cached if len(c) > 3},
            all_token_ids={c[0]: c[3] for c in cached if len(c) > 3},
        ),
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        finished_req_ids=finished or set(),
    )


def new(req_id: str, prompt: list[int], block_ids: list[int], computed: int = 0, **params: Any) -> SimpleNamespace:
    return SimpleNamespace(
        req_id=req_id,
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(**params),
        block_ids=(block_ids,),
        num_computed_tokens=computed,
    )


def executor() -> FakeExecutor:
    made = FakeExecutor(vocab_size=50, block_size=4)
    made.initialize_from_config([KVCacheConfig(num_blocks=10)])
    return made


def test_executor_follows_deltas() -> None:
    fake = executor()
    prompt = [7, 8, 9, 10, 11, 12]
    truth = expected_tokens(prompt, 4, 50)
    assert fake.execute_model(step([new("a", prompt, [1])], a=4)).sampled_token_ids == [[]]
    output = fake.execute_model(step(cached=[("a", [2], 4)], a=2))
    assert output.req_ids == ["a"] and output.sampled_token_ids == [[truth[0]]]
    assert fake.execute_model(step(cached=[("a", None, 6)], a=1)).sampled_token_ids == [[truth[1]]]
    # Preempted and resumed, with other blocks.
    resumed = ("a", [5, 6], 0, [*prompt, *truth[:2]])
    assert fake.execute_model(step(cached=[resumed], a=8)).sampled_token_ids == [[truth[2]]]
    # A second request takes over the prefix block, by reference.
    prefix = new("b", prompt, [5, 7], computed=4)
    output = fake.execute_model(step([prefix], [("a", [8], 8)], a=1, b=2))
    assert output.sampled_token_ids == [[truth[3]], [truth[0]]]
    assert fake.execute_model(step(finished={"a", "b"})).req_ids == [] and not fake.requests
    assert len(fake.scheduled) == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (step(cached=[("a", None, 4)], a=1), "a gap"),
        (step(cached=[("a", None, 5)], a=9), "known"),
        (step(cached=[("a", [], 5)], a=0), "known"),
        (step([new("a", [1], [3])], a=1), "was known"),
        (step([new("b", [7] * 9, [3, 4])], b=9), "blocks for 9 tokens"),
        (step([new("b", [7] * 3, [0])], b=3), "null block"),
        (step([new("b", [7] * 8, [3, 3])], b=8), "twice"),
        (step([new("b", [7, 8, 9, 99, 1], [1, 3], computed=4)], b=1), "holds another prefix"),
        (step([new("b", [7, 8, 9, 10, 1], [4, 3], computed=4)], b=1), "holds another prefix"),
        (step(cached=[("a", [3, 4], 0, [7, 8])], a=2), None),
        (step(cached=[("a", [3, 4], 0, [7, 9])], a=2), "other tokens"),
    ],
)
def test_executor_notices_mistakes(wrong: SimpleNamespace, message: str | None) -> None:
    fake = executor()
    fake.execute_model(step([new("a", [7, 8, 9, 10, 11], [1, 2])], a=5))
    if message is None:
        fake.execute_model(wrong)
        return
    with pytest.raises(AssertionError, match=message):
        fake.execute_model(wrong)


def test_logprobs_on_request() -> None:
    fake = executor()
    requests = [new("a", [7, 8], [1], logprobs=1), new("b", [7, 8], [2], prompt_logprobs=2), new("c", [9], [3])]
    output = fake.execute_model(step(requests, a=2, b=2, c=1))
    assert output.logprobs is not None and output.logprobs.logprob_token_ids.shape == (3, 2)
    assert output.logprobs.logprob_token_ids[0, 0] == output.sampled_token_ids[0][0]
    prompt = output.prompt_logprobs_dict["b"]
    assert prompt is not None and prompt.logprob_token_ids.tolist() == [[8, 0, 1]]
    assert set(output.prompt_logprobs_dict) == {"b"}
    output = fake.execute_model(step(cached=[("b", None, 2)], b=1))
    assert output.logprobs is None and output.prompt_logprobs_dict == {}
