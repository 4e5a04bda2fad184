"""Reading a model's tensors in the order of its layers, and writing a GPTQ checkpoint as a Hugging Face folder.

    config.json (with quantization_config), quantize_config.json, generation_config.json, tokenizer files,
    model.safetensors, or several files with an index. For every quantized projection, K inputs, N outputs, G groups:

        qweight [K * bits / 32, N] int32      qzeros [G, N * bits / 32] int32 (zero points less one)
        scales  [G, N] float16                g_idx  [K] int32

The folder appears under its name only when it is complete. No counterpart in vLLM, which reads such folders
(`layers/quantization/auto_gptq.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from folovllm.model_executor.layers.quantization.packing import pack_columns, pack_rows
from folovllm.model_executor.layers.rotary_embedding import compute_inv_freq
from folovllm.model_executor.model_loader.hf_folder import INDEX_FILE, FolderSource
from folovllm.model_executor.model_loader.hub import SMALL_FILES
from folovllm.model_executor.model_loader.source import ModelSource
from folovllm.quantize.gptq import QuantizedMatrix
from folovllm.quantize.spec import QuantizationSpec
from folovllm.version import __version__

LLAMA3_FACTORS = (8.0, 32.0)
"""`factor` in the rope_scaling of Llama 3.1 and 3.3, and of 3.2; the other parameters are the same."""
SHARD_BYTES = 1 << 30
"""Tensors are kept until they make up a file of about this size."""


def pack(matrix: QuantizedMatrix, bits: int) -> dict[str, torch.Tensor]:
    """Return the four tensors that hold `matrix` in a checkpoint, on the CPU."""
    return {
        "qweight": pack_rows(matrix.values, bits).cpu(),
        "qzeros": pack_columns(matrix.zeros - 1, bits).cpu(),
        "scales": matrix.scales.half().cpu(),
        "g_idx": matrix.g_idx.cpu().clone(),  # parts of a fused projection share it
    }


def check_output(output: Path) -> None:
    """Raise ValueError if `output` is there already and not an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={str(output)!r} is there already and not an empty folder: name another one.")


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give an empty folder next to `output` that takes its name at the end; after an error it is gone.

    Raises:
        ValueError: see check_output; or the folder cannot be made.
    """
    check_output(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    except OSError as error:
        raise ValueError(f"output={str(output)!r}: no folder can be made there ({error}).") from error
    try:
        yield temporary
        _grant_usual_access(temporary)
        os.rename(temporary, output)  # an empty folder may be replaced
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _grant_usual_access(folder: Path) -> None:
    """Give the folder and its files the rights that new ones usually get: temporary ones are made private."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)


class TensorStore:
    """A model's tensors on disk, one file each, since a source streams them in an order of its own."""

    def __init__(self, folder: Path) -> None:
        """`folder` exists and is empty."""
        self._folder = folder
        self._files: dict[str, Path] = {}

    def fill(self, source: ModelSource, dtype: torch.dtype) -> None:
        """Store every tensor of `source`; quantized GGUF ones as `dtype`."""
        for name, tensor in source.weights(dtype):
            path = self._folder / f"{len(self._files)}.safetensors"
            save_file({"tensor": tensor.contiguous()}, path)
            self._files[name] = path
            del tensor  # before the next one is read

    def names(self) -> list[str]:
        """Return the names of the tensors that have not been taken."""
        return list(self._files)

    def take(self, name: str) -> torch.Tensor:
        """Return a tensor and delete its file."""
        path = self._files.pop(name)
        tensor = load_file(path)["tensor"].clone()  # of its own: the file's memory map goes with the file
        path.unlink()
        return tensor


class CheckpointWriter:
    """Writes tensors as they come, in files of about SHARD_BYTES, and at the end what describes them."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """`folder` exists; files are made in it."""
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.num_bytes = 0
        """Of all tensors so far."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; it may be written at once or later."""
        if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self.num_bytes += tensor.nbytes

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, index: int) -> Path:
        return self._folder / f"part-{index}.safetensors"

    def finish(self) -> None:
        """Write what is pending, name the files and write their index if there are several."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self._folder / "model.safetensors")
            return
        weight_map = {}
        for index, names in enumerate(self._shards):
            file = f"model-{index + 1:05}-of-{count:05}.safetensors"
            self._part(index).rename(self._folder / file)
            weight_map.update(dict.fromkeys(names, file))
        _write_json(self._folder / INDEX_FILE, {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map})


def write_description(folder: Path, source: ModelSource, spec: QuantizationSpec, dtype: torch.dtype) -> None:
    """Write everything but the weights: configs and tokenizer."""
    quantization = spec.to_config(__version__)
    name = str(dtype).removeprefix("torch.")
    config = portable_config(source.hf_config())
    config |= {"dtype": name, "torch_dtype": name, "quantization_config": quantization}
    _write_json(folder / "config.json", config)
    _write_json(folder / "quantize_config.json", quantization)
    if generation := source.generation_config():
        _write_json(folder / "generation_config.json", generation)
    _write_tokenizer(folder, source)


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with Llama 3's scaling of rotary frequencies as Hugging Face writes it.

    GGUF files hold the divisors that come out of it instead, which no other reader of config.json would look for.

    Raises:
        ValueError: the divisors are not those of a Llama 3 model.
    """
    config = dict(config)
    factors = config.pop("rope_freq_factors", None)
    if factors is None:
        return config
    head_size, theta = 2 * len(factors), float(config["rope_theta"])
    inv_freq = compute_inv_freq(head_size, theta, None, factors)
    for factor in LLAMA3_FACTORS:
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if torch.allclose(compute_inv_freq(head_size, theta, scaling), inv_freq, rtol=1e-3):
            return config | {"rope_scaling": scaling}
    raise ValueError(
        "The GGUF file scales rotary frequencies by divisors that are not Llama 3's (rope_freqs.weight), and a "
        "checkpoint's config.json cannot hold others: start from the model's safetensors."
    )


def _write_tokenizer(folder: Path, source: ModelSource) -> None:
    """Copy the tokenizer's files, or write those of a tokenizer that was built from a GGUF file; without one, none."""
    if isinstance(source, FolderSource):
        written = {path.name for path in folder.iterdir()}
        for pattern in SMALL_FILES:
            for path in source.folder.glob(pattern):
                if path.is_file() and path.name not in written | {"config.json", "generation_config.json"}:
                    shutil.copyfile(path, folder / path.name)
        return
    try:
        tokenizer = source.tokenizer()
    except ValueError:
        return
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    # The class as all versions of transformers know it; newer ones write a name that older ones lack.
    _write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
