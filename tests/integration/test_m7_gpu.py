"""GPTQ on a CUDA device: tokens of the dequantized weights, graphs that change nothing, and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm import LLM, SamplingParams
from folovllm.engine.arg_utils import EngineArgs
from folovllm.model_executor.layers.linear import MergedColumnParallelLinear
from folovllm.model_executor.layers.quantization.gptq import GPTQConfig
from folovllm.model_executor.model_loader.build import default_dtype
from folovllm.model_executor.model_loader.weight_utils import initialize_dummy_weights
from folovllm.quantize import pipeline
from folovllm.quantize.pipeline import Calibration, quantize_model
from folovllm.quantize.spec import QuantizationSpec
from tests import gptq_checkpoints, tiny_models
from tests.gptq_checkpoints import VOCAB_SIZE, Settings, save_checkpoints
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.gpu

CASES: dict[str, tuple[str, Settings, bool]] = {
    "llama": ("llama", Settings(), False),
    "llama with biases, asymmetric": ("llama-biases", Settings(sym=False, group_size=64), False),
    "act-order, q, k, v in one piece": ("qwen2", Settings(desc_act=True, sym=False), True),
    "act-order of its own in each part": ("llama", Settings(desc_act=True), False),
    "qwen3": ("qwen3", Settings(group_size=128), False),
    "8 bits": ("qwen3", Settings(8, 64), False),
}
LENGTHS = (1, 7, 40, 33, 300)  # 300: dequantized as a whole
NUM_TOKENS = 8


def make_llm(folder: Path, dtype: str, **options: Any) -> LLM:
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 1 << 24, **options}
    options |= {"max_logprobs": -1, "use_tqdm_on_load": False}
    return LLM(str(folder), dtype=dtype, device="cuda", skip_tokenizer_init=True, **options)


def run(llm: LLM, lengths: tuple[int, ...] = LENGTHS) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Return the greedy tokens of some prompts, and the log probabilities [NUM_TOKENS, V] that they were taken by."""
    generator = torch.Generator().manual_seed(1)
    prompts: list[Any] = [
        {"prompt_token_ids": torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist()} for n in lengths
    ]
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=VOCAB_SIZE)
    samples = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    rows = [[[step[i].logprob for i in range(VOCAB_SIZE)] for step in sample.logprobs or []] for sample in samples]
    return [list(sample.token_ids) for sample in samples], [torch.tensor(row) for row in rows]


@pytest.fixture(autouse=True)
def long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    monkeypatch.setitem(gptq_checkpoints._COMMON, "max_position_embeddings", 512)


@pytest.mark.parametrize("case", CASES)
def test_float32_tokens_are_those_of_the_dequantized_model(tmp_path: Path, case: str) -> None:
    save_checkpoints(tmp_path, *CASES[case])
    expected, _ = run(make_llm(tmp_path / "plain", "float32"))
    assert run(make_llm(tmp_path / "quantized", "float32"))[0] == expected
    assert len({tuple(tokens) for tokens in expected}) > 1


@pytest.mark.parametrize("together", [True, False], ids=["batch", "one by one"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_sixteen_bits_are_near_the_dequantized_model(tmp_path: Path, case: str, dtype: str, together: bool) -> None:
    """Single rows, a few and many, recorded and not: compared for as long as ties have not parted the texts."""
    save_checkpoints(tmp_path, *CASES[case])
    batches: list[tuple[int, ...]] = [LENGTHS] if together else [(n,) for n in LENGTHS]
    plain, quantized = make_llm(tmp_path / "plain", dtype), make_llm(tmp_path / "quantized", dtype)
    compared = 0
    for lengths in batches:
        expected_tokens, expected = run(plain, lengths)
        tokens, logprobs = run(quantized, lengths)
        for i in range(len(lengths)):
            same = next((j for j in range(NUM_TOKENS) if tokens[i][j] != expected_tokens[i][j]), NUM_TOKENS - 1) + 1
            spread, off = expected[i].std(), (logprobs[i][:same] - expected[i][:same]).abs()
            assert off.max() < 0.3 * spread
            assert off.mean() < 0.06 * spread
            compared += same
    assert compared >= 0.6 * len(LENGTHS) * NUM_TOKENS


@pytest.mark.parametrize("case", ["llama", "act-order, q, k, v in one piece"])
def test_recorded_steps_equal_eager_ones(tmp_path: Path, case: str) -> None:
    save_checkpoints(tmp_path, *CASES[case])
    recorded = run(make_llm(tmp_path / "quantized", "bfloat16", cuda_graph_sizes=[1, 2, 5, 8]))
    eager = run(make_llm(tmp_path / "quantized", "bfloat16", enforce_eager=True))
    assert recorded[0] == eager[0]


def test_a_layer_takes_a_quarter_of_the_memory() -> None:
    """As the allocator counts it, after the checkpoint's tensors are gone: at most 0.30 of bfloat16."""
    before = torch.cuda.memory_allocated()
    with default_dtype(torch.bfloat16), torch.device("cuda"):
        config = GPTQConfig(bits=4, group_size=128)
        layer = MergedColumnParallelLinear(4096, [4096, 4096], quant_config=config, prefix="gate_up_proj")
    initialize_dummy_weights(layer)
    layer.quant_method.process_weights_after_loading(layer)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= 0.30 * 2 * 4096 * 8192


def test_quantizing_holds_one_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six layers take no more of the device's memory than two."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024}
    for name, value in sizes.items():
        monkeypatch.setitem(tiny_models._COMMON, name, value)
    samples = torch.randint(3, tiny_models.VOCAB_SIZE, (4, 128))
    monkeypatch.setattr(pipeline, "_samples", lambda *args: samples)
    peaks = []
    for num_layers in (2, 2, 6):  # the first is for what libraries keep
        monkeypatch.setitem(tiny_models._COMMON, "num_hidden_layers", num_layers)
        model, output = tmp_path / f"model{len(peaks)}", tmp_path / f"out{len(peaks)}"
        save_tiny_model(model, "llama")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        args = EngineArgs(model=str(model), device="cuda", dtype="bfloat16")
        report = quantize_model(
            args, output, QuantizationSpec(group_size=128), Calibration(seq_len=128), use_tqdm=False
        )
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert len(report.errors) == 4 * num_layers
    layer_bytes = 2 * (4 * 512 * 512 + 3 * 512 * 1024)
    assert abs(peaks[2] - peaks[1]) < 0.1 * layer_bytes
