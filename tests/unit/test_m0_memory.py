"""Loading streams: peak host memory stays within the model, its largest tensor and a margin.

Each case runs in a process of its own, since a process's peak cannot be taken back. The promised margin is
300 MB; what is checked is a third of that, so that holding two tensors at once, or the file, is noticed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file

from folovllm.model_executor.model_loader.hf_folder import INDEX_FILE

MB = 1 << 20
MARGIN = 50 * MB

# Loads argv[1] into a bfloat16 model with the shapes of argv[2]; prints the peak above what imports took.
PROGRAM = """
import json, sys
import torch, gguf.quants
from folovllm.model_executor.model_loader.loader import load_weights
from folovllm.model_executor.model_loader.source import resolve_model_source
from folovllm.model_executor.models.utils import load_named_weights

def status(field):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(field))

class Model(torch.nn.Module):
    def __init__(self, shapes):
        super().__init__()
        for name, shape in shapes.items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            data = torch.empty(shape, dtype=torch.bfloat16)
            module.register_parameter(leaf, torch.nn.Parameter(data, requires_grad=False))
    def load_weights(self, weights):
        return load_named_weights(self, weights).loaded

source = resolve_model_source(sys.argv[1])
model = Model(json.loads(sys.argv[2]))
torch.ones(1000, 1000) @ torch.ones(1000, 10)  # start torch's threads
before = status("VmRSS")
load_weights(model, source, use_tqdm=False)
memory = {"peak": status("VmHWM") - before, "after": status("VmRSS") - before}
checksum = sum(float(p.float().sum()) for p in model.parameters())
print(json.dumps({**memory, "sum": checksum}))
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")


def measure(model: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, float]:
    """Load in a new process; return the peak and final memory it added, and the sum of all parameters."""
    command = [sys.executable, "-c", PROGRAM, str(model), json.dumps(shapes)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if result.returncode != 0:
        pytest.fail(result.stderr)
    values: dict[str, float] = json.loads(result.stdout)
    return values


def check(values: dict[str, float], shapes: dict[str, tuple[int, ...]]) -> None:
    sizes = [2 * int(np.prod(shape)) for shape in shapes.values()]
    assert values["after"] > 0.9 * sum(sizes), "the model is not in memory: the measurement is wrong"
    assert values["peak"] <= sum(sizes) + max(sizes) + MARGIN


def test_a_sharded_safetensors_checkpoint(tmp_path: Path) -> None:
    shapes = {f"layer{i}.weight": (20, MB) for i in range(13)}  # 40 MB each
    shapes |= {"norm.weight": (1000,), "the_largest_and_last.weight": (50, MB)}
    names = list(shapes)
    (tmp_path / "config.json").write_text("{}")
    weight_map = {}
    for part, chosen in enumerate((names[:6], names[6:])):
        file = f"model-{part + 1:05}-of-00002.safetensors"
        tensors = {name: torch.ones(shapes[name], dtype=torch.bfloat16) for name in chosen}
        save_file(tensors, tmp_path / file)
        weight_map |= dict.fromkeys(chosen, file)
        del tensors
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    values = measure(tmp_path, shapes)
    check(values, shapes)
    assert values["sum"] == sum(float(np.prod(shape)) for shape in shapes.values())


def test_a_quantized_gguf_file(tmp_path: Path) -> None:
    rows, columns = 16384, 2048  # 64 MB in bfloat16, 128 MB in float32
    block = np.zeros(34, np.uint8)
    block[:2] = np.array([0.5], np.float16).view(np.uint8)
    block[2:] = 2  # every number is 0.5 * 2
    raw = np.tile(block, (rows, columns // 32))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    for i in range(6):
        writer.add_tensor(f"blk.{i}.ffn_up.weight", raw, raw_dtype=Type.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    del raw
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (rows, columns) for i in range(6)}
    values = measure(tmp_path / "m.gguf", shapes)
    check(values, shapes)
    assert values["sum"] == 6 * rows * columns
