"""Speed of the plain-torch engine on one GPU: decode steps and a prefill, Qwen3-0.6B shapes, random bfloat16 weights.

    python tests/benchmark/gpu_baseline.py [--json FILE]

The number that later kernels are measured against; random token ids, greedy, end-of-sequence ignored.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from folovllm import LLM, SamplingParams

QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def decode_step_ms(llm: LLM, batch: int, input_len: int, output_len: int) -> float:
    """Median milliseconds of a step in which `batch` requests decode."""
    engine = llm.llm_engine
    generator = torch.Generator().manual_seed(batch)
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    for i in range(batch):
        prompt = torch.randint(0, 150000, (input_len,), generator=generator).tolist()
        engine.add_request(f"{batch}-{i}", {"prompt_token_ids": prompt}, params)
    scheduler = engine.engine_core.engine_core.scheduler
    seconds = []
    while engine.has_unfinished_requests():
        decoding = len(scheduler.running) == batch and all(r.num_output_tokens for r in scheduler.running)
        start = time.perf_counter()
        engine.step()
        torch.cuda.synchronize()
        if decoding:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3


def prefill_ms(llm: LLM, input_len: int) -> float:
    """Median milliseconds to the first token of one prompt."""
    seconds = []
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    for i in range(6):
        prompt = torch.randint(0, 150000, (input_len,), generator=torch.Generator().manual_seed(i)).tolist()
        start = time.perf_counter()
        llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(QWEN3_0_6B))
        llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, max_num_seqs=256, max_num_batched_tokens=4096)
        result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        for batch in (1, 32, 128, 256):
            decode_step_ms(llm, batch, 128, 24)  # warm-up
            result[f"decode step ms, batch {batch}, context 128 to 192"] = round(decode_step_ms(llm, batch, 128, 64), 3)
        result["first token ms, 2048-token prompt"] = round(prefill_ms(llm, 2048), 2)
    for key, value in result.items():
        print(f"{key:50} {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
