"""Quantization: make a 4-bit GPTQ checkpoint of a model, see what it costs, and run it.

    python examples/quantize_and_run.py [MODEL]

The same in a shell:

    folovllm quantize smollm2-135m-instruct --output smollm2-4bit --group-size 64
    folovllm eval perplexity smollm2-4bit README.md
    folovllm generate --model smollm2-4bit "What is the capital of France?"
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from folovllm import LLM, SamplingParams
from folovllm.engine.arg_utils import EngineArgs
from folovllm.quantize.perplexity import measure_perplexity
from folovllm.quantize.pipeline import Calibration, quantize_model
from folovllm.quantize.spec import QuantizationSpec

QUESTIONS = ["What is the capital of France?", "Name three colours."]
TEXT = """A small boat left the harbour before dawn. The fisherman had rowed this way every morning for thirty years,
and he no longer needed the light of the tower to find the narrow passage between the rocks. When the sun rose he was
already far out, and the village behind him was no more than a white line under the hills."""


def try_out(name: str, model: str) -> None:
    """Print a model's perplexity on TEXT and its answers to QUESTIONS."""
    llm = LLM(model, kv_cache_memory_bytes=1 << 28, use_tqdm_on_load=False)
    token_ids = llm.get_tokenizer().encode(TEXT)
    result = measure_perplexity(llm.llm_engine, token_ids, window=64, stride=32, use_tqdm=False)
    print(f"{name}: perplexity {result.perplexity:.1f} on {result.num_scored_tokens} tokens")
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    for output in llm.chat(conversations, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False):
        print("  ", " ".join(output.outputs[0].text.split()))
    llm.llm_engine.shutdown()


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
    try_out("original", model)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "4bit"
        # 128 would be the usual group size, but does not divide this model's hidden size of 576. So few samples are
        # quick, not good: the default is 128 of 512 tokens.
        spec = QuantizationSpec(bits=4, group_size=64, desc_act=True)
        report = quantize_model(EngineArgs(model=model), output, spec, Calibration(num_samples=8, seq_len=256))
        mean = sum(report.errors.values()) / len(report.errors)
        print(f"quantized in {report.phase_seconds['quantization']:.0f} s, mean relative error {mean:.1e}")
        try_out("4 bits", str(output))


if __name__ == "__main__":
    main()
