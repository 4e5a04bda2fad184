"""Quantized tiny models through the whole engine: the same greedy tokens as the model with dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm import LLM, SamplingParams
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.layers.quantization import gptq_cpu
from folovllm.model_executor.layers.quantization.gptq import GPTQLinearMethod
from tests.gptq_checkpoints import VOCAB_SIZE, Settings, edit_tensors, save_checkpoints

CASES: dict[str, tuple[str, Settings, bool]] = {
    "llama": ("llama", Settings(), False),
    "llama, asymmetric, format 2": ("llama", Settings(sym=False, checkpoint_format="gptq_v2"), False),
    "llama, act-order of its own in each part": ("llama", Settings(desc_act=True), False),
    "llama, act-order, asymmetric": ("llama-biases", Settings(desc_act=True, sym=False, group_size=64), True),
    "llama, tied, 8 bits": ("llama-tied", Settings(8, 64, scale_dtype=torch.bfloat16), False),
    "qwen2": ("qwen2", Settings(group_size=128, desc_act=True, sym=False), False),
    "qwen3": ("qwen3", Settings(group_size=-1), False),
    "qwen3, 8 bits, act-order": ("qwen3", Settings(8, 32, desc_act=True, checkpoint_format="gptq_v2"), True),
}


def prompts() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    lengths = (1, 7, 70, 33)  # 70: more rows than torch's kernel is used for
    return [{"prompt_token_ids": torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist()} for n in lengths]


def generate(folder: Path, dtype: str = "float32", **options: Any) -> list[list[int]]:
    llm = LLM(
        str(folder), dtype=dtype, device="cpu", skip_tokenizer_init=True, use_tqdm_on_load=False,
        num_gpu_blocks_override=64, **options,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    outputs = llm.generate(prompts(), params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_the_dequantized_model(tmp_path: Path, case: str, async_scheduling: bool) -> None:
    name, settings, same_order = CASES[case]
    save_checkpoints(tmp_path, name, settings, same_order)
    options = {"async_scheduling": async_scheduling, "quantization": "auto"}
    expected = generate(tmp_path / "plain", **options)
    assert generate(tmp_path / "quantized", **options) == expected
    # Chunks of the long prompt, beside decodes of the others.
    assert generate(tmp_path / "quantized", max_num_batched_tokens=16, max_num_seqs=2, **options) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(expected)  # the prompts do differ


def test_blocks_alone_give_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch has no int4 kernel."""
    save_checkpoints(tmp_path, "llama", Settings(desc_act=True))
    expected = generate(tmp_path / "plain")
    monkeypatch.setattr(gptq_cpu, "kernel_fits", lambda values, scales: False)
    assert generate(tmp_path / "quantized") == expected


def test_a_wrong_integer_changes_the_tokens(tmp_path: Path) -> None:
    """The comparison above can fail."""
    save_checkpoints(tmp_path, "llama", Settings())
    expected = generate(tmp_path / "plain")
    edit_tensors(tmp_path / "quantized", **{"model.layers.0.mlp.up_proj.qweight": torch.zeros(16, 256).int()})
    assert generate(tmp_path / "quantized") != expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(tmp_path: Path, dtype: str) -> None:
    """16-bit models run all layers packed; logits, not tokens, are compared: ties fall either way."""
    save_checkpoints(tmp_path, "qwen2", Settings(desc_act=True, sym=False))
    logprobs = []
    for folder in ("plain", "quantized"):
        llm = LLM(
            str(tmp_path / folder), dtype=dtype, device="cpu", skip_tokenizer_init=True, use_tqdm_on_load=False,
            num_gpu_blocks_override=64, max_logprobs=-1,
        )  # fmt: skip
        if folder == "quantized":
            model = llm.llm_engine.executor.worker.model_runner.model
            layers = [module for module in model.modules() if isinstance(module, LinearBase)]
            assert layers and all(isinstance(layer.quant_method, GPTQLinearMethod) for layer in layers)
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=VOCAB_SIZE)
        outputs = llm.generate(prompts(), params, use_tqdm=False)
        rows = [[output.outputs[0].logprobs[0][i].logprob for i in range(VOCAB_SIZE)] for output in outputs]
        logprobs.append(torch.tensor(rows))
    spread = logprobs[0].std()
    assert (logprobs[0] - logprobs[1]).abs().max() < 0.15 * spread
