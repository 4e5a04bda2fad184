"""Our models against transformers on tiny random weights in float32: logits, chunked or not, any block size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from folovllm.attention.backends.abstract import AttentionBackend, AttentionMetadata
from folovllm.attention.backends.paged import PagedBackend
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.config import ModelConfig
from folovllm.model_executor.layers.attention import Attention
from folovllm.model_executor.layers.rotary_embedding import compute_inv_freq
from folovllm.model_executor.model_loader.build import get_model
from folovllm.model_executor.model_loader.source import resolve_model_source
from folovllm.model_executor.models.config import DecoderConfig
from folovllm.model_executor.models.llama import LlamaForCausalLM
from folovllm.model_executor.models.registry import get_model_class
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE, save_tiny_model

CPU = torch.device("cpu")


def load(path: Path, backend: type[AttentionBackend] = TorchNaiveBackend) -> LlamaForCausalLM:
    source = resolve_model_source(str(path))
    config = ModelConfig(model=str(path), hf_config=source.hf_config())
    return get_model(config, source, backend, None, torch.float32, CPU, use_tqdm=False)


def bind_caches(model: LlamaForCausalLM, num_blocks: int, block_size: int) -> None:
    for layer in (m for m in model.modules() if isinstance(m, Attention)):
        shape = TorchNaiveBackend.get_kv_cache_shape(num_blocks, block_size, layer.num_kv_heads, layer.head_size)
        # Garbage, not zeros: nothing that was not written may be read.
        layer.kv_cache = torch.full(shape, float("nan"))


def metadata_for(chunks: list[tuple[int, int]], block_tables: list[list[int]], block_size: int) -> AttentionMetadata:
    """Metadata of a step in which request b computes tokens chunks[b][0] to chunks[b][1]."""
    starts, slots = [0], []
    for (start, end), blocks in zip(chunks, block_tables, strict=True):
        starts.append(starts[-1] + end - start)
        slots += [blocks[p // block_size] * block_size + p % block_size for p in range(start, end)]
    width = max(len(blocks) for blocks in block_tables)
    seq_lens = [end for _, end in chunks]
    return AttentionMetadata(
        num_actual_tokens=starts[-1],
        num_reqs=len(chunks),
        max_query_len=max(end - start for start, end in chunks),
        max_seq_len=max(seq_lens),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table=torch.tensor([b + [0] * (width - len(b)) for b in block_tables], dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
        query_start_loc_cpu=starts,
        seq_lens_cpu=seq_lens,
    )


@torch.inference_mode()
def run_chunks(
    model: LlamaForCausalLM,
    prompts: list[list[int]],
    sizes: list[int],
    block_size: int,
    backend: type[AttentionBackend] = TorchNaiveBackend,
) -> list[torch.Tensor]:
    """Feed the prompts in chunks, request b in chunks of sizes[b], all requests in one batch; return all logits."""
    blocks_each = 256 // block_size + 1
    bind_caches(model, 1 + blocks_each * len(prompts), block_size)
    # Block ids descend, so that a mix-up of block and position cannot go unseen.
    tables = [list(range(blocks_each * (b + 1), blocks_each * b, -1)) for b in range(len(prompts))]
    done = [0] * len(prompts)
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    while any(d < len(p) for d, p in zip(done, prompts, strict=True)):
        active = [b for b, p in enumerate(prompts) if done[b] < len(p)]
        chunks = [(done[b], min(done[b] + sizes[b], len(prompts[b]))) for b in active]
        metadata = metadata_for(chunks, [tables[b] for b in active], block_size)
        metadata = backend.build_metadata(metadata, block_size, torch.float32)
        ids = [t for b, (s, e) in zip(active, chunks, strict=True) for t in prompts[b][s:e]]
        positions = [p for s, e in chunks for p in range(s, e)]
        out = model.compute_logits(model(torch.tensor(ids), torch.tensor(positions), metadata))
        for i, b in enumerate(active):
            logits[b].append(out[metadata.query_start_loc_cpu[i] : metadata.query_start_loc_cpu[i + 1]])
            done[b] = chunks[i][1]
    return [torch.cat(parts) for parts in logits]


@pytest.mark.parametrize("backend", [TorchNaiveBackend, PagedBackend])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_equal_transformers(name: str, backend: type[AttentionBackend], tmp_path: Path) -> None:
    """Three requests in one batch, in chunks of different sizes, within 1e-4 of transformers at every position."""
    reference = save_tiny_model(tmp_path, name)
    model = load(tmp_path, backend)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (1, 37, 130)]
    for block_size, sizes in ((16, [1, 37, 130]), (256, [1, 5, 64]), (4, [1, 1, 33])):
        for prompt, logits in zip(prompts, run_chunks(model, prompts, sizes, block_size, backend), strict=True):
            with torch.inference_mode():
                expected = reference(torch.tensor([prompt])).logits[0]
            assert logits.dtype == torch.float32 and logits.shape == expected.shape
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", [TorchNaiveBackend, PagedBackend])
@torch.inference_mode()
def test_output_rows(backend: type[AttentionBackend], tmp_path: Path) -> None:
    """Only the tokens that are asked for come out, with the values they have among all."""
    save_tiny_model(tmp_path, "qwen3")
    model = load(tmp_path, backend)
    ids, positions = torch.arange(3, 43), torch.cat([torch.arange(30), torch.arange(10)])
    hidden = []
    for rows in (None, torch.tensor([4, 29, 39])):
        bind_caches(model, 6, 16)
        common = metadata_for([(0, 30), (0, 10)], [[5, 2], [3]], 16)
        common.output_rows = rows
        hidden.append(model(ids, positions, backend.build_metadata(common, 16, torch.float32)))
    assert hidden[0].shape[0] == 40 and hidden[1].shape[0] == 3
    torch.testing.assert_close(hidden[1], hidden[0][[4, 29, 39]], atol=1e-5, rtol=0)


def test_the_comparison_notices_a_wrong_rope(tmp_path: Path) -> None:
    """The oracle test above can fail: a wrong rotary base moves logits by far more than its tolerance."""
    reference = save_tiny_model(tmp_path, "llama")
    model = load(tmp_path)
    model.model.rotary_emb.cos_sin_cache.copy_(model.model.rotary_emb.cos_sin_cache.roll(1, dims=1))
    model.model.rotary_emb.cos_sin_cache[:, 7] = 0.5
    prompt = list(range(3, 40))
    (logits,) = run_chunks(model, [prompt], [37], 16)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    assert (logits - expected).abs().max() > 1e-2


def config_with(**fields: object) -> ModelConfig:
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    return ModelConfig(model="m", hf_config=hf | fields)


@pytest.mark.badinput
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"sliding_window": 32}, "sliding_window=32 is below max_model_len=64"),
        ({"num_key_value_heads": 3, "num_attention_heads": 4}, "no multiple of num_key_value_heads=3"),
        ({"intermediate_size": 0}, "intermediate_size=0"),
    ],
)
def test_unsupported_config_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_model_config(config_with(**fields))


def test_sliding_window_as_long_as_the_context_is_full_attention() -> None:
    assert DecoderConfig.from_model_config(config_with(sliding_window=64)).head_size == 4
    assert DecoderConfig.from_model_config(config_with(sliding_window=8, use_sliding_window=False)).num_layers == 1


@pytest.mark.badinput
def test_unknown_architecture_lists_the_supported_ones() -> None:
    with pytest.raises(ValueError, match=r"'GPT2LMHeadModel'.*LlamaForCausalLM, MistralForCausalLM, Qwen2"):
        get_model_class("GPT2LMHeadModel")


@pytest.mark.badinput
@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type='dynamic' is not supported; supported: default"),
        ({"type": "yarn", "factor": 2.0}, "rope_type='yarn'"),
        ({"rope_type": "linear"}, "factor=None"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor=None"),
    ],
)
def test_unsupported_rope_is_refused(scaling: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_inv_freq(8, 10000.0, scaling)


def test_rope_frequency_factors_divide() -> None:
    """GGUF files of Llama 3.x carry divisors in place of the scaling's parameters."""
    plain = compute_inv_freq(8, 10000.0, None)
    torch.testing.assert_close(
        compute_inv_freq(8, 10000.0, None, [1.0, 2.0, 4.0, 8.0]), plain / torch.tensor([1.0, 2, 4, 8])
    )
