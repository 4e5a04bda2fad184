"""`folovllm quantize`: the folder it writes, and what it refuses."""

from __future__ import annotations

import itertools
import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from folovllm.engine.arg_utils import EngineArgs
from folovllm.entrypoints.cli.main import main
from folovllm.model_executor.layers.quantization.packing import dequantize
from folovllm.model_executor.layers.rotary_embedding import compute_inv_freq
from folovllm.quantize import checkpoint, pipeline
from folovllm.quantize.gptq import quantize_matrix
from folovllm.quantize.pipeline import Calibration, quantize_model
from folovllm.quantize.spec import QuantizationSpec
from tests import tiny_models
from tests.tiny_models import save_tiny_model

PROJECTIONS = [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Qwen2 model (with biases) whose sizes groups of 32 and 64 divide."""
    monkeypatch.setitem(tiny_models._COMMON, "intermediate_size", 128)
    folder = tmp_path / "tiny"
    save_tiny_model(folder, "qwen2")
    (folder / "tokenizer_config.json").write_text('{"kept": "as it is"}')
    return folder


def quantize(model: Path, output: Path, *flags: str) -> int:
    calibration = ["--num-samples", "6", "--seq-len", "32"] if "rtn" not in flags else []
    usual = ["--output", str(output), "--device", "cpu", "-q", "--group-size", "32"]
    return main(["quantize", str(model), *usual, *calibration, *flags])


def dequantized(tensors: dict[str, torch.Tensor], prefix: str, bits: int) -> torch.Tensor:
    parts = (tensors[f"{prefix}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx"))
    return dequantize(*parts, bits, zero_offset=1)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--bits", "8"],
        ["--asym"],
        ["--desc-act"],
        ["--group-size", "-1"],
        ["--group-size", "64"],
        ["--method", "rtn"],
    ],
    ids=lambda flags: "-".join(f.strip("-") for f in flags) or "default",
)
def test_the_folder_is_a_gptq_checkpoint(tiny: Path, tmp_path: Path, flags: list[str]) -> None:
    output = tmp_path / "out"
    assert quantize(tiny, output, *flags) == 0
    options = dict(itertools.pairwise(flags))
    bits, group_size = int(options.get("--bits", 4)), int(options.get("--group-size", 32))
    config = json.loads((output / "config.json").read_text())
    quantization = config["quantization_config"]
    expected = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": bits, "group_size": group_size}
    expected |= {"sym": "--asym" not in flags, "desc_act": "--desc-act" in flags, "lm_head": False}
    assert expected.items() <= quantization.items()
    assert json.loads((output / "quantize_config.json").read_text()) == quantization
    assert config["hidden_size"] == 64 and config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == 2
    assert (output / "tokenizer_config.json").read_text() == '{"kept": "as it is"}'

    original, tensors = load_file(tiny / "model.safetensors"), load_file(output / "model.safetensors")
    names = set(original)
    for layer in range(3):
        for projection in PROJECTIONS:
            prefix = f"model.layers.{layer}.{projection}"
            weight = original[f"{prefix}.weight"]
            names = names - {f"{prefix}.weight"} | {f"{prefix}.{n}" for n in ("qweight", "qzeros", "scales", "g_idx")}
            (rows, columns), groups = weight.shape, 1 if group_size == -1 else weight.shape[1] // group_size
            shapes = {
                n: (tensors[f"{prefix}.{n}"].dtype, [*tensors[f"{prefix}.{n}"].shape]) for n in shapes_of(1, 1, 1, 4)
            }
            assert shapes == shapes_of(rows, columns, groups, bits)
            lost = (dequantized(tensors, prefix, bits) - weight).square().sum() / weight.square().sum()
            assert lost < (0.1 if bits == 4 else 1e-3), "the right integers under the right name"
    assert set(tensors) == names, "everything else is there under its name"
    for name in set(original) & names:
        assert torch.equal(tensors[name], original[name].bfloat16()), name


def shapes_of(rows: int, columns: int, groups: int, bits: int) -> dict[str, tuple[torch.dtype, list[int]]]:
    """What the format asks of a weight [rows, columns]."""
    return {
        "qweight": (torch.int32, [columns * bits // 32, rows]),
        "qzeros": (torch.int32, [groups, rows * bits // 32]),
        "scales": (torch.float16, [groups, rows]),
        "g_idx": (torch.int32, [columns]),
    }


def test_zero_points_are_stored_less_one(tiny: Path, tmp_path: Path) -> None:
    assert quantize(tiny, tmp_path / "out", "--method", "rtn") == 0
    qzeros = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.q_proj.qzeros"]
    assert qzeros.unique().tolist() == [0x77777777], "eight times 8 - 1"


def test_large_models_are_cut_into_files_with_an_index(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(tiny, tmp_path / "one", "--method", "rtn")
    monkeypatch.setattr(checkpoint.CheckpointWriter.__init__, "__defaults__", (20_000,))
    quantize(tiny, tmp_path / "many", "--method", "rtn")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and not (tmp_path / "many" / "model.safetensors").exists()
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    for file in files:
        for name, tensor in load_file(file).items():
            assert index["weight_map"].pop(name) == file.name
            assert torch.equal(tensor, whole[name])
    assert not index["weight_map"]


def test_calibration_from_a_file_and_from_the_model_differ(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a file's tokens are those that are used."""
    seen: list[torch.Tensor] = []

    def spy(*args: object) -> torch.Tensor:
        seen.append(torch.arange(64).view(2, 32))
        return seen[-1]

    class Source:
        def tokenizer(self) -> None:
            return None

    monkeypatch.setattr(pipeline, "samples_from_text", spy)
    monkeypatch.setattr("folovllm.model_executor.model_loader.hf_folder.FolderSource.tokenizer", Source.tokenizer)
    (tmp_path / "text.txt").write_text("words")
    assert quantize(tiny, tmp_path / "file", "--calibration", str(tmp_path / "text.txt")) == 0
    monkeypatch.undo()
    monkeypatch.setitem(tiny_models._COMMON, "intermediate_size", 128)
    assert len(seen) == 1
    assert quantize(tiny, tmp_path / "own") == 0
    name = "model.layers.0.mlp.down_proj.qweight"
    ours, theirs = (load_file(tmp_path / which / "model.safetensors")[name] for which in ("own", "file"))
    assert not torch.equal(ours, theirs)


def test_report_has_every_projection_and_summary_is_printed(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = quantize_model(
        EngineArgs(model=str(tiny), device="cpu"),
        tmp_path / "out",
        QuantizationSpec(group_size=32),
        Calibration(num_samples=4, seq_len=16),
        use_tqdm=False,
    )
    fused = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    assert list(report.errors) == [f"model.layers.{layer}.{name}" for layer in range(3) for name in fused]
    assert all(0 < error < 0.1 for error in report.errors.values())
    assert report.num_calibration_tokens == 64
    assert report.num_bytes == sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())
    capsys.readouterr()
    flags = ["--output", str(tmp_path / "again"), "--group-size", "32", "--num-samples", "4", "--seq-len", "16"]
    assert main(["quantize", str(tiny), "--device", "cpu", *flags]) == 0
    printed = capsys.readouterr()
    assert "calibration tokens: 64" in printed.out and "4 bits, group size 32" in printed.out
    assert "layer 2: qkv_proj " in printed.err, "progress shows each layer's error"


def test_files_have_the_usual_rights(tiny: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "out", "--method", "rtn")
    (tmp_path / "usual").touch()
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {usual}


# Refusals


@pytest.mark.badinput
@pytest.mark.parametrize(
    "flags,told",
    [
        (["--group-size", "128"], "group_size=128 does not divide hidden_size"),
        (["--seq-len", "1000"], "seq_len=1000 is above the model's limit of 256"),
        (["--calibration", "absent.txt"], "absent.txt"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    tiny: Path, tmp_path: Path, flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(tiny, tmp_path / "out", *flags) == 1
    assert told in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"tiny"}, "nothing is left behind"


@pytest.mark.badinput
def test_group_sizes_that_would_do_are_named(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize(tiny, tmp_path / "out", "--group-size", "128")
    assert "Sizes that divide all layers of this model: -1, 32, 64" in capsys.readouterr().err


@pytest.mark.badinput
@pytest.mark.parametrize(
    "flags",
    [
        ["--bits", "3"],
        ["--group-size", "16"],
        ["--sym", "--asym"],
        ["--method", "awq"],
        ["--damp-percent", "0"],
        ["--num-samples", "0"],
        ["--seq-len", "1"],
        ["--seed", "-1"],
        ["--method", "rtn", "--desc-act"],
        ["--method", "rtn", "--calibration", "text.txt"],
    ],
)
def test_wrong_flags_are_refused(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["quantize", "absent", "--output", str(tmp_path / "out"), *flags])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    assert "absent" not in capsys.readouterr().err.split("usage")[0], "before the model is looked for"


@pytest.mark.badinput
def test_a_folder_in_use_is_left_alone(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("x")
    assert quantize(tiny, output) == 1
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["precious"]
    (output / "precious").unlink()
    assert quantize(tiny, output, "--method", "rtn") == 0, "an empty one may be filled"


@pytest.mark.badinput
def test_quantized_models_are_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize(tiny, tmp_path / "out", "--method", "rtn")
    assert quantize(tmp_path / "out", tmp_path / "twice") == 1
    assert "is quantized already" in capsys.readouterr().err


@pytest.mark.badinput
@pytest.mark.parametrize(
    "change,told",
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"(?s)model\.layers\.1\..*missing: mlp.up_proj.weight"),
        (lambda t: t.pop("model.embed_tokens.weight"), "no tensor model.embed_tokens.weight"),
        (lambda t: t.pop("model.norm.weight"), "no tensor model.norm.weight"),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(1)}), "beyond num_hidden_layers=3"),
        (
            lambda t: t["model.layers.2.mlp.up_proj.weight"].fill_(float("nan")),
            r"model.layers.2.mlp.gate_up_proj: .*NaN",
        ),
    ],
)
def test_damaged_models_are_refused_and_nothing_stays(tiny: Path, tmp_path: Path, change, told: str) -> None:  # type: ignore[no-untyped-def]
    tensors = load_file(tiny / "model.safetensors")
    change(tensors)
    save_file(tensors, tiny / "model.safetensors")
    with pytest.raises(ValueError, match=told):
        quantize_model(
            EngineArgs(model=str(tiny), device="cpu"),
            tmp_path / "out",
            QuantizationSpec(group_size=32, method="rtn"),
            use_tqdm=False,
        )
    assert {path.name for path in tmp_path.iterdir()} == {"tiny"}


def test_parts_of_a_fused_projection_are_those_of_the_whole(tiny: Path, tmp_path: Path) -> None:
    """Query, key and value come from one Hessian, so act-order is one order for all of them."""
    quantize(tiny, tmp_path / "out", "--desc-act")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for prefix, names in (("self_attn", ("q", "k", "v")), ("mlp", ("gate", "up"))):
        orders = [tensors[f"model.layers.1.{prefix}.{name}_proj.g_idx"] for name in names]
        assert all(torch.equal(order, orders[0]) for order in orders)
        assert orders[0].tolist() != sorted(orders[0].tolist())


def test_pack_and_dequantize_agree() -> None:
    x = torch.randn(256, 64)
    for bits in (4, 8):
        matrix = quantize_matrix(torch.randn(24, 64), x.t() @ x, QuantizationSpec(bits, 32, False, True))
        packed = checkpoint.pack(matrix, bits)
        again = dequantize(packed["qweight"], packed["qzeros"], packed["scales"], packed["g_idx"], bits, zero_offset=1)
        assert torch.equal(again, matrix.dequantize())


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_from_gguf_becomes_what_others_read(factor: float) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    divisors = compute_inv_freq(128, 500000.0, None) / compute_inv_freq(128, 500000.0, scaling)
    config = {"rope_theta": 500000.0, "rope_scaling": None, "rope_freq_factors": divisors.tolist()}
    assert checkpoint.portable_config(config) == {"rope_theta": 500000.0, "rope_scaling": scaling}
    assert "rope_freq_factors" in config, "the source's own is left alone"


@pytest.mark.badinput
def test_other_divisors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rope_freqs.weight"):
        checkpoint.portable_config({"rope_theta": 10000.0, "rope_freq_factors": [1.0, 2.0, 3.0, 4.0]})
