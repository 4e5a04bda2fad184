"""Chunked prefill: a long prompt is computed piece by piece, and whoever is generating hardly notices.

    python examples/chunked_prefill.py [MODEL]

One request streams while a prompt of 600 tokens arrives. What it waits for between two tokens depends on how
much of a step the newcomer may take: max_num_batched_tokens bounds a step, long_prefill_token_threshold one prompt.
"""

from __future__ import annotations

import sys
import time

from folovllm import LLM, SamplingParams

LONG_PROMPT = {"prompt_token_ids": [1000 + i % 7000 for i in range(600)]}


def gaps_while_a_long_prompt_arrives(llm: LLM) -> tuple[list[float], float]:
    """Return the milliseconds between a stream's tokens, and those until the newcomer's first token."""
    engine = llm.llm_engine
    engine.add_request("stream", "Once upon a time", SamplingParams(temperature=0, max_tokens=32, ignore_eos=True))
    gaps: list[float] = []
    arrival = first_token = last = 0.0
    while engine.has_unfinished_requests():
        if len(gaps) == 10 and not arrival:
            arrival = time.perf_counter()
            engine.add_request("long", LONG_PROMPT, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        for output in engine.step():
            now = time.perf_counter()
            if output.request_id == "stream":
                gaps.append((now - (last or now)) * 1000)
                last = now
            else:
                first_token = now
    return gaps[1:], (first_token - arrival) * 1000


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
    print(f"{'tokens of a step':>18} {'median gap':>12} {'longest gap':>12} {'long prompt waits':>18}")
    for budget in (1024, 64):
        llm = LLM(
            model,
            max_model_len=1024,
            max_num_batched_tokens=budget,
            max_num_seqs=8,
            kv_cache_memory_bytes=1 << 27,
            enable_prefix_caching=False,
            use_tqdm_on_load=False,
        )
        llm.generate("Warm up", SamplingParams(max_tokens=2), use_tqdm=False)
        gaps, wait = gaps_while_a_long_prompt_arrives(llm)
        median, longest = sorted(gaps)[len(gaps) // 2], max(gaps)
        print(f"{budget:>18} {median:>9.1f} ms {longest:>9.1f} ms {wait:>15.0f} ms")
        llm.llm_engine.shutdown()
    print("Smaller chunks: shorter gaps for those who run.")


if __name__ == "__main__":
    main()
