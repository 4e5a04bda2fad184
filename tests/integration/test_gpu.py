"""The engine on a CUDA device: same tokens as transformers on the CPU, memory as configured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from folovllm import LLM, SamplingParams
from tests.integration.test_e2e import CHAT_PROMPTS
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE, reference_greedy, save_tiny_model

pytestmark = pytest.mark.gpu


def random_prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(autouse=True)
def exact_float32_matmul() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("backend", ["paged", "torch_naive"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_cuda_float32_greedy_equals_transformers_on_cpu(name: str, backend: str, tmp_path: Path) -> None:
    reference = save_tiny_model(tmp_path, name)
    llm = LLM(
        str(tmp_path),
        device="cuda",
        dtype="float32",
        skip_tokenizer_init=True,
        attention_backend=backend,
        max_num_seqs=8,
        max_num_batched_tokens=48,
        kv_cache_memory_bytes=1 << 24,
    )
    prompts = random_prompts([1, 7, 16, 100])
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == reference_greedy(reference, prompt, 48)


def test_seeded_samples_are_the_same_on_cuda_and_cpu(tmp_path: Path) -> None:
    """The noise of a draw is a function of (seed, position, token id), whatever the device."""
    save_tiny_model(tmp_path, "llama")
    prompts = [{"prompt_token_ids": p} for p in random_prompts([5, 20, 33])]
    params = [SamplingParams(temperature=1.0, top_p=0.9, seed=i, max_tokens=32, ignore_eos=True) for i in range(3)]
    tokens = []
    for device in ("cuda", "cpu"):
        llm = LLM(
            str(tmp_path), device=device, dtype="float32", skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 24
        )
        tokens.append([list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_kv_cache_fills_gpu_memory_utilization(share: float, tmp_path: Path) -> None:
    """Within 2%, with graphs recorded and after steps of all sizes; other processes must leave the GPU alone."""
    save_tiny_model(tmp_path, "llama")
    torch.cuda.empty_cache()
    llm = LLM(str(tmp_path), device="cuda", skip_tokenizer_init=True, gpu_memory_utilization=share, max_num_seqs=64)
    assert llm.llm_engine.executor.get_startup_info().dtype.startswith("bfloat16")
    prompts = [{"prompt_token_ids": p} for p in random_prompts([100] * 80)]
    llm.generate(prompts, SamplingParams(temperature=0.7, max_tokens=20, ignore_eos=True), use_tqdm=False)
    free, total = torch.cuda.mem_get_info()
    assert (total - free) / total == pytest.approx(share, rel=0.02)


@pytest.mark.network
def test_smollm2_greedy_tokens_are_the_cpus() -> None:
    """Real weights, float32: 8 chat prompts, 64 tokens each, in one batch with graphs, and the CPU's tokens."""
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    tokens = []
    for device in ("cuda", "cpu"):
        llm = LLM(
            "smollm2-135m-instruct",
            device=device,
            dtype="float32",
            use_tqdm_on_load=False,
            max_num_seqs=8,
            max_model_len=1024,
            kv_cache_memory_bytes=1 << 28,
        )
        outputs = llm.chat([[{"role": "user", "content": text}] for text in CHAT_PROMPTS], params, use_tqdm=False)
        tokens.append([list(output.outputs[0].token_ids) for output in outputs])
    assert all(len(t) == 64 for t in tokens[0])
    assert tokens[0] == tokens[1]
