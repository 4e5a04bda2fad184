"""GGUF files: every quantized type, names, row order, config, and every way in which a file can be bad."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

from folovllm.model_executor.model_loader import gguf_weights
from folovllm.model_executor.model_loader.gguf_reader import SUPPORTED_TYPES, GGUFFile
from folovllm.model_executor.model_loader.source import resolve_model_source

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS, VOCAB = 64, 4, 2, 16, 96, 2, 40
TYPES = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K"


def hf_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """Return the config.json of a tiny model of one of the three architectures."""
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {
        "architectures": [names[model_type]],
        "model_type": model_type,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "max_position_embeddings": 256,
        "tie_word_embeddings": model_type == "qwen3",
        "attention_bias": model_type == "qwen2",
        **changes,
    }


def hf_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return random weights under Hugging Face's names."""
    torch.manual_seed(1)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["head_dim"]
    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN),
        "model.norm.weight": torch.randn(HIDDEN),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = torch.randn(VOCAB, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, rows in (("q", heads * head_dim), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = torch.randn(rows, HIDDEN)
            if config["attention_bias"]:
                tensors[f"{layer}.self_attn.{name}_proj.bias"] = torch.randn(rows)
        tensors[f"{layer}.self_attn.o_proj.weight"] = torch.randn(HIDDEN, heads * head_dim)
        if config["model_type"] == "qwen3":
            tensors[f"{layer}.self_attn.q_norm.weight"] = torch.randn(head_dim)
            tensors[f"{layer}.self_attn.k_norm.weight"] = torch.randn(head_dim)
        tensors[f"{layer}.mlp.gate_proj.weight"] = torch.randn(MLP, HIDDEN)
        tensors[f"{layer}.mlp.up_proj.weight"] = torch.randn(MLP, HIDDEN)
        tensors[f"{layer}.mlp.down_proj.weight"] = torch.randn(HIDDEN, MLP)
        tensors[f"{layer}.input_layernorm.weight"] = torch.randn(HIDDEN)
        tensors[f"{layer}.post_attention_layernorm.weight"] = torch.randn(HIDDEN)
    return tensors


def permute_rows(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows as llama.cpp's converter does, written one row at a time.

    In Hugging Face's order a head's row i (first half) is rotated together with row i + D/2; llama.cpp wants
    such a pair next to each other, at 2i and 2i + 1.
    """
    out = tensor.clone()
    head_dim = tensor.shape[0] // heads
    for head in range(heads):
        for i in range(head_dim // 2):
            for half in (0, 1):
                out[head * head_dim + 2 * i + half] = tensor[head * head_dim + half * (head_dim // 2) + i]
    return out


def metadata_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a converter would write about the model."""
    arch = config["model_type"]
    return {
        "general.architecture": arch,
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.key_length": config["head_dim"],
        f"{arch}.attention.value_length": config["head_dim"],
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.freq_base": config["rope_theta"],
    }


def gguf_tensors(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename by the gguf package's own table, and reorder as llama.cpp's converter does."""
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, config["model_type"].upper()), LAYERS)
    renamed = {}
    for name, tensor in tensors.items():
        if config["model_type"] == "llama" and (".q_proj." in name or ".k_proj." in name):
            tensor = permute_rows(tensor, HEADS if ".q_proj." in name else KV_HEADS)
        new = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        renamed[new] = tensor
    return renamed


def write_gguf(
    path: Path, metadata: dict[str, Any], tensors: dict[str, Any], types: dict[str, Type] | None = None
) -> Path:
    """Write a GGUF file. Tensors are torch tensors or arrays of raw bytes; `types` says what bytes are."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if key == "general.alignment":
            writer.add_custom_alignment(value)
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add |= {str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    for name, tensor in tensors.items():
        array = tensor.numpy() if isinstance(tensor, torch.Tensor) else tensor
        writer.add_tensor(name, array, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path: Path, config: dict[str, Any], changes: dict[str, Any] | None = None, **tensors: Any) -> Path:
    """Write a tiny model; `changes` overrides metadata (None removes an entry)."""
    metadata = {k: v for k, v in (metadata_of(config) | (changes or {})).items() if v is not None}
    extra = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return write_gguf(path, metadata, gguf_tensors(config, hf_tensors(config)) | extra)


# Tensors


def random_blocks(kind: Type, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """Return random bytes that are valid for a type: only the scales, which are float16, must be finite."""
    rng = np.random.default_rng(int(kind))
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows, columns // block, nbytes), dtype=np.uint8)
    scales = {"Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}[kind.name]
    for offset in scales:
        value = rng.normal(0, 0.1, (rows, columns // block, 1)).astype(np.float16)
        raw[:, :, offset : offset + 2] = value.view(np.uint8)
    return raw.reshape(rows, -1)


def stored(kind: Type, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """Return a random tensor of a type, as its bytes."""
    if kind.name.endswith("_K"):
        return random_blocks(kind, rows, columns)
    values = np.random.default_rng(int(kind)).normal(size=(rows, columns)).astype(np.float32)
    return quantize(values, kind).view(np.uint8).reshape(rows, -1)


def test_the_types_are_the_promised_ones() -> None:
    assert [t.name for t in SUPPORTED_TYPES] == TYPES.split()


@pytest.mark.parametrize("name", TYPES.split())
def test_each_type_equals_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind = Type[name]
    rows, columns = 37, 512
    raw = stored(kind, rows, columns)
    path = write_gguf(
        tmp_path / "x.gguf",
        {"general.architecture": "qwen2"},
        {"blk.3.ffn_up.weight": raw},
        {"blk.3.ffn_up.weight": kind},
    )
    expected = torch.from_numpy(dequantize(raw, kind).reshape(rows, columns).copy())
    assert expected.isfinite().all() and len(expected.unique()) > 100
    native = {"F16": torch.float16, "BF16": torch.bfloat16}.get(name, torch.float32)
    source = resolve_model_source(str(path))
    for chunk in (1 << 21, 5 * columns, 1):  # all rows at once, several chunks with a rest, one row at a time
        monkeypatch.setattr(gguf_weights, "_CHUNK_ELEMENTS", chunk)
        [(key, tensor)] = source.weights()
        assert key == "model.layers.3.mlp.up_proj.weight"
        assert tensor.dtype == native and tensor.shape == (rows, columns)
        assert tensor.float().equal(expected)
    [(_, half)] = source.weights(torch.bfloat16)
    assert half.dtype == (native if name in ("F32", "F16") else torch.bfloat16)
    assert half.equal(expected.to(half.dtype))
    assert source.num_weight_bytes(torch.bfloat16) == half.nbytes
    assert source.num_weight_bytes() == tensor.nbytes


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_gguf_equals_the_safetensors_folder_it_was_made_from(tmp_path: Path, model_type: str) -> None:
    config = hf_config(model_type)
    tensors = hf_tensors(config)
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    path = write_model(tmp_path / "model.gguf", config)
    ours, theirs = resolve_model_source(str(path)), resolve_model_source(str(folder))
    expected = theirs.hf_config()
    assert {key: ours.hf_config()[key] for key in expected} == expected
    loaded = dict(ours.weights())
    assert set(loaded) == {name for name, _ in theirs.weights()}
    for name, tensor in theirs.weights():
        assert loaded[name].equal(tensor), name
    assert ours.num_weight_bytes() == theirs.num_weight_bytes()


@pytest.mark.parametrize("chunk", [1 << 21, 1])
def test_llama_biases_and_single_heads_are_put_back_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(gguf_weights, "_CHUNK_ELEMENTS", chunk)
    config = hf_config("llama", attention_bias=True, tie_word_embeddings=True)
    source = resolve_model_source(str(write_model(tmp_path / "model.gguf", config)))
    assert source.hf_config()["attention_bias"] and source.hf_config()["tie_word_embeddings"]
    loaded = dict(source.weights())
    for name, tensor in hf_tensors(config).items():
        assert loaded[name].equal(tensor), name


def test_the_two_row_orders_are_the_same_rotation() -> None:
    """q . k after rotating neighbours in llama.cpp's order equals q . k after rotating halves in Hugging
    Face's."""
    torch.manual_seed(0)
    half = HEAD_DIM // 2
    q, k = torch.randn(2, HEAD_DIM, dtype=torch.float64)
    angles = torch.rand(2, half, dtype=torch.float64) * 6
    complex_parts = []
    for vector, angle in zip((q, k), angles, strict=True):
        rotation = torch.polar(torch.ones_like(angle), angle)
        by_halves = torch.complex(vector[:half], vector[half:]) * rotation
        permuted = permute_rows(vector[:, None], 1)[:, 0]
        by_neighbours = torch.complex(permuted[0::2], permuted[1::2]) * rotation
        complex_parts.append((by_halves, by_neighbours))
    (q1, q2), (k1, k2) = complex_parts
    assert torch.allclose((q1 * k1.conj()).real.sum(), (q2 * k2.conj()).real.sum())
    assert gguf_weights._unpermute(permute_rows(q[:, None], 1), HEAD_DIM)[:, 0].equal(q)


def test_quantized_rows_are_put_back_in_order_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_weights, "_CHUNK_ELEMENTS", 1)
    config = hf_config("llama")
    weight = torch.randn(HEADS * HEAD_DIM, HIDDEN)
    raw = quantize(permute_rows(weight, HEADS).numpy(), Type.Q8_0)
    path = write_gguf(
        tmp_path / "model.gguf",
        metadata_of(config),
        {"token_embd.weight": torch.zeros(VOCAB, HIDDEN), "blk.0.attn_q.weight": raw},
        {"blk.0.attn_q.weight": Type.Q8_0},
    )
    loaded = dict(resolve_model_source(str(path)).weights())["model.layers.0.self_attn.q_proj.weight"]
    expected = dequantize(quantize(weight.numpy(), Type.Q8_0), Type.Q8_0)
    assert loaded.equal(torch.from_numpy(expected).view_as(weight))


def test_the_reader_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    values = {"x.int": 7, "x.negative": [-1, 2], "x.text": "é", "x.flag": True, "x.float": 0.1}
    values |= {"x.texts": ["a", "", "日本"], "x.floats": [0.5, -2.0], "general.alignment": 64}
    path = write_model(tmp_path / "m.gguf", hf_config("qwen3"), values)
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            expected = field.contents()
            assert ours.metadata[key] == (pytest.approx(expected) if isinstance(expected, float) else expected)
    assert ours.metadata["x.float"] == 0.1  # and not 0.10000000149
    assert set(ours.tensors) == {t.name for t in theirs.tensors}
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.offset, mine.nbytes, mine.type) == (
            tensor.data_offset,
            tensor.n_bytes,
            tensor.tensor_type,
        )
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))


# Config


def test_config_details(tmp_path: Path) -> None:
    config = hf_config("llama", head_dim=8)  # not hidden_size / heads
    changes: dict[str, Any] = {"llama.attention.head_count_kv": None, "llama.rope.freq_base": None}
    changes |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    changes |= {"tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.eos_token_id": 4}
    path = write_model(tmp_path / "m.gguf", config, changes)
    ours = resolve_model_source(str(path)).hf_config()
    assert ours["head_dim"] == 8
    assert ours["num_key_value_heads"] == HEADS
    assert ours["rope_theta"] == 10000.0
    assert ours["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert (ours["bos_token_id"], ours["eos_token_id"]) == (3, 4)
    assert ours["dtype"] == ours["torch_dtype"] == "float32"
    assert "rope_freq_factors" not in ours and "sliding_window" not in ours
    path = write_model(tmp_path / "m.gguf", hf_config("llama"), {"llama.attention.sliding_window": 128})
    assert resolve_model_source(str(path)).hf_config()["sliding_window"] == 128


def test_rope_factors_become_config_and_not_weights(tmp_path: Path) -> None:
    factors = torch.tensor([1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0])
    path = write_model(tmp_path / "m.gguf", hf_config("llama"), rope_freqs__weight=factors)
    source = resolve_model_source(str(path))
    assert source.hf_config()["rope_freq_factors"] == factors.tolist()
    assert not any("rope" in name for name, _ in source.weights())


@pytest.mark.parametrize(("kind", "expected"), [("Q4_0", "bfloat16"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_the_dtype_is_that_of_most_weights(tmp_path: Path, kind: str, expected: str) -> None:
    name = "token_embd.weight"
    path = write_gguf(
        tmp_path / "m.gguf",
        metadata_of(hf_config("qwen2")),
        {name: stored(Type[kind], VOCAB, HIDDEN), "output_norm.weight": torch.ones(HIDDEN * 100)},
        {name: Type[kind]},
    )
    assert resolve_model_source(str(path)).hf_config()["dtype"] == expected


def test_generation_ends_at_eos_and_the_control_tokens_known_by_name(tmp_path: Path) -> None:
    tokens = [
        "a",
        "<|endoftext|>",
        "<|im_end|>",
        "<|im_start|>",
        "<|eot_id|>",
        "</s>",
        "<end>",
        "<|end_of_text|>",
    ]
    kinds = [1, 3, 3, 3, 3, 1, 3, 4]
    changes: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    path = write_model(tmp_path / "m.gguf", hf_config("llama"), changes | {"tokenizer.ggml.eos_token_id": 6})
    # Not 5 and 7, which are no control tokens here.
    assert resolve_model_source(str(path)).generation_config() == {"eos_token_id": [1, 2, 4, 6]}
    path = write_model(tmp_path / "m.gguf", hf_config("llama"))
    assert resolve_model_source(str(path)).generation_config() == {}


@pytest.mark.badinput
@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"general.architecture": "gemma3"}, r"architecture 'gemma3' is not supported .*llama, qwen2, qwen3"),
        ({"split.count": 3}, r"one of 3 parts .*llama-gguf-split --merge"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.attention.value_length": 8}, "keys and values of different head size"),
        ({"llama.rope.dimension_count": 8}, "rotary embeddings over 8 of 16 dimensions"),
        ({"llama.rope.scaling.type": "yarn"}, r"rope.scaling.type='yarn' .*supported: none, linear"),
        ({"llama.attention.head_count": 0}, r"head_count=0 must be a single int of at least 1"),
        ({"llama.rope.scaling.type": 3}, r"rope.scaling.type=3 must be a string"),
        ({"llama.block_count": None}, "the metadata lacks 'llama.block_count'"),
        ({"llama.block_count": "2"}, "llama.block_count='2' must be a single int"),
        ({"llama.attention.head_count_kv": [2, 2]}, r"head_count_kv=\[2, 2\] must be a single int"),
        ({"llama.attention.layer_norm_rms_epsilon": True}, r"layer_norm_rms_epsilon=True must be a single number"),
    ],
)
def test_models_that_are_not_supported(tmp_path: Path, changes: dict[str, Any], pattern: str) -> None:
    path = write_model(tmp_path / "model.gguf", hf_config("llama"), changes)
    with pytest.raises(ValueError, match=pattern) as error:
        resolve_model_source(str(path)).hf_config()
    assert str(path) in str(error.value)


@pytest.mark.badinput
def test_tensors_that_are_not_supported(tmp_path: Path) -> None:
    kind = Type.IQ4_NL
    raw = np.zeros((4, 2 * gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    metadata = metadata_of(hf_config("llama"))
    path = write_gguf(tmp_path / "m.gguf", metadata, {"output.weight": raw}, {"output.weight": kind})
    with pytest.raises(ValueError, match=r"'output.weight' has type IQ4_NL.*supported: F32, F16, BF16, Q4_0.*Q6_K"):
        resolve_model_source(str(path)).hf_config()
    path = write_model(path, hf_config("llama"), blk__0__ffn_gate_exps__weight=torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"1 tensors are not part of .*blk.0.ffn_gate_exps.weight"):
        list(resolve_model_source(str(path)).weights())
    path = write_gguf(path, metadata, {"output.weight": torch.ones(3, 4)})
    with pytest.raises(ValueError, match=r"no tensor 'token_embd.weight'"):
        resolve_model_source(str(path)).hf_config()
    path = write_model(path, hf_config("llama"), rope_freqs__weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"'rope_freqs.weight' must be F32 of shape \(8,\), not F32 of \(3,\)"):
        resolve_model_source(str(path)).hf_config()
    path = write_model(path, hf_config("llama"), blk__0__attn_q__weight=torch.ones(6, HIDDEN))
    with pytest.raises(ValueError, match=r"blk.0.attn_q.weight has 6 rows, which 4 heads cannot share"):
        list(resolve_model_source(str(path)).weights())


# Damage


@pytest.fixture
def small(tmp_path: Path) -> Path:
    metadata = {"general.architecture": "qwen2", "x.texts": ["a", "bc"], "x.number": 3}
    return write_gguf(tmp_path / "small.gguf", metadata, {"token_embd.weight": torch.ones(2, 4)})


@pytest.mark.badinput
def test_every_truncation_is_named_with_its_offset(small: Path) -> None:
    whole = small.read_bytes()
    last_byte = GGUFFile(small).tensors["token_embd.weight"].offset + 32
    for size in range(last_byte):
        small.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"Corrupt GGUF file .*small.gguf .*at offset \d+: "):
            GGUFFile(small)


@pytest.mark.badinput
def test_a_file_that_shrinks_while_being_read_is_an_error(small: Path) -> None:
    source = resolve_model_source(str(small))
    weights = source.weights()
    assert source.num_weight_bytes() == 32
    offset = GGUFFile(small).tensors["token_embd.weight"].offset
    small.write_bytes(small.read_bytes()[: offset + 20])
    with pytest.raises(ValueError, match=rf"at offset {offset + 20}: the file ended inside tensor"):
        list(weights)


@pytest.mark.badinput
@pytest.mark.parametrize(
    ("old", "new", "pattern"),
    [
        (b"GGUF", b"GGML", r"at offset 0: it starts with b'GGML'"),
        (b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03", r"version 50331648 \(a file for big-endian machines\)"),
        (b"GGUF\x03", b"GGUF\x01", r"GGUF version 1; supported: 2 and 3"),
        (b"GGUF\x03\0\0\0\x01", b"GGUF\x03\0\0\0\x02", r"Corrupt GGUF file"),
        (b"x.number\x04\0\0\0", b"x.number\x63\0\0\0", r"x.number has the unknown value type 99"),
        (b"x.number", b"x.\xffumber", r"at offset \d+: a metadata name is not UTF-8"),
        (b"x.texts\x09\0\0\0\x08", b"x.texts\x09\0\0\0\x09", r"x.texts is an array of arrays"),
        (struct.pack("<Q2x", 2)[:8] + b"\x01", struct.pack("<Q", 1 << 62) + b"\x01", r"Corrupt GGUF file"),
        (b"token_embd.weight\x02", b"token_embd.weight\x09", r"has 9 dimensions"),
        (b"token_embd.weight\x02\0\0\0\x04", b"token_embd.weight\x02\0\0\0\0", r"has dimensions \[0, 2\]"),
        (
            struct.pack("<QQI", 4, 2, 0),
            struct.pack("<QQI", 4, 2, 222),
            r"type number 222, which is not supported",
        ),
        (
            struct.pack("<QQI", 4, 2, 0),
            struct.pack("<QQI", 4, 2, 8),
            r"rows of 4, not a multiple of Q8_0's 32",
        ),
        (struct.pack("<QQIQ", 4, 2, 0, 0), struct.pack("<QQIQ", 4, 2, 0, 7), r"claims offset 7"),
        (
            struct.pack("<QQI", 4, 2, 0),
            struct.pack("<QQI", 4, 1 << 60, 0),
            r"needs 18446744073709551616 bytes",
        ),
    ],
)
def test_damage_is_named(small: Path, old: bytes, new: bytes, pattern: str) -> None:
    whole = small.read_bytes()
    assert whole.count(old) >= 1
    small.write_bytes(whole.replace(old, new, 1))
    with pytest.raises(ValueError, match=pattern) as error:
        GGUFFile(small)
    assert str(small) in str(error.value)


@pytest.mark.badinput
def test_random_damage_is_either_harmless_or_a_value_error(tmp_path: Path) -> None:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"model": "gpt2", "pre": "smollm", "tokens": [*symbols, "ab", "</s>"], "merges": ["a b"]}
    vocabulary |= {"token_type": [1] * 257 + [3], "eos_token_id": 257, "add_bos_token": False}
    changes = {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    path = write_model(tmp_path / "m.gguf", hf_config("llama", num_hidden_layers=1), changes)
    whole = bytearray(path.read_bytes())
    header = min(tensor.offset for tensor in GGUFFile(path).tensors.values())
    rng = random.Random(0)
    refused = {"file": 0, "config": 0, "tokenizer": 0}
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(damaged)
        source = resolve_model_source(str(path))
        step = "file"
        try:
            GGUFFile(path)
            step = "config"
            source.hf_config()
            source.num_weight_bytes()
            step = "tokenizer"
            source.generation_config()
            source.tokenizer()
        except ValueError:
            refused[step] += 1
    if min(refused.values()) < 5:
        pytest.fail(f"too few of 600 damaged files were refused: {refused}")


@pytest.mark.badinput
def test_names_that_are_there_twice(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf",
        {"general.architecture": "qwen2", "x.a": 1, "x.b": 2},
        {"aaa": torch.ones(8), "bbb": torch.ones(8)},
    )
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"x.b", b"x.a"))
    with pytest.raises(ValueError, match=r"metadata 'x.a' is there twice"):
        GGUFFile(path)
    path.write_bytes(whole.replace(b"bbb", b"aaa"))
    with pytest.raises(ValueError, match=r"tensor 'aaa' is there twice"):
        GGUFFile(path)
