"""All layers in one call: the results of the same kernels called one by one, and near those of plain modules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from folovllm.attention.backends.paged import PagedBackend
from folovllm.config import ModelConfig
from folovllm.model_executor.layers.attention import Attention
from folovllm.model_executor.layers.quantization import get_quantization_config
from folovllm.model_executor.model_loader.build import get_model
from folovllm.model_executor.model_loader.source import resolve_model_source
from folovllm.model_executor.models.cpu_decoder import CPUDecoder
from folovllm.model_executor.models.llama import LlamaForCausalLM
from folovllm.utils import cpu_kernels
from tests.gptq_checkpoints import Settings, save_checkpoints
from tests.tiny_models import VOCAB_SIZE, save_tiny_model
from tests.unit.test_m1_models import metadata_for

pytestmark = pytest.mark.skipif(
    not (cpu_kernels.available()[0] and cpu_kernels.features() & cpu_kernels.AMX_BF16), reason="needs AMX"
)
BLOCK_SIZE, NUM_BLOCKS = 16, 40


def load(path: Path) -> LlamaForCausalLM:
    source = resolve_model_source(str(path))
    config = ModelConfig(model=str(path), hf_config=source.hf_config())
    quant_config = get_quantization_config(source.hf_config())
    model = get_model(config, source, PagedBackend, quant_config, torch.bfloat16, torch.device("cpu"), use_tqdm=False)
    bind_caches(model)
    return model


def bind_caches(model: LlamaForCausalLM) -> None:
    """One memory for all layers, as the model runner has it."""
    layers = [m for m in model.modules() if isinstance(m, Attention)]
    shape = (NUM_BLOCKS, len(layers), 2, BLOCK_SIZE, layers[0].num_kv_heads, layers[0].head_size)
    memory = torch.full(shape, float("nan"), dtype=torch.bfloat16)
    for i, layer in enumerate(layers):
        layer.kv_cache = memory[:, i].transpose(0, 1)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """More than there are processors, too: members of a team wait for each other without OpenMP's help."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@torch.inference_mode()
def run_steps(model: LlamaForCausalLM, last_alone: bool = False) -> list[torch.Tensor]:
    """Logits of a step of prompts, a mixed one, and one of decodes alone; three requests, or each one's last token."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, VOCAB_SIZE, (3, 160), generator=generator)
    tables = [list(range(12 * b + 12, 12 * b, -1)) for b in range(3)]
    logits = []
    for chunks in ([(0, 1), (0, 37), (0, 150)], [(1, 2), (37, 60), (150, 151)], [(2, 3), (60, 61), (151, 152)]):
        common = metadata_for(chunks, tables, BLOCK_SIZE)
        common.output_rows = common.query_start_loc[1:].long() - 1 if last_alone else None
        metadata = PagedBackend.build_metadata(common, BLOCK_SIZE, torch.bfloat16)
        ids = torch.cat([prompts[b, start:end] for b, (start, end) in enumerate(chunks)])
        positions = torch.cat([torch.arange(start, end) for start, end in chunks])
        logits.append(model.compute_logits(model(ids, positions, metadata)))
    return logits


@pytest.mark.parametrize("name", ["llama", "llama-biases", "llama-mha", "llama3-rope", "qwen2", "qwen3-tied"])
@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
@pytest.mark.usefixtures("threads")
def test_equals_calls_one_by_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path, name, intermediate_size=160, head_dim=32)
    model = load(tmp_path)
    together = run_steps(model)
    assert isinstance(model.model.cpu_decoder, CPUDecoder), "it was taken"
    first = model.model.cpu_decoder
    bind_caches(model)
    again = run_steps(model)
    assert model.model.cpu_decoder is not first, "other caches are other addresses"
    with monkeypatch.context() as patch:
        patch.setattr(CPUDecoder, "run", lambda *args: pytest.fail("not taken"))
        patch.setattr(CPUDecoder, "takes", lambda *args: False)
        bind_caches(model)
        one_by_one = run_steps(model)
    for step, repeated, expected in zip(together, again, one_by_one, strict=True):
        assert torch.equal(step, expected) and torch.equal(repeated, expected)
    model.model.fuse = False
    bind_caches(model)
    for step, expected in zip(together, run_steps(model), strict=True):
        assert (step - expected).norm() < 0.05 * expected.norm(), "other roundings, no other numbers"


@pytest.mark.parametrize("name", ["llama-biases", "qwen3-tied"])
def test_output_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer leaves rows out, in one call as in calls one by one; the others are what they were."""
    save_tiny_model(tmp_path, name, intermediate_size=160, head_dim=32)
    model = load(tmp_path)
    all_rows, together = run_steps(model), run_steps(model, last_alone=True)
    assert isinstance(model.model.cpu_decoder, CPUDecoder), "it was taken"
    monkeypatch.setattr(CPUDecoder, "takes", lambda *args: False)
    one_by_one = run_steps(model, last_alone=True)
    for step, expected, rows in zip(together, one_by_one, ([0, 37, 187], [0, 23, 24], [0, 1, 2]), strict=True):
        assert torch.equal(step, expected)
        whole = all_rows.pop(0)[rows]
        assert (step - whole).norm() < 0.01 * whole.norm(), "other tiles, other roundings"


@pytest.mark.parametrize(
    "config", [{"intermediate_size": 112, "head_dim": 32}, {"intermediate_size": 160, "head_dim": 24}]
)
def test_shapes_without_a_kernel_are_left_alone(config: dict[str, int], tmp_path: Path) -> None:
    """Inner sizes that fill no tile; heads that do not."""
    save_tiny_model(tmp_path, "llama", **config)
    model = load(tmp_path)
    logits = run_steps(model)
    assert model.model.cpu_decoder is None
    model.model.fuse = False
    bind_caches(model)
    for step, expected in zip(logits, run_steps(model), strict=True):
        assert (step - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_weights_of_4_bits(name: str, tmp_path: Path) -> None:
    """GPTQ weights without act-order run in one call, as the model with dequantized weights does, to the bit."""
    save_checkpoints(tmp_path, name, Settings(sym=False, group_size=64, scale_dtype=torch.bfloat16))
    quantized, plain = load(tmp_path / "quantized"), load(tmp_path / "plain")
    for step, expected in zip(run_steps(quantized), run_steps(plain), strict=True):
        assert torch.equal(step, expected)
    assert isinstance(quantized.model.cpu_decoder, CPUDecoder), "it was taken"


def test_inputs_in_another_order_are_left_alone(tmp_path: Path) -> None:
    save_checkpoints(tmp_path, "llama", Settings(desc_act=True, group_size=64), same_order=True)
    quantized, plain = load(tmp_path / "quantized"), load(tmp_path / "plain")
    for step, expected in zip(run_steps(quantized), run_steps(plain), strict=True):
        assert (step - expected).norm() < 0.05 * expected.norm()
    assert quantized.model.cpu_decoder is None
