"""quantize_model: from a model to a GPTQ checkpoint, one decoder layer at a time.

    calibration -> token ids -> embedding -> layer 0 -> layer 1 -> ... (run_layer; each projection quantized on the way)
                                               |          |
                                               v          v
                                             writer: packed weights, then the next layer takes the place of this one

On the device are one decoder layer, the residual stream of all calibration tokens and one stage's activations; on the
host, besides, what is packed but not yet written (SHARD_BYTES at most): all other tensors wait on disk. Only a
calibration text that the model writes itself needs the whole model, before that. vLLM has no counterpart.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.config import DeviceConfig, ModelConfig
from folovllm.engine.arg_utils import EngineArgs
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.model_loader.build import default_dtype
from folovllm.model_executor.model_loader.source import ModelSource
from folovllm.model_executor.models.config import DecoderConfig
from folovllm.model_executor.models.llama import STACKED_PARAMS, LlamaDecoderLayer, LlamaModel
from folovllm.model_executor.models.registry import get_model_class
from folovllm.model_executor.models.utils import load_named_weights
from folovllm.quantize.calibration import read_text_file, samples_from_model, samples_from_text
from folovllm.quantize.checkpoint import (
    CheckpointWriter,
    TensorStore,
    check_output,
    new_folder,
    pack,
    portable_config,
    write_description,
)
from folovllm.quantize.gptq import QuantizedMatrix, quantize_matrix, relative_error, round_to_nearest
from folovllm.quantize.layer import run_layer
from folovllm.quantize.spec import QuantizationSpec, check_sizes
from folovllm.utils.common import check_range
from folovllm.worker.worker_base import resolve_device, resolve_dtype

COMPUTED_BY_MODEL = "rotary_emb.inv_freq"
"""Old checkpoints carry tensors with this in their name; nothing reads them."""


@dataclass(frozen=True)
class Calibration:
    """Where the calibration tokens come from, and how many there are."""

    file: str | None = None
    """A UTF-8 text; None: the model writes one."""
    num_samples: int = 128
    """Sequences, at most."""
    seq_len: int = 512
    """Tokens of each."""
    seed: int = 0
    """Of the text that the model writes."""

    def __post_init__(self) -> None:
        check_range("num_samples", self.num_samples, low=1)
        check_range("seq_len", self.seq_len, low=2)
        check_range("seed", self.seed, low=0, high=2**63 - 1)


@dataclass
class QuantizationReport:
    """What was done."""

    num_calibration_tokens: int = 0
    """Tokens that the Hessians are means over; 0 for rtn."""
    errors: dict[str, float] = field(default_factory=dict)
    """Projection, e.g. "model.layers.0.mlp.down_proj", fused ones as one -> relative_error of its outputs (rtn: of its
    weights)."""
    num_bytes: int = 0
    """Of all tensors in the checkpoint."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> wall seconds, in order."""


def quantize_model(
    engine_args: EngineArgs,
    output: str | Path,
    spec: QuantizationSpec,
    calibration: Calibration | None = None,
    use_tqdm: bool = True,
) -> QuantizationReport:
    """Quantize a model's projections and write a GPTQ checkpoint; embeddings, norms and LM head stay as they are.

    Args:
        engine_args: which model; `device`, `dtype` (what to compute in), `tokenizer`, `revision` and `download_dir`
            count, too.
        output: the folder to make; it may exist if it is empty.
        spec: bits, groups, method and so on.
        calibration: None: the defaults.
        use_tqdm: show progress, and the error of each layer.

    Raises:
        ValueError: the model is quantized already, does not fit the spec, or cannot be read; `output` is in use; the
            calibration text cannot be used.
    """
    output, calibration = Path(output).expanduser(), calibration or Calibration()
    check_output(output)
    source = engine_args.resolve_model_source()
    hf_config = source.hf_config()
    if hf_config.get("quantization_config") is not None:
        raise ValueError(f"model={engine_args.model!r} is quantized already: start from the original weights.")
    model_config = ModelConfig(model=engine_args.model, dtype=engine_args.dtype, hf_config=hf_config)
    model_class = get_model_class(model_config.architecture)
    sizes = DecoderConfig.from_model_config(model_config, model_class.qkv_bias)
    check_projections(spec, sizes)
    portable_config(hf_config)  # what cannot be written is refused before the work
    assert model_config.max_model_len is not None
    if spec.method != "rtn" and calibration.seq_len > model_config.max_model_len:
        raise ValueError(f"seq_len={calibration.seq_len} is above the model's limit of {model_config.max_model_len}.")
    report, started = QuantizationReport(), time.perf_counter()
    samples = None if spec.method == "rtn" else _samples(engine_args, source, calibration, use_tqdm)
    report.num_calibration_tokens = 0 if samples is None else samples.numel()
    calibrated = time.perf_counter()
    with new_folder(output) as folder:
        _Pipeline(engine_args, source, spec, model_config, sizes, folder, report).run(samples, use_tqdm)
    report.phase_seconds = {"calibration": calibrated - started, "quantization": time.perf_counter() - calibrated}
    return report


def check_projections(spec: QuantizationSpec, sizes: DecoderConfig) -> None:
    """Raise ValueError if one of the model's projections cannot be stored as `spec` wants it."""
    attention_size, kv_size = sizes.num_heads * sizes.head_size, sizes.num_kv_heads * sizes.head_size
    inputs = {
        "hidden_size (inputs of q, k, v, gate and up)": sizes.hidden_size,
        "num_attention_heads * head_dim (inputs of o_proj)": attention_size,
        "intermediate_size (inputs of down_proj)": sizes.intermediate_size,
    }
    check_sizes(spec, inputs, {"num_key_value_heads * head_dim (outputs of k and v)": kv_size})


def _samples(engine_args: EngineArgs, source: ModelSource, calibration: Calibration, use_tqdm: bool) -> torch.Tensor:
    """Return the calibration tokens [S, L] int64."""
    if calibration.file is not None:
        text = read_text_file(calibration.file, "calibration")
        return samples_from_text(text, source.tokenizer(), calibration.num_samples, calibration.seq_len)
    try:
        special_ids = source.tokenizer().all_special_ids
    except ValueError:  # a model without a tokenizer can write token ids, too
        special_ids = []
    count, length, seed = calibration.num_samples, calibration.seq_len, calibration.seed
    return samples_from_model(engine_args, count, length, seed, special_ids, use_tqdm)


class _Pipeline:
    """The state of one quantize_model: where tensors wait, the layer that is there, what has been written."""

    def __init__(
        self,
        engine_args: EngineArgs,
        source: ModelSource,
        spec: QuantizationSpec,
        model_config: ModelConfig,
        sizes: DecoderConfig,
        folder: Path,
        report: QuantizationReport,
    ) -> None:
        self._source, self._spec, self._sizes, self._folder, self._report = source, spec, sizes, folder, report
        self._model_config = model_config
        assert model_config.hf_config is not None
        self._device = resolve_device(DeviceConfig(engine_args.device))
        self._dtype, _ = resolve_dtype(engine_args.dtype, model_config.hf_config, self._device)
        stored = model_config.hf_config.get("dtype") or model_config.hf_config.get("torch_dtype")
        # What is not quantized keeps its 16-bit type, or gets one.
        self._stored_dtype = torch.float16 if stored == "float16" else torch.bfloat16
        self._writer = CheckpointWriter(folder)

    @torch.no_grad()
    def run(self, samples: torch.Tensor | None, use_tqdm: bool) -> None:
        """Quantize all layers and write everything."""
        waiting = self._folder / "waiting"
        waiting.mkdir()
        self._store = TensorStore(waiting)
        self._store.fill(self._source, self._dtype)
        model = self._one_layer_model(self._model_config.max_model_len if samples is None else samples.shape[1])
        stream = self._embed(model, samples)
        layer = model.layers[0]
        assert isinstance(layer, LlamaDecoderLayer)
        with tqdm(total=self._sizes.num_layers, desc="Quantizing", unit="layer", disable=not use_tqdm) as bar:
            for index in range(self._sizes.num_layers):
                errors = self._quantize_layer(f"model.layers.{index}.", layer, stream)
                if use_tqdm:
                    told = ", ".join(f"{name.split('.')[-1]} {error:.2e}" for name, error in errors.items())
                    bar.write(f"layer {index}: {told}", file=sys.stderr)
                bar.update(1)
        self._write_rest()
        self._writer.finish()
        self._report.num_bytes = self._writer.num_bytes
        shutil.rmtree(waiting)
        write_description(self._folder, self._source, self._spec, self._stored_dtype)

    def _one_layer_model(self, max_model_len: int | None) -> LlamaModel:
        """Return the model with a single decoder layer, into which each layer's weights are loaded in turn."""
        hf_config = dict(self._model_config.hf_config or {}) | {"num_hidden_layers": 1, "tie_word_embeddings": True}
        config = replace(self._model_config, hf_config=hf_config, max_model_len=max_model_len)
        with default_dtype(self._dtype), self._device:
            return get_model_class(config.architecture)(config, TorchNaiveBackend).model

    def _embed(self, model: LlamaModel, samples: torch.Tensor | None) -> torch.Tensor | None:
        """Write the embedding table, and return what the first layer reads, [S, L, E]."""
        name = "model.embed_tokens.weight"
        if name not in self._store.names():
            raise ValueError(f"The checkpoint has no tensor {name}. Check that every file is complete.")
        table = self._store.take(name)
        self._write(name, table)
        stream = None
        if samples is not None:
            load_named_weights(model.embed_tokens, [("weight", table)])
            stream = model.embed_tokens(samples.to(self._device))
        del model.embed_tokens  # its memory is the layers' now
        return stream

    def _quantize_layer(self, prefix: str, layer: LlamaDecoderLayer, stream: torch.Tensor | None) -> dict[str, float]:
        """Load one layer, quantize and write it; return its projections' errors."""
        tensors = {name: self._store.take(name) for name in self._store.names() if name.startswith(prefix)}
        named = [(name.removeprefix(prefix), tensor) for name, tensor in tensors.items()]
        try:
            load_named_weights(layer, named, STACKED_PARAMS, ignore=(COMPUTED_BY_MODEL,))
        except ValueError as error:
            raise ValueError(f"{prefix}*: {error}") from error
        projections = {name: m for name, m in layer.named_modules() if isinstance(m, LinearBase)}
        weights = {f"{prefix}{part}.weight" for name, m in projections.items() for part, _, _ in parts(name, m)}
        self._write_all((name, tensor) for name, tensor in tensors.items() if name not in weights)
        del tensors, named
        errors: dict[str, float] = {}

        def replace_projection(name: str, module: LinearBase, hessian: torch.Tensor | None) -> None:
            errors[name] = self._quantize_projection(prefix, name, module, hessian)

        if stream is None:
            for name, module in projections.items():
                replace_projection(name, module, None)
        else:
            run_layer(layer, stream, replace_projection)
        self._report.errors.update({f"{prefix}{name}": error for name, error in errors.items()})
        return errors

    def _quantize_projection(self, prefix: str, name: str, module: LinearBase, hessian: torch.Tensor | None) -> float:
        """Quantize one projection in place, write it under its parts' names, and return its error."""
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        try:
            if hessian is None:
                matrix = round_to_nearest(weight, self._spec)
            else:
                matrix = quantize_matrix(weight, hessian, self._spec)
        except ValueError as error:
            raise ValueError(f"{prefix}{name}: {error}") from error
        lost = relative_error(weight, matrix, hessian)
        weight.copy_(matrix.dequantize())
        for part, start, rows in parts(name, module):
            for suffix, tensor in pack(_columns(matrix, start, rows), self._spec.bits).items():
                self._writer.add(f"{prefix}{part}.{suffix}", tensor)
        return lost

    def _write_rest(self) -> None:
        """Write what belongs to no layer: the final norm, and the LM head unless it is the embedding table."""
        names = self._store.names()
        lost = [name for name in names if name.startswith("model.layers.") and COMPUTED_BY_MODEL not in name]
        if lost:
            raise ValueError(
                f"{len(lost)} tensors belong to layers beyond num_hidden_layers={self._sizes.num_layers}, such as "
                f"{lost[0]}. Check that config and weights belong together."
            )
        tied = {"lm_head.weight"} if self._sizes.tie_word_embeddings else set()
        needed = {"model.norm.weight"} | ({"lm_head.weight"} - tied)
        if missing := needed - set(names):
            raise ValueError(f"The checkpoint has no tensor {min(missing)}. Check that every file is complete.")
        kept = [name for name in names if name not in tied and COMPUTED_BY_MODEL not in name]
        self._write_all((name, self._store.take(name)) for name in kept)

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        self._writer.add(name, tensor.to(self._stored_dtype))

    def _write_all(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            if COMPUTED_BY_MODEL not in name:
                self._write(name, tensor)


def parts(name: str, module: nn.Module) -> list[tuple[str, int, int]]:
    """Return (name in the checkpoint, first row, rows) of what a projection, fused or not, is made of.

    Rows are independent given the inputs, so a fused projection is quantized as one and cut afterwards: the result,
    the order of act-order included, is that of its parts alone.
    """
    assert isinstance(module, LinearBase)
    head, _, last = name.rpartition(".")
    found = [(part, shard) for fused, part, shard in STACKED_PARAMS if fused == last]
    if not found:
        return [(name, 0, module.output_size)]
    return [(f"{head}.{part}", *module.shard_rows(shard)) for part, shard in found]


def _columns(matrix: QuantizedMatrix, start: int, count: int) -> QuantizedMatrix:
    """Return the part of a matrix for `count` output channels from `start` on."""
    cut = slice(start, start + count)
    return QuantizedMatrix(matrix.values[:, cut], matrix.scales[:, cut], matrix.zeros[:, cut], matrix.g_idx)
