"""Read a GGUF file: metadata, tensor table, rows of tensors (llama.cpp's single-file model format).

    "GGUF", version, number of tensors, number of metadata entries
    metadata entries: name, type, value        tensor table: name, dimensions, type, offset
    padding to `general.alignment`             tensor data

Types, block sizes and dequantization are the `gguf` package's. Its own reader is not used: it makes a numpy
array for every string (1.8 s and 65 MB for SmolLM2's small vocabulary against 0.1 s here), maps the whole
file, and reports damage without saying where. The tests compare both on the same files. vLLM:
`transformers_utils/gguf_utils.py`.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from folovllm.utils.common import round_up

SUPPORTED_TYPES = (
    *(GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")),
    *(GGMLQuantizationType[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")),
)
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the table. `shape` is in torch's order (rows first); `offset` counts from the file's
    start."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    row_nbytes: int

    @property
    def num_rows(self) -> int:
        """Number of rows, a row being the last dimension; quantization blocks never cross rows."""
        return math.prod(self.shape[:-1])

    @property
    def num_elements(self) -> int:
        """Number of numbers."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.num_rows * self.row_nbytes


class GGUFFile:
    """The checked metadata and tensor table of one file."""

    def __init__(self, path: Path) -> None:
        """Read everything but the tensor data; ValueError names the file and the offset of what is wrong."""
        self.path = path
        self.size = path.stat().st_size
        self.metadata: dict[str, Any] = {}
        """Metadata entry -> int, float, bool, str or list of them."""
        self.tensors: dict[str, GGUFTensor] = {}
        """Tensor name -> entry, in file order."""
        if self.size == 0:
            raise _corrupt(path, 0, 0, "it is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._read(_Cursor(path, data))

    def rows(self, tensor: GGUFTensor, rows_per_chunk: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the raw bytes of consecutive rows, [at most rows_per_chunk, row_nbytes] at a time."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            for start in range(0, tensor.num_rows, rows_per_chunk):
                count = min(rows_per_chunk, tensor.num_rows - start)
                chunk = np.fromfile(file, np.uint8, count * tensor.row_nbytes)
                if chunk.size < count * tensor.row_nbytes:
                    end = tensor.offset + start * tensor.row_nbytes + chunk.size
                    raise _corrupt(self.path, self.size, end, f"the file ended inside tensor {tensor.name!r}")
                yield chunk.reshape(count, tensor.row_nbytes)

    def _read(self, cursor: _Cursor) -> None:
        magic = cursor.data[:4]
        if magic != b"GGUF":
            cursor.fail(f"it starts with {magic!r}, not with b'GGUF'")
        cursor.take(4, "the magic number")
        version = cursor.integer("<I", "the version")
        if version not in _VERSIONS:
            hint = " (a file for big-endian machines)" if version & 0xFFFF == 0 else ""
            raise ValueError(f"{self.path} is GGUF version {version}{hint}; supported: 2 and 3, little-endian.")
        num_tensors = cursor.integer("<Q", "the number of tensors")
        num_entries = cursor.integer("<Q", "the number of metadata entries")
        for _ in range(num_entries):
            key = cursor.string("a metadata name")
            if key in self.metadata:
                cursor.fail(f"metadata {key!r} is there twice")
            self.metadata[key] = cursor.value(key)
        table = [_tensor_info(cursor) for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            cursor.fail(f"general.alignment={alignment!r} is not a power of two")
        data_start = cursor.position = round_up(cursor.position, alignment)
        for name, shape, raw_type, offset in sorted(table, key=lambda info: info[3]):
            if offset % alignment or data_start + offset < cursor.position:
                cursor.fail(f"tensor {name!r} claims offset {offset} of the data, inside another tensor")
            cursor.position = data_start + offset
            self._add_tensor(cursor, name, shape, raw_type)

    def _add_tensor(self, cursor: _Cursor, name: str, shape: tuple[int, ...], raw_type: int) -> None:
        """Check the tensor whose data start at the cursor, and step over them."""
        known = raw_type in list(GGMLQuantizationType)
        if not known or GGMLQuantizationType(raw_type) not in SUPPORTED_TYPES:
            kind = GGMLQuantizationType(raw_type).name if known else f"number {raw_type}"
            raise ValueError(
                f"{self.path}: tensor {name!r} has type {kind}, which is not supported; supported: "
                f"{', '.join(t.name for t in SUPPORTED_TYPES)}. Use another quantization of the model."
            )
        type_ = GGMLQuantizationType(raw_type)
        block, block_nbytes = GGML_QUANT_SIZES[type_]
        if name in self.tensors:
            cursor.fail(f"tensor {name!r} is there twice")
        if shape[-1] % block:
            cursor.fail(f"tensor {name!r} has rows of {shape[-1]}, not a multiple of {type_.name}'s {block}")
        tensor = GGUFTensor(name, type_, shape, cursor.position, shape[-1] // block * block_nbytes)
        cursor.take(tensor.nbytes, f"tensor {name!r}")
        self.tensors[name] = tensor


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Read one entry of the tensor table: name, shape in torch's order, type number, offset in the data."""
    name = cursor.string("a tensor name")
    num_dimensions = cursor.integer("<I", f"the dimensions of {name}")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        cursor.fail(f"tensor {name!r} has {num_dimensions} dimensions")
    shape = [cursor.integer("<Q", f"the dimensions of {name}") for _ in range(num_dimensions)]
    if min(shape) < 1:
        cursor.fail(f"tensor {name!r} has dimensions {shape}")
    raw_type = cursor.integer("<I", f"the type of {name}")
    return name, tuple(reversed(shape)), raw_type, cursor.integer("<Q", f"the offset of {name}")


def _corrupt(path: Path, size: int, offset: int, problem: str) -> ValueError:
    return ValueError(
        f"Corrupt GGUF file {path} (size {size} bytes): at offset {offset}: {problem}. Fetch the file again."
    )


class _Cursor:
    """Reads typed values one after the other, and says where it was if one does not fit."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0
        self._path = path

    def fail(self, problem: str) -> NoReturn:
        """Raise the ValueError for a problem at the current offset."""
        raise _corrupt(self._path, len(self.data), self.position, problem)

    def take(self, count: int, what: str) -> int:
        """Return the current offset and step over `count` bytes."""
        start = self.position
        if count > len(self.data) - start:
            self.fail(f"{what} needs {count} bytes, the file has {len(self.data) - start} left")
        self.position = start + count
        return start

    def integer(self, code: str, what: str) -> int:
        """Read one integer of struct format `code`."""
        return int(struct.unpack_from(code, self.data, self.take(struct.calcsize(code), what))[0])

    def string(self, what: str) -> str:
        """Read a length and that many bytes of UTF-8."""
        start = self.position
        length = self.integer("<Q", f"the length of {what}")
        begin = self.take(length, what)
        try:
            return self.data[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError:
            self.position = start
            self.fail(f"{what} is not UTF-8")

    def value(self, key: str) -> Any:
        """Read one typed metadata value."""
        kind = self._kind(key)
        if kind == GGUFValueType.STRING:
            return self.string(key)
        if kind != GGUFValueType.ARRAY:
            value = self._scalars(kind, 1, key)[0]
            # The decimal number that was meant: 1e-05, not 9.999999747378752e-06.
            return float(str(np.float32(value))) if kind == GGUFValueType.FLOAT32 else value
        kind = self._kind(key)
        count = self.integer("<Q", f"the length of {key}")
        if kind == GGUFValueType.STRING:
            return [self.string(key) for _ in range(count)]
        if kind == GGUFValueType.ARRAY:
            self.fail(f"{key} is an array of arrays, which no supported model has")
        return self._scalars(kind, count, key)

    def _kind(self, key: str) -> GGUFValueType:
        start = self.position
        raw = self.integer("<I", f"the type of {key}")
        try:
            return GGUFValueType(raw)
        except ValueError:
            self.position = start
            self.fail(f"{key} has the unknown value type {raw}")

    def _scalars(self, kind: GGUFValueType, count: int, key: str) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        nbytes = count * dtype.itemsize
        start = self.take(nbytes, key)
        # Copied out, so that nothing points into the map when it is closed.
        values: list[Any] = np.frombuffer(self.data[start : start + nbytes], dtype).tolist()
        return values
