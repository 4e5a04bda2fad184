"""The CPU kernels of csrc/cpu_kernels.c: compiled once for this machine's processor, then called on torch tensors.

The first process that needs them runs the C compiler ($CC, cc, gcc or clang; about two seconds) and keeps the library
in the user's cache folder, under a name that is a hash of all that went into it; later ones find it there. Without a
compiler, on Windows, or with the environment variable FOLOVLLM_CPU_KERNELS=0, `available` says no and why, and callers
keep to torch's operators.

The library starts no threads: it is handed the OpenMP entry points of the library that torch itself is linked to, and
so runs on torch's own pool, on torch.get_num_threads() threads.

vLLM compiles its kernels (`csrc/cpu/`) when it is installed.

Legend: T tokens in the step, E hidden size, H heads, Hkv KV heads, D head size, Nb blocks, Bs block size.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from folovllm.utils.common import default_cache_dir

SOURCES = tuple(
    Path(__file__).parent.parent / "csrc" / f"cpu_{name}"
    for name in (
        "kernels.c",
        "kernels_typed.h",
        "linear_bf16.h",
        "int4_bf16.h",
        "gemm_bf16.h",
        "prefill_bf16.h",
        "decoder_bf16.h",
    )
)
"""The first is compiled; it includes the others."""
COMPILERS = ("cc", "gcc", "clang")
"""Tried in this order where the environment names none in CC."""
FLAGS: tuple[str, ...] = (
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-ffp-contract=fast",
)
"""No -ffast-math: infinities and NaNs must stay what they are. Sums are reordered where the source says so."""
FLAGS += ("-fno-math-errno", "-fno-trapping-math")
X86_FLAGS = ("-march=native", "-mprefer-vector-width=512")
OTHER_FLAGS = ("-mcpu=native",)
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
"""The dtypes that have kernels."""

SWITCHED_OFF = "switched off by FOLOVLLM_CPU_KERNELS=0"
AVX512_BF16, AMX_BF16 = 1, 2
"""Bits of `features`: which bfloat16 instructions the library was compiled with and may use."""

Function = Callable[..., None]
_linear: dict[torch.dtype, Function] = {}
_rms_norm: dict[torch.dtype, Function] = {}
_silu_and_mul: dict[torch.dtype, Function] = {}
_rope_write_kv: dict[torch.dtype, Function] = {}
_paged_decode: dict[torch.dtype, Function] = {}
_paged_prefill: Function | None = None
_decoder: Function | None = None
_linear_int4: Function | None = None
_features = 0

PTR, I64, INT, F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[dict[torch.dtype, Function], list[type]]] = {
    "folo_linear": (_linear, [PTR] * 5 + [I64] * 4 + [INT] * 3),
    "folo_rms_norm": (_rms_norm, [PTR] * 4 + [I64] * 3 + [F32, INT]),
    "folo_silu_and_mul": (_silu_and_mul, [PTR] * 2 + [I64] * 2 + [INT]),
    "folo_rope_write_kv": (_rope_write_kv, [PTR] * 7 + [I64] * 8 + [F32, INT, INT]),
    "folo_paged_decode": (_paged_decode, [PTR] * 7 + [I64] * 9 + [F32, INT]),
}


class CompilationFailed(Exception):
    """The message says what was run and what the compiler answered."""


@functools.cache
def available() -> tuple[bool, str]:
    """Compile or find the library and load it, once per process; return whether it can be used, and why (not).

    Raises:
        ValueError: the environment variable FOLOVLLM_CPU_KERNELS is neither 0 nor 1.
    """
    switch = os.environ.get("FOLOVLLM_CPU_KERNELS", "1")
    if switch not in ("0", "1"):
        raise ValueError(f"FOLOVLLM_CPU_KERNELS={switch!r} must be 0 (torch's operators) or 1 (the kernels); unset it.")
    if switch == "0":
        return False, SWITCHED_OFF
    if os.name != "posix":
        return False, f"not on {platform.system()}"
    entry_points = _openmp_entry_points()
    if entry_points is None:
        return False, "torch's OpenMP library is not one that can be shared"
    try:
        path, how = _build()
        _load(path, entry_points)
    except (OSError, AttributeError, CompilationFailed) as error:
        return False, str(error)
    return True, how


def features() -> int:
    """Return the bits AVX512_BF16 and AMX_BF16 of the loaded library; 0: plain C, vectorised by the compiler."""
    return _features


def usable(tensor: torch.Tensor) -> bool:
    """Whether the kernels take tensors like this one: on the CPU, in a dtype of SUFFIXES, and available."""
    return tensor.device.type == "cpu" and tensor.dtype in SUFFIXES and available()[0]


def multiplies(weight: torch.Tensor) -> bool:
    """Return whether `linear` with `weight` [N, K] beats torch's product, at any number of rows.

    Only its AMX code does: 1.3 to 2 times. Plain float32 code is 1.0 to 1.5 times slower than torch; AVX-512 alone is
    faster than torch up to 4 rows only.
    """
    amx = usable(weight) and weight.dtype == torch.bfloat16 and _features & AMX_BF16
    return bool(amx) and weight.shape[1] % 32 == 0 and weight.shape[0] >= 16


# Compiling and loading.


def _find_compiler() -> list[str]:
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    raise CompilationFailed(f"no C compiler: none of {', '.join(named[:1] or COMPILERS)} is on the PATH")


def _build() -> tuple[Path, str]:
    """Return the library's path, compiling it unless the cache has it, and which of the two in words."""
    compiler = _find_compiler()
    native = X86_FLAGS if platform.machine() in ("x86_64", "AMD64", "i686") else OTHER_FLAGS
    command = [*compiler, *FLAGS, *native, str(SOURCES[0]), "-lm"]
    version = _run([*compiler, "--version"])
    key = hashlib.sha256("\0".join([*command, version, _processor()]).encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    folder = default_cache_dir() / "kernels"
    path = folder / f"cpu_kernels-{key.hexdigest()[:24]}.so"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _is_ours(folder):  # before anything in it is trusted: whoever owns a folder may swap what it holds
        raise OSError(f"{folder} belongs to, or may be written by, others; set FOLOVLLM_CACHE to a folder of your own")
    if path.exists() and _is_ours(path):
        return path, f"compiled before, {path}"
    # Several processes may do this at once: each compiles in a folder of its own, the rename is atomic.
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as temporary:
        built = Path(temporary) / path.name
        _run([*command, "-o", str(built)])
        os.replace(built, path)
    return path, f"compiled by {version.splitlines()[0] if version else compiler[0]}"


def _is_ours(path: Path) -> bool:
    """Whether nobody but this user can have written to a file or folder, which is no link."""
    status = path.lstat()
    others_may_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return not stat.S_ISLNK(status.st_mode) and status.st_uid == os.getuid() and not others_may_write


def _run(command: list[str]) -> str:
    """Return what `command` printed. Raises CompilationFailed."""
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
            timeout=120,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilationFailed(f"`{shlex.join(command)}` failed: {error}") from error
    if result.returncode != 0:
        raise CompilationFailed(f"`{shlex.join(command)}` failed: {result.stderr.strip()[:2000]}")
    return result.stdout


def _processor() -> str:
    """Return what -march=native depends on: the processor's model and the instructions it has."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = {line.split(":")[0].strip(): line.strip() for line in file}
        return "\n".join(lines.get(name, "") for name in ("model name", "flags", "Features", "CPU part"))
    except OSError:
        return " ".join(platform.uname())


def _openmp_entry_points() -> list[ctypes.c_void_p] | None:
    """Return GOMP_parallel, omp_get_thread_num, omp_get_num_threads as libtorch_cpu itself would find them."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        return [ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in names]
    except (OSError, AttributeError):
        return None


def _load(path: Path, entry_points: list[ctypes.c_void_p]) -> None:
    global _features, _paged_prefill, _decoder, _linear_int4
    library = ctypes.CDLL(str(path))
    library.folo_init.argtypes = [PTR, PTR, PTR]
    _features = library.folo_init(*entry_points)
    for name, (functions, argtypes) in _SIGNATURES.items():
        for dtype, suffix in SUFFIXES.items():
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = argtypes, None
            functions[dtype] = function
    if _features & AMX_BF16:
        _paged_prefill = library.folo_paged_prefill_bf16
        _paged_prefill.argtypes, _paged_prefill.restype = [PTR] * 5 + [I64] * 9 + [F32, INT], None
        _decoder = library.folo_decoder_bf16
        _decoder.argtypes, _decoder.restype = [PTR], None
        _linear_int4 = library.folo_linear_int4_bf16
        _linear_int4.argtypes, _linear_int4.restype = [PTR] * 7 + [I64] * 5 + [INT] * 2, None


def _has_whole_blocks(kv_cache: torch.Tensor) -> bool:
    """Whether the inside of a block, [Bs, Hkv, D], is contiguous."""
    _, _, _, num_kv_heads, head_size = kv_cache.shape
    return kv_cache.stride()[2:] == (num_kv_heads * head_size, head_size, 1)


# The kernels. Call them only if available()[0]; tensors are on the CPU, of one dtype in SUFFIXES.


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    float_output: bool = False,
) -> torch.Tensor:
    """Return x @ weight^T + bias [M, N], summed in float32 and rounded once.

    Args:
        x: [M, K], rows contiguous.
        weight: [N, K], contiguous.
        bias: [N] or None.
        residual: [M, N] contiguous or None: the rounded product is added to it in place, and it is what is returned.
        float_output: return the product as float32, not rounded (logits: bfloat16 makes ties of what is not equal).
    """
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0]
    assert x.stride(1) == 1 and weight.is_contiguous() and weight.shape[1] == num_inputs and weight.dtype == x.dtype
    if residual is None:
        out = x.new_empty((num_rows, num_outputs), dtype=torch.float32 if float_output else None)
    else:
        out = residual
        assert residual.is_contiguous() and residual.shape == (num_rows, num_outputs) and not float_output
    _linear[x.dtype](
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        out.data_ptr(),
        num_rows,
        num_inputs,
        num_outputs,
        x.stride(0),
        0,
        float_output,
        torch.get_num_threads(),
    )
    return out


def linear_silu_and_mul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return silu_and_mul(linear(x, weight, bias)) [M, N], equally rounded, for x [M, K] and weight [2 N, K]."""
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0] // 2
    assert x.stride(1) == 1 and weight.is_contiguous() and weight.shape[1] == num_inputs and weight.dtype == x.dtype
    out = x.new_empty((num_rows, num_outputs))
    _linear[x.dtype](
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None,
        out.data_ptr(),
        num_rows,
        num_inputs,
        num_outputs,
        x.stride(0),
        1,
        False,
        torch.get_num_threads(),
    )
    return out


@dataclass
class CPUWeight:
    """A linear layer's weight as the AMX kernels take it, see linear and linear_int4."""

    weight: torch.Tensor
    """[N, K] bfloat16, or [N, K / 2] uint8 of pack_int4."""
    bias: torch.Tensor | None = None
    """[N]."""
    scales: torch.Tensor | None = None
    """[N, G] bfloat16 for a weight of 4 bits."""
    zeros: torch.Tensor | None = None
    """[N, G] uint8 likewise."""

    @property
    def num_inputs(self) -> int:
        """K."""
        return self.weight.shape[1] * (1 if self.scales is None else 2)


def multiplies_int4(dtype: torch.dtype, num_inputs: int, num_outputs: int, group_size: int) -> bool:
    """Whether `linear_int4` takes such weights on this machine: bfloat16 on AMX, groups of a multiple of 32 inputs."""
    amx = dtype == torch.bfloat16 and available()[0] and bool(_features & AMX_BF16)
    return amx and num_outputs >= 16 and group_size % 32 == 0 and num_inputs % group_size == 0


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Return integers [N, K] uint8 below 16, K a multiple of 32, as linear_int4 wants them: [N, K / 2] uint8."""
    low, high = values.view(values.shape[0], -1, 2, 16).unbind(2)
    return (low | (high << 4)).reshape(values.shape[0], -1)


def linear_int4(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu_and_mul: bool = False,
) -> torch.Tensor:
    """Return x @ weight^T + bias for a weight [N, K] = (integers - zeros) * scales, rounded to bfloat16.

    Args:
        x: [M, K] bfloat16, rows contiguous.
        packed: [N, K / 2] uint8, of pack_int4.
        scales: [N, G] bfloat16, one for each K / G inputs.
        zeros: [N, G] uint8, the integers that mean 0.
        bias: [N] bfloat16 or None.
        residual: as in `linear`; not together with silu_and_mul.
        silu_and_mul: return silu(first half of the outputs) * second half, [M, N / 2].
    """
    num_rows, num_inputs = x.shape
    num_outputs = packed.shape[0] // 2 if silu_and_mul else packed.shape[0]
    assert _linear_int4 is not None and x.dtype == scales.dtype == torch.bfloat16 and x.stride(1) == 1
    assert packed.is_contiguous() and scales.is_contiguous() and zeros.is_contiguous() and zeros.dtype == torch.uint8
    assert packed.shape[1] * 2 == num_inputs and zeros.shape == scales.shape
    assert residual is None or (residual.is_contiguous() and residual.shape == (num_rows, num_outputs))
    out = x.new_empty((num_rows, num_outputs)) if residual is None else residual
    _linear_int4(
        x.data_ptr(),
        packed.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        out.data_ptr(),
        num_rows,
        num_inputs,
        num_outputs,
        num_inputs // scales.shape[1],
        x.stride(0),
        silu_and_mul,
        torch.get_num_threads(),
    )
    return out


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight [T, E], statistics in float32, rounded once.

    Args:
        x: [T, E], rows contiguous.
        weight: [E].
        eps: added to the mean square.
        residual: [T, E] contiguous or None. It is overwritten with residual + x, rounded, and that is normalised.
        out: [T, E] contiguous, where the result goes, or None for a new tensor; it may be x.
    """
    num_tokens, size = x.shape
    assert x.stride(1) == 1 and weight.numel() == size and weight.dtype == x.dtype
    assert residual is None or (residual.is_contiguous() and residual.shape == x.shape)
    if out is None:
        out = x.new_empty((num_tokens, size))
    _rms_norm[x.dtype](
        x.data_ptr(),
        weight.data_ptr(),
        None if residual is None else residual.data_ptr(),
        out.data_ptr(),
        num_tokens,
        size,
        x.stride(0),
        eps,
        torch.get_num_threads(),
    )
    return out


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up [T, N] for contiguous gate_up [T, 2 N] = gate | up; silu is rounded to the dtype first."""
    num_tokens, size = gate_up.shape
    assert gate_up.is_contiguous() and size % 2 == 0
    out = gate_up.new_empty((num_tokens, size // 2))
    _silu_and_mul[gate_up.dtype](gate_up.data_ptr(), out.data_ptr(), num_tokens, size // 2, torch.get_num_threads())
    return out


def qk_norm_rope_write_kv(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    keep_keys: bool = True,
) -> torch.Tensor:
    """Do all that lies between the QKV projection and attention; return the queries [T, H, D], a view of `qkv`.

    Args:
        qkv: [T, (H + 2 Hkv) D] contiguous: queries, keys, values. The queries are overwritten with the result.
        positions: [T] int64, rows of the table.
        cos_sin_cache: [2, max_position, D], RotaryEmbedding's table.
        q_weight: [D], the norm's weight for each query head, or None: no QK-norm (then `k_weight` is None too).
        k_weight: [D], likewise for key heads.
        eps: of the QK-norm.
        kv_cache: [2, Nb, Bs, Hkv, D] of qkv's dtype, each block contiguous; changed at the slots.
        slot_mapping: [T] int64, block id * Bs + offset; negative: the token's key and value are dropped.
        num_heads: H.
        num_kv_heads: Hkv.
        keep_keys: False: the keys in `qkv` are overwritten as the queries are, for an attention that wants them there.
    """
    _, _, block_size, _, head_size = kv_cache.shape
    num_tokens = qkv.shape[0]
    assert qkv.is_contiguous() and qkv.shape[1] == (num_heads + 2 * num_kv_heads) * head_size
    assert _has_whole_blocks(kv_cache) and kv_cache.dtype == qkv.dtype and kv_cache.shape[3] == num_kv_heads
    assert cos_sin_cache.is_contiguous() and cos_sin_cache.dtype == qkv.dtype
    assert positions.dtype == slot_mapping.dtype == torch.int64
    assert positions.is_contiguous() and slot_mapping.is_contiguous()
    _rope_write_kv[qkv.dtype](
        qkv.data_ptr(),
        positions.data_ptr(),
        cos_sin_cache.data_ptr(),
        None if q_weight is None else q_weight.data_ptr(),
        None if k_weight is None else k_weight.data_ptr(),
        kv_cache.data_ptr(),
        slot_mapping.data_ptr(),
        num_tokens,
        num_heads,
        num_kv_heads,
        head_size,
        block_size,
        kv_cache.stride(1),
        kv_cache.stride(0),
        cos_sin_cache.shape[1],
        eps,
        keep_keys,
        torch.get_num_threads(),
    )
    return qkv.as_strided((num_tokens, num_heads, head_size), (qkv.shape[1], head_size, 1))


def paged_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    rows: torch.Tensor | None = None,
    reqs: torch.Tensor | None = None,
) -> None:
    """Attention of requests that compute one token, straight from the pages; scores and sums in float32.

    Args:
        query: [T, H, D], heads of a token contiguous.
        kv_cache: [2, Nb, Bs, Hkv, D], each block contiguous.
        block_table: [B, max blocks] int32, rows contiguous.
        seq_lens: [B] int32, at least 1 each, the new token included.
        out: [T, H, D] contiguous; only the requests' rows are written.
        scale: multiplies the scores.
        rows: [n] int32, each request's row of query and out; None: request b is row b, for all rows of block_table.
        reqs: [n] int32, each request's row of block_table and seq_lens; None likewise.
    """
    _, _, block_size, num_kv_heads, head_size = kv_cache.shape
    num_heads = query.shape[1]
    assert query.stride(2) == 1 and query.stride(1) == head_size == query.shape[2] and out.is_contiguous()
    assert query.dtype == kv_cache.dtype == out.dtype and _has_whole_blocks(kv_cache) and num_heads % num_kv_heads == 0
    assert block_table.dtype == seq_lens.dtype == torch.int32 and block_table.stride(1) == 1
    assert seq_lens.is_contiguous() and (rows is None) == (reqs is None)
    assert rows is None or reqs is None or rows.dtype == reqs.dtype == torch.int32
    _paged_decode[query.dtype](
        query.data_ptr(),
        kv_cache.data_ptr(),
        block_table.data_ptr(),
        seq_lens.data_ptr(),
        None if rows is None else rows.data_ptr(),
        None if reqs is None else reqs.data_ptr(),
        out.data_ptr(),
        block_table.shape[0] if reqs is None else reqs.shape[0],
        num_heads,
        num_kv_heads,
        head_size,
        block_size,
        kv_cache.stride(1),
        kv_cache.stride(0),
        query.stride(0),
        block_table.stride(0),
        scale,
        torch.get_num_threads(),
    )


def prefill_usable(dtype: torch.dtype, head_size: int) -> bool:
    """Whether `paged_prefill` takes this dtype and head size on this machine: bfloat16 on AMX, multiples of 32."""
    return dtype == torch.bfloat16 and head_size % 32 == 0 and available()[0] and _paged_prefill is not None


def paged_prefill(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    chunks: torch.Tensor,
    out: torch.Tensor,
    scale: float,
) -> None:
    """Causal attention of requests that compute several tokens, from the pages; only where `prefill_usable`.

    Args:
        query: [T, H, D] bfloat16, heads of a token contiguous.
        kv_cache: [2, Nb, Bs, Hkv, D], each block contiguous; the new tokens' keys and values are in it already.
        block_table: [B, max blocks] int32, rows contiguous.
        chunks: [n, 4] int32, contiguous: a request's row of block_table, the first and one past the last of its rows
            of query and out (at least one), and its context length, these rows included.
        out: [T, H, D] contiguous; only the chunks' rows are written.
        scale: multiplies the scores; above 0.
    """
    _, _, block_size, num_kv_heads, head_size = kv_cache.shape
    num_heads = query.shape[1]
    assert _paged_prefill is not None and query.dtype == kv_cache.dtype == out.dtype == torch.bfloat16
    assert query.stride(2) == 1 and query.stride(1) == head_size == query.shape[2] and head_size % 32 == 0
    assert out.is_contiguous() and _has_whole_blocks(kv_cache) and num_heads % num_kv_heads == 0 and scale > 0
    assert block_table.dtype == chunks.dtype == torch.int32 and block_table.stride(1) == 1 and chunks.is_contiguous()
    _paged_prefill(
        query.data_ptr(),
        kv_cache.data_ptr(),
        block_table.data_ptr(),
        chunks.data_ptr(),
        out.data_ptr(),
        chunks.shape[0],
        num_heads,
        num_kv_heads,
        head_size,
        block_size,
        kv_cache.stride(1),
        kv_cache.stride(0),
        query.stride(0),
        block_table.stride(0),
        scale,
        torch.get_num_threads(),
    )


def decoder(arguments: int) -> None:
    """Run all layers of a model; `arguments` is the address of a decoder_t (models/cpu_decoder.py fills it in)."""
    assert _decoder is not None
    _decoder(arguments)
