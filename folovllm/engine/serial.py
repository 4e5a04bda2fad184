"""The messages between the engine's front and its core, and their bytes (vLLM: `v1/serial_utils.py`).

    front -> core    Start (over stdin), then AddRequests, AbortRequests, ResetPrefixCache, Shutdown
    core -> front    Ready or StartFailed, then StepOutputs, RequestsFailed, PrefixCacheReset, EngineDead

Everything is plain data: msgpack with the type of every field checked on arrival, nothing that could name code to
run. Arrays and tensors travel as raw bytes with dtype and shape, and arrive as read-only numpy arrays.
"""

from __future__ import annotations

import struct
from typing import Any, TypeAlias

import msgspec
import numpy as np

from folovllm.engine.arg_utils import EngineArgs
from folovllm.outputs import EngineCoreOutputs
from folovllm.request import EngineCoreRequest

ARRAY_CODE = 1
"""msgpack's extension code of an array."""
ARRAY_DTYPES = ("<i4", "<i8", "<f4", "<f8")
"""The dtypes that travel; an array is sent as the index of its dtype here, its rank, its shape and its bytes."""
MAX_RANK = 4
START_HEADER = struct.Struct("<I")
"""In front of the Start message on stdin: its length in bytes."""


class DecodeError(ValueError):
    """Bytes that are no message of the expected kind."""


class Message(msgspec.Struct, tag=True, array_like=True):
    """One message: a list of the class's name and its fields."""


class Start(Message):
    """What the core process is to run; the first thing that it reads."""

    engine_args: EngineArgs
    """The front's own, statistics switched on where anybody reads them."""
    working_dir: str
    """The front's working directory: relative paths mean the same in both processes."""
    input_address: str
    """ZeroMQ endpoint that the core pulls messages from."""
    output_address: str
    """ZeroMQ endpoint that the core pushes messages to."""


class AddRequests(Message):
    """Queue these requests: all, or none if one is refused. Several are the samples of one request with n > 1."""

    requests: list[EngineCoreRequest]


class AbortRequests(Message):
    """End these requests; unknown ids are ignored."""

    request_ids: list[str]


class ResetPrefixCache(Message):
    """Forget all cached prefixes; answered by PrefixCacheReset."""

    call_id: int


class Shutdown(Message):
    """Free the devices and end."""


class Ready(Message):
    """The model is loaded and the core takes requests."""

    num_blocks: int
    """KV cache blocks, the null block included."""
    async_scheduling: bool
    """Whether steps overlap."""
    startup_report: str
    """LLMEngine.startup_report."""


class StartFailed(Message):
    """The core could not start."""

    message: str
    """What the user is told; a traceback where it is our mistake."""
    is_user_error: bool
    """Whether it was a ValueError."""


class StepOutputs(Message):
    """What a step brought."""

    outputs: EngineCoreOutputs


class RequestsFailed(Message):
    """The core could not queue these requests; all others go on."""

    request_ids: list[str]
    message: str
    is_user_error: bool
    """Whether it was a ValueError."""


class PrefixCacheReset(Message):
    """The answer to ResetPrefixCache."""

    call_id: int
    succeeded: bool
    """False where requests held blocks."""


class EngineDead(Message):
    """A step failed; the core ends."""

    reason: str
    """The traceback."""


ToCore: TypeAlias = AddRequests | AbortRequests | ResetPrefixCache | Shutdown
FromCore: TypeAlias = Ready | StartFailed | StepOutputs | RequestsFailed | PrefixCacheReset | EngineDead


def _encode_array(value: Any) -> msgspec.msgpack.Ext:
    """Return an array or CPU tensor as an extension; msgspec calls this for every type that it does not know."""
    if hasattr(value, "numpy"):
        value = value.numpy()
    if isinstance(value, np.generic):
        return value.item()  # type: ignore[no-any-return]  # a number, which msgspec knows
    if not isinstance(value, np.ndarray) or value.dtype.str not in ARRAY_DTYPES:
        raise TypeError(f"a {type(value).__name__} does not travel.")
    array = np.ascontiguousarray(value)
    header = struct.pack(f"<BB{array.ndim}Q", ARRAY_DTYPES.index(array.dtype.str), array.ndim, *value.shape)
    return msgspec.msgpack.Ext(ARRAY_CODE, header + array.tobytes())


def _decode_array(code: int, data: memoryview) -> Any:
    """Return the array of an extension; ValueError if it is none."""
    if code != ARRAY_CODE:
        raise ValueError(f"extension {code} is not known.")
    try:
        dtype_index, ndim = struct.unpack_from("<BB", data)
        if ndim > MAX_RANK or dtype_index >= len(ARRAY_DTYPES):
            raise ValueError(f"an array of rank {ndim} and dtype {dtype_index}")
        shape = struct.unpack_from(f"<{ndim}Q", data, 2)
        # bytes(): the array must outlive the message's buffer without keeping all of it.
        return np.frombuffer(bytes(data[2 + 8 * ndim :]), dtype=ARRAY_DTYPES[dtype_index]).reshape(shape)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"a damaged array: {error}") from error


_encode = msgspec.msgpack.Encoder(enc_hook=_encode_array).encode
_start_decoder = msgspec.msgpack.Decoder(Start)
_to_core_decoder = msgspec.msgpack.Decoder(ToCore)
_from_core_decoder = msgspec.msgpack.Decoder(FromCore, ext_hook=_decode_array)


def encode(message: Message) -> bytes:
    """Return the bytes of a message.

    Raises:
        ValueError: it holds something that cannot travel: an int of more than 64 bits, half of a surrogate pair.
    """
    try:
        return _encode(message)
    except (TypeError, OverflowError, UnicodeEncodeError) as error:
        raise ValueError(f"a value cannot be sent to the engine: {error}") from error


def decode_start(data: bytes) -> Start:
    """Return the Start message of `data`; DecodeError if it is none."""
    return _decode(_start_decoder, data)  # type: ignore[no-any-return]


def decode_to_core(data: bytes) -> ToCore:
    """Return the message of `data` to the core; DecodeError if it is none.

    Requests are checked again by SamplingParams itself.
    """
    return _decode(_to_core_decoder, data)  # type: ignore[no-any-return]


def decode_from_core(data: bytes) -> FromCore:
    """Return the message of `data` from the core; DecodeError if it is none."""
    return _decode(_from_core_decoder, data)  # type: ignore[no-any-return]


def _decode(decoder: msgspec.msgpack.Decoder[Any], data: bytes) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise DecodeError(f"{len(data)} bytes are no message: {error}") from error
