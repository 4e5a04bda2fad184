"""What GPTQ is tuned on: token ids, and the activations that a layer run in stages makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.config import ModelConfig
from folovllm.engine.arg_utils import EngineArgs
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.models.llama import STACKED_PARAMS, LlamaModel
from folovllm.model_executor.models.registry import get_model_class
from folovllm.model_executor.models.utils import load_named_weights
from folovllm.quantize import layer as layer_module
from folovllm.quantize.calibration import read_text_file, samples_from_model, samples_from_text
from folovllm.quantize.layer import Hessian, run_layer
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE, make_tiny_model, save_tiny_model

STAGES = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]


class WordTokenizer:
    """One token per word, its number."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens, "samples are cut out of the middle of a text"
        return [int(word) for word in text.split()]


def numbers(count: int) -> str:
    return " ".join(map(str, range(count)))


def test_samples_are_spread_over_the_text_and_do_not_overlap() -> None:
    samples = samples_from_text(numbers(105), WordTokenizer(), 4, 10)
    assert samples.shape == (4, 10) and samples.dtype == torch.int64
    assert samples[:, 0].tolist() == [0, 20, 50, 70]
    assert all(row.tolist() == list(range(row[0], row[0] + 10)) for row in samples)
    assert len(samples.unique()) == 40


def test_a_short_text_gives_fewer_samples() -> None:
    assert samples_from_text(numbers(39), WordTokenizer(), 128, 10)[:, 0].tolist() == [0, 10, 20]


@pytest.mark.badinput
def test_a_text_below_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="has 9 tokens, less than one sequence of seq_len=10"):
        samples_from_text(numbers(9), WordTokenizer(), 1, 10)


@pytest.mark.badinput
def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"calibration=.*absent"):
        read_text_file(str(tmp_path / "absent.txt"), "calibration")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="UTF-8"):
        read_text_file(str(tmp_path / "latin.txt"), "calibration")


def test_the_model_writes_the_same_text_for_the_same_seed(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    args = EngineArgs(model=str(tmp_path), device="cpu", dtype="float32", num_gpu_blocks_override=64)
    special = range(150)
    texts = [samples_from_model(args, 3, 12, seed, special, use_tqdm=False) for seed in (5, 5, 6)]
    assert texts[0].shape == (3, 12) and texts[0].dtype == torch.int64
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert int(torch.stack(texts)[:, :, 0].min()) >= 150, "no text begins with a special token"
    assert int(texts[0].max()) < VOCAB_SIZE
    assert args.max_model_len is None, "the caller's arguments are left alone"


def test_hessian_is_the_mean_outer_product() -> None:
    x = torch.randn(7, 5, 16)
    hessian = Hessian(16, torch.device("cpu"))
    hessian.add(x[:3])
    hessian.add(x[3:])
    rows = x.view(-1, 16)
    torch.testing.assert_close(hessian.mean(), sum(torch.outer(row, row) for row in rows) / 35)


# One layer


def one_layer(name: str) -> tuple[LlamaModel, list[torch.Tensor], torch.Tensor]:
    """Our model with the first layer of a tiny one, and what transformers says goes into it and comes out of it."""
    reference = make_tiny_model(name)
    tokens = torch.randint(0, VOCAB_SIZE, (5, 24))
    with torch.inference_mode():
        states = reference(tokens, output_hidden_states=True).hidden_states
    hf_config = reference.config.to_dict() | {"architectures": [type(reference).__name__], "num_hidden_layers": 1}
    config = ModelConfig(model=name, hf_config=hf_config)
    model = get_model_class(config.architecture)(replace(config, max_model_len=24), TorchNaiveBackend).model
    weights = [(n.removeprefix("model.layers.0."), t) for n, t in reference.state_dict().items() if ".layers.0." in n]
    load_named_weights(model.layers[0], weights, STACKED_PARAMS)
    return model, [state.clone() for state in states], tokens


@pytest.mark.parametrize("chunk_tokens", [48, 4096])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_layer_in_stages_is_the_layer(name: str, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_module, "CHUNK_TOKENS", chunk_tokens)
    model, states, _ = one_layer(name)
    stream = states[0]
    seen = []
    run_layer(model.layers[0], stream, lambda name, module, hessian: seen.append(name))
    assert seen == STAGES
    torch.testing.assert_close(stream, states[1], rtol=1e-4, atol=1e-4)


def test_each_stage_sees_what_the_replaced_ones_before_it_make() -> None:
    """With projections replaced by zeros, everything behind them is known."""
    model, states, _ = one_layer("llama")
    layer, stream = model.layers[0], states[0]
    before = stream.clone()
    hessians: dict[str, torch.Tensor] = {}

    def replace_by_zeros(name: str, module: LinearBase, hessian: torch.Tensor) -> None:
        hessians[name] = hessian
        if name != "mlp.gate_up_proj":
            module.weight.zero_()

    run_layer(layer, stream, replace_by_zeros)
    assert torch.equal(stream, before), "nothing was added"
    assert hessians["self_attn.qkv_proj"].diagonal().min() > 0
    assert not hessians["self_attn.o_proj"].any(), "the values were zero"
    normed = layer.post_attention_layernorm(before).flatten(0, 1)
    torch.testing.assert_close(hessians["mlp.gate_up_proj"], normed.t() @ normed / len(normed))
    inner = layer.mlp.act_fn(normed @ layer.mlp.gate_up_proj.weight.t())
    torch.testing.assert_close(hessians["mlp.down_proj"], inner.t() @ inner / len(inner))
