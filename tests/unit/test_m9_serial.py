"""The messages between front and core: what is sent arrives, and bytes that are no message are refused."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.engine import serial
from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.serial import (
    AbortRequests,
    AddRequests,
    DecodeError,
    EngineDead,
    Message,
    PrefixCacheReset,
    Ready,
    RequestsFailed,
    ResetPrefixCache,
    Shutdown,
    Start,
    StartFailed,
    StepOutputs,
    decode_from_core,
    decode_start,
    decode_to_core,
    encode,
)
from folovllm.metrics.stats import EngineCoreEvent, EngineCoreEventType, PrefixCacheStats, SchedulerStats
from folovllm.outputs import EngineCoreOutput, EngineCoreOutputs, LogprobsLists, LogprobsTensors
from folovllm.request import EngineCoreRequest, FinishReason
from folovllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
token_ids = st.lists(st.integers(0, 2**31), max_size=8)
floats = st.floats(-1e6, 1e6)
counts = st.integers(0, 2**40)

structured = st.one_of(
    st.builds(StructuredOutputsParams, json=st.dictionaries(texts, texts, min_size=1, max_size=2)),
    st.builds(StructuredOutputsParams, choice=st.lists(texts.filter(bool), min_size=1, max_size=3)),
    st.builds(StructuredOutputsParams, json_object=st.just(True)),
)
sampling_params = st.builds(
    SamplingParams,
    n=st.integers(1, 4),
    temperature=st.floats(0.1, 2.0) | st.just(1),
    top_p=st.floats(0.1, 1.0),
    top_k=st.integers(-1, 100).filter(bool),
    seed=st.none() | st.integers(0, 2**63 - 1),
    stop=st.none() | texts.filter(bool) | st.lists(texts.filter(bool), max_size=3),
    stop_token_ids=st.none() | token_ids,
    max_tokens=st.none() | st.integers(50, 10**6),
    min_tokens=st.integers(0, 50),
    logprobs=st.none() | st.integers(-1, 20),
    output_kind=st.sampled_from(RequestOutputKind),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 10**6), st.floats(-100, 100), max_size=3),
    allowed_token_ids=st.none() | token_ids.filter(bool),
    bad_words_token_ids=st.none() | st.lists(token_ids, max_size=2),
    eos_token_id=st.none() | st.integers(0, 99),
    structured_outputs=st.none() | structured,
    all_stop_token_ids=st.sets(st.integers(0, 99), max_size=3),
)
requests = st.builds(
    EngineCoreRequest,
    request_id=texts,
    prompt_token_ids=token_ids,
    sampling_params=sampling_params,
    arrival_time=floats,
    external_req_id=st.none() | texts,
    priority=st.integers(-(2**40), 2**40),
    cache_salt=st.none() | texts,
)
to_core: st.SearchStrategy[Any] = st.one_of(
    st.builds(AddRequests, requests=st.lists(requests, max_size=3)),
    st.builds(AbortRequests, request_ids=st.lists(texts, max_size=3)),
    st.builds(ResetPrefixCache, call_id=counts),
    st.just(Shutdown()),
)
events = st.builds(EngineCoreEvent, type=st.sampled_from(EngineCoreEventType), timestamp=floats)
outputs = st.builds(
    EngineCoreOutput,
    request_id=texts,
    new_token_ids=token_ids,
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_reason=st.none() | texts | st.integers(0, 2**31),
    num_cached_tokens=counts,
    events=st.none() | st.lists(events, max_size=2),
)
stats = st.builds(
    SchedulerStats,
    num_running_reqs=counts,
    num_waiting_reqs=counts,
    kv_cache_usage=st.floats(0, 1),
    prefix_cache_stats=st.builds(
        PrefixCacheStats, requests=counts, queries=counts, hits=counts, was_reset=st.booleans()
    ),
    num_preempted_reqs=counts,
)
steps = st.builds(
    EngineCoreOutputs,
    outputs=st.lists(outputs, max_size=4),
    scheduler_stats=st.none() | stats,
    timestamp=floats,
)
from_core: st.SearchStrategy[Any] = st.one_of(
    st.builds(Ready, num_blocks=counts, async_scheduling=st.booleans(), startup_report=texts),
    st.builds(StartFailed, message=texts, is_user_error=st.booleans()),
    st.builds(StepOutputs, outputs=steps),
    st.builds(RequestsFailed, request_ids=st.lists(texts, max_size=2), message=texts, is_user_error=st.booleans()),
    st.builds(PrefixCacheReset, call_id=counts, succeeded=st.booleans()),
    st.builds(EngineDead, reason=texts),
)
engine_args = st.builds(
    EngineArgs,
    model=texts,
    max_model_len=st.none() | counts,
    cuda_graph_sizes=st.none() | st.lists(counts, max_size=3),
    async_scheduling=st.none() | st.booleans(),
    gpu_memory_utilization=st.floats(0.1, 1),
)


@given(to_core)
def test_messages_to_the_core_arrive_as_they_were(message: Message) -> None:
    assert decode_to_core(encode(message)) == message


@given(from_core)
def test_messages_from_the_core_arrive_as_they_were(message: Message) -> None:
    assert decode_from_core(encode(message)) == message


@given(engine_args)
def test_the_start_message_arrives_as_it_was(args: EngineArgs) -> None:
    start = Start(args, "/a folder", "ipc:///x/input", "ipc:///x/output")
    assert decode_start(encode(start)) == start


def test_every_message_has_a_strategy() -> None:
    sent = {to: typing.get_args(getattr(serial, to)) for to in ("ToCore", "FromCore")}
    assert {c.__name__ for c in Message.__subclasses__()} == {c.__name__ for kinds in sent.values() for c in kinds} | {
        "Start"
    }
    assert len(sent["ToCore"]) == 4 and len(sent["FromCore"]) == 6


def test_every_field_of_a_request_and_of_the_arguments_arrives() -> None:
    """A field with a type that does not travel would show here, also one that is added later."""
    params = SamplingParams(
        structured_outputs=StructuredOutputsParams(regex="a+"),
        stop=["a"],
        seed=3,
        logit_bias={4: 1.5},
        bad_words=["b"],
        allowed_token_ids=[1, 2],
    )
    request = EngineCoreRequest("id", [1, 2], params, 1.5, "external", -3, "salt")
    (arrived,) = decode_to_core(encode(AddRequests([request]))).requests  # type: ignore[union-attr]
    assert dataclasses.asdict(arrived) == dataclasses.asdict(request)
    assert type(arrived.sampling_params.all_stop_token_ids) is set
    start = Start(EngineArgs(), "", "", "")
    assert dataclasses.asdict(decode_start(encode(start)).engine_args) == dataclasses.asdict(EngineArgs())


def step_with(logprobs: Any = None, prompt_logprobs: Any = None) -> StepOutputs:
    return StepOutputs(EngineCoreOutputs([EngineCoreOutput("a", [1], logprobs, prompt_logprobs)]))


def arrived_output(message: StepOutputs) -> EngineCoreOutput:
    arrived = decode_from_core(encode(message))
    assert isinstance(arrived, StepOutputs)
    return arrived.outputs.outputs[0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 21), (3, 5), (0, 4), (2, 1000)])
def test_arrays_arrive_with_dtype_shape_and_values(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    sent = LogprobsLists(
        rng.integers(0, 2**40, shape),
        rng.standard_normal(shape, np.float32),
        rng.integers(0, 9, shape[0]).astype(np.int32),
    )
    arrived = arrived_output(step_with(sent)).new_logprobs
    assert arrived is not None
    for before, after in zip(sent[:3], arrived[:3], strict=True):
        assert after.dtype == before.dtype and after.shape == before.shape
        np.testing.assert_array_equal(after, before)
    assert arrived.extra is None


def test_a_slice_of_a_batch_travels_alone() -> None:
    batch = np.arange(4000, dtype=np.int64).reshape(100, 40)
    sent = LogprobsLists(batch, batch.astype(np.float32), batch[:, 0]).slice_request(7, 1)
    message = step_with(sent)
    assert len(encode(message)) < 1000
    arrived = arrived_output(message).new_logprobs
    assert arrived is not None
    np.testing.assert_array_equal(arrived.logprob_token_ids, batch[7:8])


def test_tensors_arrive_as_arrays() -> None:
    tensors = LogprobsTensors(torch.arange(6).reshape(3, 2).T, torch.ones(2, 3), torch.arange(2, dtype=torch.int32))
    arrived = arrived_output(step_with(prompt_logprobs=tensors)).new_prompt_logprobs_tensors
    assert arrived is not None
    assert [after.tolist() for after in arrived[:3]] == [before.tolist() for before in tensors[:3]]


@pytest.mark.parametrize(
    "value",
    [
        {"priority": 10**30},
        {"cache_salt": "\ud800"},
        {"request_id": object()},
        {"prompt_token_ids": [np.array(["text"])]},
    ],
)
def test_what_cannot_travel_is_a_value_error(value: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"request_id": "a", "prompt_token_ids": [1], "sampling_params": SamplingParams()}
    request = EngineCoreRequest(**{**fields, "arrival_time": 0.0, **value})
    with pytest.raises(ValueError, match="cannot be sent"):
        encode(AddRequests([request]))


def test_numbers_of_numpy_travel_as_numbers() -> None:
    params = SamplingParams(temperature=np.float64(0.5))
    request = EngineCoreRequest("a", [1], params, 0.0)
    (arrived,) = decode_to_core(encode(AddRequests([request]))).requests  # type: ignore[union-attr]
    assert arrived.sampling_params.temperature == 0.5 and type(arrived.sampling_params.temperature) is float


def test_a_request_is_checked_again_on_arrival() -> None:
    request = EngineCoreRequest("a", [1], SamplingParams(), 0.0)
    request.sampling_params.temperature = -1.0
    with pytest.raises(DecodeError, match="temperature"):
        decode_to_core(encode(AddRequests([request])))


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    for decode in (decode_to_core, decode_from_core, decode_start):
        try:
            message = decode(data)
        except DecodeError:
            continue
        assert isinstance(message, Message)


@given(from_core | to_core, st.data())
@settings(max_examples=300)
def test_damaged_messages_are_refused_or_still_messages(message: Message, data: st.DataObject) -> None:
    encoded = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    for decode in (decode_to_core, decode_from_core):
        try:
            arrived = decode(bytes(encoded))
        except DecodeError:
            continue
        assert isinstance(arrived, Message)


@given(st.binary(max_size=60), st.integers(-128, 127))
def test_damaged_arrays_are_refused(data: bytes, code: int) -> None:
    array = msgspec.msgpack.Ext(code, data)
    encoded = encode(StepOutputs(EngineCoreOutputs([EngineCoreOutput("a", [1], LogprobsLists(array, array, array))])))
    try:
        message = decode_from_core(encoded)
    except DecodeError:
        return
    assert isinstance(message, StepOutputs)
    arrived = message.outputs.outputs[0].new_logprobs
    assert arrived is not None and isinstance(arrived.logprobs, np.ndarray)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\x91" * 100_000,
        b"\xc7\x00\x01",
        b"cos\nsystem\n(S'true'\ntR.",  # a pickle that would run a program
        msgspec.msgpack.encode(["Shutdown", 1, ["more"]]),
        msgspec.msgpack.encode(["NoSuchMessage"]),
        msgspec.msgpack.encode(["AbortRequests", "not a list"]),
    ],
)
def test_known_bad_bytes(data: bytes) -> None:
    for decode in (decode_to_core, decode_from_core, decode_start):
        try:
            assert decode(data) == Shutdown()  # a longer list is a newer version's message: the rest is not read
        except DecodeError as error:
            assert "are no message" in str(error)
