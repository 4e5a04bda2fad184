"""Checkpoints that we make, read by others and by ourselves; and what quantizing SmolLM2 costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from folovllm import LLM, SamplingParams
from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.llm_engine import LLMEngine
from folovllm.model_executor.layers.quantization.packing import dequantize
from folovllm.model_executor.model_loader.source import resolve_model_source
from folovllm.quantize import pipeline
from folovllm.quantize.perplexity import measure_perplexity
from folovllm.quantize.pipeline import Calibration, quantize_model
from folovllm.quantize.spec import QuantizationSpec
from tests import tiny_models
from tests.tiny_models import save_tiny_model

TEXT = Path(__file__).resolve().parents[1] / "data" / "persuasion.txt"
MODEL = "smollm2-135m-instruct"
SPECS = [
    QuantizationSpec(bits=bits, group_size=group_size, sym=sym, desc_act=desc_act)
    for bits, group_size, sym, desc_act in [(4, 32, True, False), (4, 64, False, True), (8, -1, True, True)]
]


def write_dequantized(quantized: Path, folder: Path) -> None:
    """Write the plain float32 model that a checkpoint means."""
    tensors, plain = load_file(quantized / "model.safetensors"), {}
    config = json.loads((quantized / "config.json").read_text())
    bits = config.pop("quantization_config")["bits"]
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last == "qweight":
            parts = (tensors[f"{prefix}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
            plain[f"{prefix}.weight"] = dequantize(*parts, bits, zero_offset=1)
        elif last not in ("qzeros", "scales", "g_idx"):
            plain[name] = tensor.float()
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def greedy(folder: Path) -> list[list[int]]:
    llm = LLM(str(folder), device="cpu", dtype="float32", skip_tokenizer_init=True, num_gpu_blocks_override=64)
    prompts: list[Any] = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (3, 17, 40)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
    llm.llm_engine.shutdown()
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture
def quantized_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a checkpoint from a tiny model."""
    monkeypatch.setitem(tiny_models._COMMON, "intermediate_size", 128)

    def make(name: str, spec: QuantizationSpec) -> Path:
        save_tiny_model(tmp_path / "tiny", name)
        args = EngineArgs(model=str(tmp_path / "tiny"), device="cpu", dtype="float32")
        quantize_model(args, tmp_path / "out", spec, Calibration(num_samples=8, seq_len=32), use_tqdm=False)
        return tmp_path / "out"

    return make


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.bits}-{s.group_size}")
@pytest.mark.parametrize("name", ["llama-tied", "llama-biases", "qwen2", "qwen3"])
def test_our_checkpoints_run_as_the_weights_they_mean(
    quantized_tiny: Any, name: str, spec: QuantizationSpec, tmp_path: Path
) -> None:
    output = quantized_tiny(name, spec)
    write_dequantized(output, tmp_path / "plain")
    assert greedy(output) == greedy(tmp_path / "plain")


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.bits}-{s.group_size}")
def test_gptqmodel_reads_the_same_weights(quantized_tiny: Any, spec: QuantizationSpec) -> None:
    """An independent reader, where it is installed: its layer, its conversion of zero points, its arithmetic."""
    torch_linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    convert = pytest.importorskip("gptqmodel.utils.model").convert_gptq_v1_to_v2_format_module
    tensors = load_file(quantized_tiny("qwen3", spec) / "model.safetensors")
    for prefix in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        parts = {part: tensors[f"{prefix}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        layer = torch_linear.TorchLinear(
            bits=spec.bits,
            group_size=spec.group_size,
            sym=spec.sym,
            desc_act=spec.desc_act,
            in_features=len(parts["g_idx"]),
            out_features=parts["qweight"].shape[1],
            bias=False,
        )
        layer.load_state_dict(parts)
        convert(layer, bits=spec.bits, pack_dtype=torch.int32)
        layer.post_init()
        theirs = layer.dequantize_weight().t().float()
        ours = dequantize(**parts, bits=spec.bits, zero_offset=1)
        torch.testing.assert_close(theirs, ours, rtol=2e-3, atol=1e-5)  # theirs is computed in float16


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_in_4_bits_predicts_nearly_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small version of tests/benchmark/gptq_quality.py; see there about these weights.

    Calibrated on the text's end, measured on its beginning.
    """
    args = EngineArgs(model=MODEL, device="cpu", use_tqdm_on_load=False)
    tokenizer = resolve_model_source(MODEL).tokenizer()
    token_ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    assert len(token_ids) >= 20_000
    calibration = torch.tensor(token_ids[-24 * 512 :]).view(24, 512)
    monkeypatch.setattr(pipeline, "_samples", lambda *_: calibration)
    measured = token_ids[:4097]

    def perplexity(model: str) -> float:
        engine = LLMEngine.from_engine_args(EngineArgs(model=model, device="cpu", use_tqdm_on_load=False))
        result = measure_perplexity(engine, measured, window=1024, stride=512, use_tqdm=False)
        engine.shutdown()
        assert result.num_scored_tokens == 4096
        return result.perplexity

    original, found = perplexity(MODEL), {}
    for name, spec in {
        "rtn": QuantizationSpec(group_size=64, sym=False, method="rtn"),
        "gptq": QuantizationSpec(group_size=64, sym=False),
        "act-order": QuantizationSpec(group_size=64, sym=False, desc_act=True),
    }.items():
        quantize_model(args, tmp_path / name, spec, use_tqdm=False)
        found[name] = perplexity(str(tmp_path / name))
    lines = [f"{name} {value:.2f} ({value / original:.3f})" for name, value in found.items()]
    print(f"\nperplexity: bfloat16 {original:.2f}, {', '.join(lines)}")
    assert resolve_model_source(str(tmp_path / "gptq")).tokenizer().encode("It's 12 o'clock.") == tokenizer.encode(
        "It's 12 o'clock."
    )
    for name in ("gptq", "act-order"):
        assert found[name] <= 1.15 * original
        assert found[name] - original <= 0.7 * (found["rtn"] - original), "clearly better than rounding to nearest"
