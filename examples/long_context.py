"""A long prompt, chunk by chunk: which attention runs, when the first token comes, and what each further one costs.

    python examples/long_context.py [MODEL] [PROMPT_TOKENS]

A prompt of 3,000 tokens is computed 512 at a time, each chunk attending to all before it; then every new token attends
to the whole context. Both kinds of step go through the attention backend that suits the device (docs/learn/04).
"""

from __future__ import annotations

import itertools
import sys
import time

from folovllm import LLM, SamplingParams

CHUNK = 512
NEW_TOKENS = 16


def describe(llm: LLM) -> None:
    """Print the device, and the attention backend with the reason for it."""
    info = llm.llm_engine.engine_core.engine_core.executor.worker.startup_info
    print(f"device     {info.device}, {info.dtype}")
    print(f"attention  {info.attention_backend}")


def run(llm: LLM, prompt_token_ids: list[int]) -> tuple[float, list[float]]:
    """Return the seconds until the first token, and those between one token and the next."""
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    start = time.perf_counter()
    engine.add_request("long", {"prompt_token_ids": prompt_token_ids}, params)
    times: list[float] = []
    while engine.has_unfinished_requests():
        if engine.step():  # a chunk that is not the last returns no token
            times.append(time.perf_counter() - start)
    return times[0], [after - before for before, after in itertools.pairwise(times)]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
    num_tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 3000
    llm = LLM(
        model,
        max_model_len=num_tokens + NEW_TOKENS,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 28,
        use_tqdm_on_load=False,
    )
    describe(llm)
    # The first steps of a process compile, allocate and warm caches: they are not what is measured.
    llm.generate({"prompt_token_ids": list(range(1000, 1000 + CHUNK))}, SamplingParams(max_tokens=4), use_tqdm=False)
    first, gaps = run(llm, [2000 + i % 7000 for i in range(num_tokens)])
    chunks = -(-num_tokens // CHUNK)
    print(f"prompt     {num_tokens} tokens in {chunks} chunks: first token after {first:.2f} s,", end=" ")
    print(f"{num_tokens / first:.0f} tokens/s")
    gap = sorted(gaps)[len(gaps) // 2]
    print(f"decode     {len(gaps)} tokens behind it: {gap * 1000:.1f} ms each, {1 / gap:.1f} tokens/s")
    llm.llm_engine.shutdown()


if __name__ == "__main__":
    main()
