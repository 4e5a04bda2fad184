"""Continuous batching: requests of all lengths share every step; they join and leave whenever they like.

    python examples/batch_inference.py [MODEL]

The same requests run one at a time and together: the same work, a fraction of the time. Then the engine's own loop,
with requests that arrive while others run, and who was in which step.
"""

from __future__ import annotations

import sys
import time

from folovllm import LLM, SamplingParams
from folovllm.outputs import RequestOutput

PROMPTS = [
    "The capital of Italy is",
    "Water boils at",
    "A haiku about autumn:",
    "The three primary colours are",
    "def reverse(text):",
    "The opposite of hot is",
    "In one sentence, gravity is",
    "Roses are red,",
]


def count_tokens(outputs: list[RequestOutput]) -> int:
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
    # Without prefix caching, so that the second run has nothing to gain from the first.
    llm = LLM(model, max_model_len=1024, kv_cache_memory_bytes=1 << 28, enable_prefix_caching=False)
    params = [SamplingParams(temperature=0, max_tokens=8 + 2 * i, ignore_eos=True) for i in range(len(PROMPTS))]

    start = time.perf_counter()
    alone = [llm.generate(prompt, p, use_tqdm=False)[0] for prompt, p in zip(PROMPTS, params, strict=True)]
    seconds_alone = time.perf_counter() - start

    start = time.perf_counter()
    together = llm.generate(PROMPTS, params, use_tqdm=False)
    seconds_together = time.perf_counter() - start

    for output in together:
        print(f"{output.prompt!r} -> {output.outputs[0].text[:60]!r}")
    for name, outputs, seconds in (("one at a time", alone, seconds_alone), ("together", together, seconds_together)):
        print(
            f"{name:14} {count_tokens(outputs):4} tokens in {seconds:5.2f} s: {count_tokens(outputs) / seconds:6.1f}/s"
        )

    # Iteration-level scheduling: a new request every third step. Nobody waits for a batch to fill or to end.
    print("\nstep by step ('#' a token, '.' waiting or done)")
    engine = llm.llm_engine
    tokens: dict[str, list[int]] = {f"request {i}": [] for i in range(4)}
    timeline = dict.fromkeys(tokens, "")
    arriving = list(tokens)
    step = 0
    while arriving or engine.has_unfinished_requests():
        if arriving and step % 3 == 0:
            name = arriving.pop(0)
            engine.add_request(name, PROMPTS[step // 3], SamplingParams(temperature=0, max_tokens=9 - step // 3))
        got = {output.request_id: list(output.outputs[0].token_ids) for output in engine.step()}
        for name in tokens:
            is_new = name in got and len(got[name]) > len(tokens[name])
            timeline[name] += "#" if is_new else "."
            tokens[name] = got.get(name, tokens[name])
        step += 1
    for name, line in timeline.items():
        print(f"  {name}  {line}")


if __name__ == "__main__":
    main()
