"""Checkpoints that the ladder needs beside the model: a GPTQ one for M7, a Hugging Face folder for other engines.

Made once, kept in FOLOVLLM_CACHE. Models of random weights have only a config, and so are made in the output folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from folovllm.benchmarks.rungs import SHAPES
from folovllm.engine.arg_utils import EngineArgs
from folovllm.utils.common import default_cache_dir
from folovllm.version import __version__

GROUP_SIZES = (128, 64, 32)
"""Preferred first: weights in a group share a scale."""


def named_shape(engine_args: EngineArgs, folder: Path) -> str:
    """Return the model to load: for load_format="dummy" and a name of SHAPES, a folder with that config."""
    name = engine_args.model.lower()
    if engine_args.load_format != "dummy" or name not in SHAPES:
        return engine_args.model
    return _write_config(folder / "models" / name, SHAPES[name])


def _write_config(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return str(folder)


def group_size_for(config: dict[str, Any]) -> int:
    """Return the largest usual group size that divides every layer's input.

    Raises:
        ValueError: none does.
    """
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    inputs = (config["hidden_size"], config["intermediate_size"], heads * head_size)
    for size in GROUP_SIZES:
        if all(count % size == 0 for count in inputs):
            return size
    raise ValueError(f"GPTQ: no group size of {', '.join(map(str, GROUP_SIZES))} divides the layers' inputs {inputs}.")


def gptq_checkpoint(
    engine_args: EngineArgs,
    hf_config: dict[str, Any],
    calibration: tuple[int, int],
    folder: Path,
    env: dict[str, str],
) -> str:
    """Return a folder with the model in 4 bits, made now unless an earlier call has.

    Args:
        engine_args: the model.
        hf_config: its config.
        calibration: sequences, and tokens of each.
        folder: where the config of a random-weight model is written.
        env: of the process that quantizes.

    Raises:
        ValueError: the model cannot be quantized.
    """
    if hf_config.get("quantization_config"):
        raise ValueError("the model is quantized already")
    size = group_size_for(hf_config)
    if engine_args.load_format == "dummy":
        quantization = {"quant_method": "gptq", "bits": 4, "group_size": size, "sym": True, "desc_act": False}
        return _write_config(folder / "models" / "gptq", hf_config | {"quantization_config": quantization})
    samples, length = calibration
    revision = f"{engine_args.revision}-" if engine_args.revision else ""
    output = _cache_folder(engine_args.model, f"{revision}gptq4-g{size}-{samples}x{length}-v{__version__}")
    arguments = [
        *("quantize", engine_args.model, "--group-size", str(size), "--quiet", "--device", engine_args.device),
        *("--num-samples", str(samples), "--seq-len", str(length)),
        *(("--tokenizer", engine_args.tokenizer) if engine_args.tokenizer else ()),
        *(("--revision", engine_args.revision) if engine_args.revision else ()),
    ]
    _make(output, [sys.executable, "-m", "folovllm", *arguments, "--output"], env)
    return str(output)


def hugging_face_folder(engine_args: EngineArgs, model: str, env: dict[str, str]) -> str:
    """Return a folder that transformers and vLLM can load: the model itself, or a copy made from its GGUF file."""
    if Path(model).is_dir() or ("/" in model and not model.endswith(".gguf")):
        return model
    output = _cache_folder(model, f"hf-v{__version__}")
    _make(output, [sys.executable, "-m", "folovllm.benchmarks.checkpoints", model], env)
    return str(output)


def _cache_folder(model: str, kind: str) -> Path:
    name = Path(model).name if Path(model).exists() else model
    if Path(model).exists():
        # Two folders of one name, or one whose content was replaced, are not the same model.
        stamp = f"{Path(model).resolve()} {Path(model).stat().st_mtime_ns}"
        name += "-" + hashlib.sha256(stamp.encode()).hexdigest()[:12]
    return default_cache_dir() / "ladder" / re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}-{kind}")


def _make(output: Path, command: list[str], env: dict[str, str]) -> None:
    """Run `command` with a temporary folder behind it, which then becomes `output`: a half-made one never does."""
    if (output / "config.json").is_file():
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder) / "model"
        done = subprocess.run([*command, str(made)], env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{' '.join(command[2:5])} failed: {done.stderr.strip().splitlines()[-1:]}")
        if not output.exists():  # another process may have been faster
            made.rename(output)


def write_hugging_face_copy(model: str, folder: Path) -> None:
    """Write config.json and bfloat16 safetensors of `model` into `folder`."""
    import torch
    from safetensors.torch import save_file

    source = EngineArgs(model=model).resolve_model_source()
    folder.mkdir(parents=True)
    weights = {name: tensor.bfloat16().contiguous() for name, tensor in source.weights(torch.bfloat16)}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(source.hf_config() | {"torch_dtype": "bfloat16"}))


if __name__ == "__main__":
    write_hugging_face_copy(sys.argv[1], Path(sys.argv[2]))
