"""Helpers used everywhere and torch-free: argument checks, canonical hashing, small arithmetic, logging."""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GiB = 1 << 30


def check_choice(field: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`; the message lists them."""
    if value not in choices:
        raise ValueError(f"{field}={value!r} is not supported; choose one of {', '.join(map(repr, choices))}.")


def check_range(
    field: str,
    value: float | None,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    remedy: str = "",
) -> None:
    """Raise ValueError unless `value` is a number in [low, high] (`open_low`: in (low, high]); None passes.

    The message names field, value, allowed range and `remedy`. An int bound asks for an int value.
    """
    if value is None:
        return
    integral = isinstance(low, int) or isinstance(high, int)
    number = isinstance(value, int if integral else (int, float)) and not isinstance(value, bool)
    inside = number and (
        (low is None or (value > low if open_low else value >= low)) and (high is None or value <= high)
    )
    if not inside:
        left = "(-inf" if low is None else f"{'(' if open_low else '['}{low}"
        right = "inf)" if high is None else f"{high}]"
        kind = "an int" if integral else "a number"
        raise ValueError(f"{field}={value!r} must be {kind} in {left}, {right}.{' ' + remedy if remedy else ''}")


def check_bool(field: str, value: object) -> None:
    """Raise ValueError unless `value` is True or False: "no" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{field}={value!r} must be True or False.")


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(a // -b)


def power_of_2_at_least(n: int) -> int:
    """Return the smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def round_up(a: int, b: int) -> int:
    """Return the smallest multiple of `b` that is at least `a`."""
    return cdiv(a, b) * b


def _encode(obj: Any, out: bytearray) -> None:
    """Append a canonical, self-delimiting encoding of `obj` (type tag, length, payload) to `out`."""
    if obj is None:
        out += b"N"
    elif isinstance(obj, bool):
        out += b"T" if obj else b"F"
    elif isinstance(obj, int):
        if -(1 << 63) <= obj < 1 << 63:
            out += b"q" + obj.to_bytes(8, "little", signed=True)
        else:
            payload = obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True)
            out += b"I" + struct.pack("<Q", len(payload)) + payload
    elif isinstance(obj, float):
        out += b"d" + struct.pack("<d", obj)
    elif isinstance(obj, str):
        payload = obj.encode("utf-8", "surrogatepass")
        out += b"s" + struct.pack("<Q", len(payload)) + payload
    elif isinstance(obj, (bytes, bytearray)):
        out += b"b" + struct.pack("<Q", len(obj)) + obj
    elif isinstance(obj, (tuple, list)):
        out += (b"t" if isinstance(obj, tuple) else b"l") + struct.pack("<Q", len(obj))
        # A block of token ids is the common case: one pack call instead of one per id.
        packed = pack_ints(obj)
        if packed is not None:
            out += b"*" + packed
        else:
            for item in obj:
                _encode(item, out)
    else:
        raise TypeError(f"cannot hash a {type(obj).__name__}; use tuples, lists, ints, floats, str, bytes or None")


def pack_ints(items: Sequence[Any]) -> bytes | None:
    """Return `items` as 8 bytes each if they are all ints (not bools) of 64 bits, else None."""
    return pack_token_ids(items) if set(map(type, items)) == {int} else None


def pack_token_ids(token_ids: Sequence[int], code: str = "q") -> bytes | None:
    """Return ids as numbers of struct's `code` each, little-endian, or None if one does not fit.

    Faster than what looks at one after the other, and so than NumPy's conversion of a list. For ids that were checked
    to be ints: True would pass for 1.
    """
    try:
        return struct.pack(f"<{len(token_ids)}{code}", *token_ids)
    except struct.error:
        return None


def sha256(obj: Any) -> bytes:
    """Return the SHA-256 digest of nested tuples, lists, ints, floats, strings, bytes, bools and None.

    The encoding is canonical: equal values give equal digests in every process and on every machine, and values of
    different structure never share an encoding. vLLM (`vllm/utils/hashing.py`) hashes a pickle; pickle is not
    used here, and need not be.
    """
    out = bytearray()
    _encode(obj, out)
    return hashlib.sha256(out).digest()


def sha256_blocks(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Return the chain of digests of consecutive blocks: each is sha256((the one before, the block's ids, None)).

    The same digests as sha256 gives, at a quarter of the cost: a long prompt has hundreds of blocks.

    Args:
        parent: stands before the first block.
        token_ids: a last part shorter than a block is left out.
    """
    num_tokens = len(token_ids) // block_size * block_size
    packed = pack_ints(token_ids[:num_tokens])
    if packed is not None:
        return sha256_packed_blocks(parent, packed, block_size)
    digests: list[bytes] = []
    for start in range(0, num_tokens, block_size):
        parent = sha256((parent, tuple(token_ids[start : start + block_size]), None))
        digests.append(parent)
    return digests


def sha256_packed_blocks(parent: bytes, packed: bytes, block_size: int) -> list[bytes]:
    """Return `sha256_blocks` of the ids that `pack_token_ids` packed: whole blocks."""
    sha256_of = hashlib.sha256
    step = 8 * block_size
    middle = struct.pack("<cQc", b"t", block_size, b"*")
    digests: list[bytes] = []
    num_bytes, head = -1, b""
    for start in range(0, len(packed), step):
        if len(parent) != num_bytes:
            num_bytes = len(parent)
            head = struct.pack("<cQcQ", b"t", 3, b"b", num_bytes)
        parent = sha256_of(head + parent + middle + packed[start : start + step] + b"N").digest()
        digests.append(parent)
    return digests


def get_hash_fn_by_name(name: str) -> Callable[[Any], bytes]:
    """Return the hash function called `name` ("sha256"); ValueError for any other."""
    check_choice("prefix_caching_hash_algo", name, ("sha256",))
    return sha256


def default_cache_dir() -> Path:
    """FOLOVLLM_CACHE, else `folovllm` in the user's cache folder of this operating system."""
    if explicit := os.environ.get("FOLOVLLM_CACHE"):
        return Path(explicit).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "folovllm"


def init_logger(name: str) -> logging.Logger:
    """Return a logger below "folovllm", whose level is FOLOVLLM_LOGGING_LEVEL (default INFO), printing to stderr."""
    root = logging.getLogger("folovllm")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(os.environ.get("FOLOVLLM_LOGGING_LEVEL", "INFO").upper())
        root.propagate = False
    return logging.getLogger(name)
