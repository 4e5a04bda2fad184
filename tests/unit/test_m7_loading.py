"""Loading GPTQ checkpoints: where the settings are found, what is refused, and that the message names it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.config import ModelConfig
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.layers.quantization import get_quantization_config
from folovllm.model_executor.layers.quantization.gptq import FUSED_PARTS, GPTQConfig, GPTQLinearMethod
from folovllm.model_executor.model_loader.build import get_model
from folovllm.model_executor.model_loader.hub import SMALL_FILES
from folovllm.model_executor.model_loader.source import resolve_model_source
from folovllm.model_executor.models.llama import STACKED_PARAMS, LlamaForCausalLM
from tests.gptq_checkpoints import Settings, edit_json, edit_tensors, save_checkpoints

LAYER = "model.layers.1.self_attn.k_proj"
GOOD = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A quantized tiny Llama, 4 bits in groups of 32."""
    save_checkpoints(tmp_path, "llama", Settings())
    return tmp_path / "quantized"


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> LlamaForCausalLM:
    source = resolve_model_source(str(path), load_format=options.get("load_format", "auto"))
    config = ModelConfig(model=str(path), hf_config=source.hf_config(), **options)
    quant_config = get_quantization_config(source.hf_config())
    return get_model(config, source, TorchNaiveBackend, quant_config, dtype, torch.device("cpu"), use_tqdm=False)


def methods(model: LlamaForCausalLM) -> list[object]:
    return [type(module.quant_method) for module in model.modules() if isinstance(module, LinearBase)]


def weights_of(model: LlamaForCausalLM, module: str) -> torch.Tensor:
    """The weight [N, K] that a module multiplies with, asked with unit vectors."""
    layer = model.get_submodule(module)
    assert isinstance(layer, LinearBase)
    saved, layer.bias = layer.bias, None
    out: torch.Tensor = layer(torch.eye(layer.input_size)).t()
    layer.bias = saved
    return out


# The settings.


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_settings(bits: int, group_size: int) -> None:
    config = get_quantization_config({"quantization_config": GOOD | {"bits": bits, "group_size": group_size}})
    assert config == GPTQConfig(bits, group_size)
    assert config.zero_offset == 1


@pytest.mark.parametrize(
    ("changes", "offset"),
    [
        ({"checkpoint_format": "gptq"}, 1),
        ({"checkpoint_format": "gptq_v2"}, 0),
        ({"format": "gptq_v2"}, 0),
        ({"checkpoint_format": None}, 1),
        ({"dynamic": {}, "lm_head": False, "pack_dtype": "int32", "damp_percent": 0.1}, 1),
    ],
)
def test_formats(changes: dict[str, Any], offset: int) -> None:
    config = get_quantization_config({"quantization_config": GOOD | changes})
    assert isinstance(config, GPTQConfig) and config.zero_offset == offset


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 2}, "bits=2 is not supported; supported: 4, 8"),
        ({"bits": 3}, "bits=3 is not supported"),
        ({"bits": True}, "bits=True is not"),
        ({"bits": "4"}, "bits='4' is not"),
        ({"bits": None}, "bits=None"),
        ({"group_size": 100}, "group_size=100 is not supported; supported: -1, 32, 64, 128"),
        ({"group_size": 0}, "group_size=0 is not"),
        ({"group_size": None}, "group_size=None is not"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({"is_marlin_format": True}, "is_marlin_format=True"),
        ({"dynamic": {"-:.*down.*": {}}}, "dynamic={'-:.*down.*': {}}"),
        ({"lm_head": True}, "lm_head=True: a quantized LM head"),
        ({"adapter": {"rank": 8}}, "adapter="),
        ({"rotation": "hadamard"}, "rotation='hadamard'"),
        ({"pack_dtype": "int16"}, "pack_dtype='int16'"),
        ({"modules_in_block_to_quantize": []}, "modules_in_block_to_quantize=[]"),
        ({"modules_in_block_to_quantize": [[1]]}, "modules_in_block_to_quantize=[[1]]"),
        ({"quant_method": "awq"}, "quant_method='awq' cannot be run"),
        ({"quant_method": None}, "quant_method=None cannot be run"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        get_quantization_config({"quantization_config": GOOD | changes})


def test_fused_parts_are_the_models() -> None:
    """The list in gptq.py says what STACKED_PARAMS of the models says."""
    stacked: dict[str, tuple[str, ...]] = {}
    for fused, part, _ in STACKED_PARAMS:
        stacked[fused] = (*stacked.get(fused, ()), part)
    assert stacked == FUSED_PARTS


def test_half_of_a_fused_layer_is_refused() -> None:
    config = GPTQConfig.from_config(GOOD | {"modules_in_block_to_quantize": ["self_attn.q_proj", "self_attn.v_proj"]})
    with pytest.raises(
        ValueError, match=r"has a\.self_attn\.q_proj, a\.self_attn\.v_proj but not a\.self_attn\.k_proj"
    ):
        config.get_quant_method(torch.nn.Module(), "a.self_attn.qkv_proj")


def test_quantize_config_json(folder: Path) -> None:
    """Older checkpoints keep the settings in a file of their own; config.json's win where both are there."""
    edit_json(folder / "config.json", quantization_config=None)
    edit_json(folder / "quantize_config.json", bits=4, group_size=32, desc_act=False, sym=True)
    assert set(methods(load(folder))) == {GPTQLinearMethod}
    edit_json(folder / "config.json", quantization_config=GOOD | {"group_size": 64})
    hf_config = resolve_model_source(str(folder)).hf_config()
    assert hf_config["quantization_config"]["group_size"] == 64
    assert "quantize_config.json" in SMALL_FILES  # a hub download has it


@pytest.mark.parametrize("quantization", [None, "auto", "gptq"])
def test_named_method_that_fits(folder: Path, quantization: str | None) -> None:
    assert set(methods(load(folder, quantization=quantization))) == {GPTQLinearMethod}


def test_named_method_that_does_not_fit(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"quantization='gptq': .* is not quantized"):
        load(folder.parent / "plain", quantization="gptq")
    edit_json(folder / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(ValueError, match="is quantized with quant_method='awq'"):
        load(folder, quantization="gptq")
    with pytest.raises(ValueError, match="quantization='awq' is not supported"):
        load(folder, quantization="awq")


# The tensors.


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, -1), (8, 128)])
def test_every_weight_is_what_the_checkpoint_means(
    tmp_path: Path, desc_act: bool, sym: bool, checkpoint_format: str, bits: int, group_size: int
) -> None:
    save_checkpoints(tmp_path, "llama", Settings(bits, group_size, sym, desc_act, checkpoint_format))
    plain, quantized = load(tmp_path / "plain"), load(tmp_path / "quantized")
    for name, module in plain.named_modules():
        if isinstance(module, LinearBase):
            torch.testing.assert_close(weights_of(quantized, name), module.weight, rtol=0, atol=1e-6)


def test_scales_in_bfloat16_and_float32(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        save_checkpoints(tmp_path / str(dtype), "llama", Settings(scale_dtype=dtype))
        plain, quantized = load(tmp_path / str(dtype) / "plain"), load(tmp_path / str(dtype) / "quantized")
        name = "model.layers.0.mlp.down_proj"
        expected = plain.get_submodule(name).weight
        torch.testing.assert_close(weights_of(quantized, name), expected, rtol=0, atol=1e-6)


def test_modules_left_plain(folder: Path) -> None:
    """A checkpoint whose attention is quantized and whose MLPs are not."""
    plain = load_file(folder.parent / "plain" / "model.safetensors")
    for i in range(2):
        for part in ("gate_proj", "up_proj", "down_proj"):
            module = f"model.layers.{i}.mlp.{part}"
            gone = {f"{module}.{key}": None for key in ("qweight", "qzeros", "scales", "g_idx")}
            edit_tensors(folder, **gone, **{f"{module}.weight": plain[f"{module}.weight"]})
    names = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
    config = Settings().config() | {"modules_in_block_to_quantize": names}
    edit_json(folder / "config.json", quantization_config=config)
    model, reference = load(folder), load(folder.parent / "plain")
    assert methods(model).count(GPTQLinearMethod) == 4 and len(methods(model)) == 8
    for name in ("model.layers.1.mlp.gate_up_proj", "model.layers.1.self_attn.qkv_proj"):
        expected = reference.get_submodule(name).weight
        torch.testing.assert_close(weights_of(model, name), expected, rtol=0, atol=1e-6)


def changed(folder: Path, name: str, change: Any) -> None:
    """Replace tensor `name` by change(tensor)."""
    tensor = load_file(folder / "model.safetensors")[name]
    edit_tensors(folder, **{name: change(tensor)})


def with_value(index: tuple[int, ...], value: float) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (
            "scales",
            with_value((1, 3), float("nan")),
            r"1 tensors are unusable: {} \(1 of 256 scales are NaN or infinite",
        ),
        ("scales", with_value((0, 0), float("-inf")), r"{} \(1 of 256 scales are NaN or infinite"),
        ("scales", lambda t: t.int(), r"{} \(expected dtype float16, bfloat16 or float32, got int32"),
        ("scales", lambda t: t[:2], r"of a wrong shape: {} \(expected shape \[4, 64\], got \[2, 64\]"),
        ("qweight", lambda t: t.float(), r"{} \(expected dtype int32, got float32"),
        ("qweight", lambda t: t[:, :8].contiguous(), r"{} \(expected shape \[16, 64\], got \[16, 8\]"),
        ("qzeros", lambda t: t.t().contiguous(), r"{} \(expected shape \[4, 8\], got \[8, 4\]"),
        ("g_idx", with_value((5,), 4), r"{} \(groups 0 to 4 are outside of 0 to 3"),
        ("g_idx", with_value((5,), -1), r"{} \(groups -1 to 3 are outside of 0 to 3"),
        ("g_idx", with_value((0,), 1), r"{} \(group 0 has 31 input channels, not group_size=32"),
        ("g_idx", lambda t: t * 0, r"{} \(group 0 has 128 input channels"),
        ("g_idx", lambda t: t[:0], r"{} \(expected shape \[128\], got \[0\]"),
        ("g_idx", lambda t: t.float(), r"{} \(expected dtype int32, got float32"),
        ("g_idx", lambda t: None, "1 tensors are missing: {}"),
        ("qzeros", lambda t: None, "1 tensors are missing: {}"),
    ],
)
def test_tensors_that_are_refused(folder: Path, key: str, change: Any, message: str) -> None:
    name = f"{LAYER}.{key}"
    changed(folder, name, change)
    with pytest.raises(ValueError, match=message.format(re.escape(name))):
        load(folder)


def test_extra_tensors_are_named(folder: Path) -> None:
    edit_tensors(folder, **{f"{LAYER}.weight": torch.zeros(64, 128), f"{LAYER}.bias": torch.ones(64)})
    with pytest.raises(ValueError, match=re.escape(f"2 tensors are unexpected: {LAYER}.bias, {LAYER}.weight")):
        load(folder)


def test_biases_of_zeros_are_ignored(folder: Path) -> None:
    """AutoGPTQ writes them for layers that have no bias; zeros beside plain weights are still named."""
    edit_tensors(folder, **{f"{LAYER}.bias": torch.zeros(64)})
    load(folder)
    edit_tensors(folder, **{"model.norm.bias": torch.zeros(128)})
    with pytest.raises(ValueError, match=r"unexpected: model\.norm\.bias"):
        load(folder)


def test_scales_that_overflow_the_models_dtype(tmp_path: Path) -> None:
    save_checkpoints(tmp_path, "llama", Settings(scale_dtype=torch.bfloat16))
    folder = tmp_path / "quantized"
    changed(folder, f"{LAYER}.scales", with_value((0, 0), 1e5))
    load(folder, torch.bfloat16)
    message = re.escape(f"{LAYER}.scales (scales up to 9.98e+04 overflow the model's float16")
    with pytest.raises(ValueError, match=message):
        load(folder, torch.float16)


def test_group_size_that_does_not_divide(folder: Path) -> None:
    """The layer of the model is named, before any tensor is read."""
    edit_json(folder / "config.json", intermediate_size=288, quantization_config=GOOD)
    message = r"model\.layers\.0\.mlp\.down_proj: group_size=128 does not divide its 288 input channels"
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_dummy_weights(folder: Path) -> None:
    """load_format="dummy" makes random integers, and every group is a whole one."""
    model = load(folder, load_format="dummy")
    weight = weights_of(model, "model.layers.0.mlp.down_proj")
    assert weight.isfinite().all() and len(weight.unique()) > 1000


def test_deterministic_mode_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.qkv_proj is quantized"):
        load(folder, deterministic=True)
