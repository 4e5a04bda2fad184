"""Read a .safetensors file: a JSON header that says where each tensor lies, then the bytes.

    [8 bytes: N, little-endian] [N bytes: {"name": {"dtype", "shape", "data_offsets": [begin, end]}}] [data]

Why not `safetensors.safe_open`: it says neither which file nor where in it the damage is, and it maps the
file, so that pages count as this process's memory and a file cut short while being read kills the process
with SIGBUS. The tests compare every dtype with the library's own reader and writer. vLLM:
`model_loader/weight_utils.py::safetensors_weights_iterator`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

if TYPE_CHECKING:
    import torch

_MAX_HEADER_BYTES = 100_000_000  # the limit that the format sets

# Name in the file -> (torch dtype's name, bytes per element).
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: `offset` counts from the start of the file, `nbytes` is what it occupies
    there."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """The checked header of one file, and its tensors on demand."""

    def __init__(self, path: Path) -> None:
        """Read and check the header; ValueError names the file and the offset of what is wrong."""
        self.path = path
        self.size = path.stat().st_size
        with path.open("rb") as file:
            self.entries = self._check(*self._read_header(file))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, CPU tensor) in file order; nothing is kept. ValueError if the file ends early."""
        with self.path.open("rb", buffering=0) as file:
            for entry in self.entries:
                yield entry.name, self._read(file, entry)

    def _fail(self, offset: int, problem: str) -> NoReturn:
        raise ValueError(
            f"Corrupt safetensors file {self.path} (size {self.size} bytes): at offset {offset}: {problem}. "
            "Fetch the file again."
        )

    def _read_header(self, file: BinaryIO) -> tuple[dict[str, Any], int]:
        """Return the header as a dict, and the offset at which the data starts."""
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8:
            self._fail(0, f"the header's length needs 8 bytes, the file has {len(prefix)}")
        if length > min(_MAX_HEADER_BYTES, self.size - 8):
            self._fail(0, f"the header claims {length} bytes, more than the file or the format allows")
        try:
            header = json.loads(file.read(length).decode("utf-8"))
        except UnicodeDecodeError as error:
            self._fail(8 + error.start, "the header is not UTF-8")
        except json.JSONDecodeError as error:
            self._fail(8 + len(error.doc[: error.pos].encode()), f"the header is not JSON ({error.msg})")
        if not isinstance(header, dict):
            self._fail(8, "the header is not a JSON object")
        return header, 8 + length

    def _check(self, header: dict[str, Any], data_start: int) -> list[TensorEntry]:
        """Return the entries in file order, after checking that they fill the data part without gap or
        overlap."""
        header.pop("__metadata__", None)
        entries = sorted(
            (self._entry(name, info, data_start) for name, info in header.items()),
            key=lambda entry: (entry.offset, entry.nbytes),
        )
        position = data_start
        for entry in entries:
            if entry.offset != position:
                self._fail(entry.offset, f"tensor {entry.name!r} should start at {position}")
            position += entry.nbytes
            if position > self.size:
                self._fail(entry.offset, f"tensor {entry.name!r} needs {entry.nbytes} bytes; the file is truncated")
        if position != self.size:
            self._fail(position, f"{self.size - position} bytes belong to no tensor")
        return entries

    def _entry(self, name: str, info: Any, data_start: int) -> TensorEntry:
        try:
            dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
        except (TypeError, KeyError, ValueError):
            self._fail(8, f"the header's entry for tensor {name!r} is incomplete: {info!r}")
        if dtype not in _DTYPES:
            self._fail(8, f"tensor {name!r} has dtype {dtype!r}; supported: {', '.join(_DTYPES)}")
        numbers = [begin, end, *shape] if isinstance(shape, list) else [None]
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
            self._fail(8, f"tensor {name!r} has shape {shape!r} and offsets {begin!r}, {end!r}")
        nbytes = math.prod(shape) * _DTYPES[dtype][1]
        if end - begin != nbytes:
            self._fail(
                data_start + begin,
                f"tensor {name!r} of shape {shape} needs {nbytes} bytes, not {end - begin}",
            )
        return TensorEntry(name, dtype, tuple(shape), data_start + begin, nbytes)

    def _read(self, file: FileIO, entry: TensorEntry) -> torch.Tensor:
        """Read one tensor into memory of its own, which is aligned whatever the file's header length."""
        import torch

        dtype: torch.dtype = getattr(torch, _DTYPES[entry.dtype][0])
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        view = buffer.numpy().data
        file.seek(entry.offset)
        filled = 0
        while filled < entry.nbytes:
            count = file.readinto(view[filled:])
            if not count:
                self._fail(entry.offset + filled, f"the file ended inside tensor {entry.name!r}")
            filled += count
        return buffer.view(dtype).view(entry.shape)
