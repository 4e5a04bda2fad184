"""Prefix caching: what one request computed, the next one with the same beginning finds in the KV cache.

    python examples/prefix_caching.py [MODEL]

Questions about one long document, a conversation of several turns, and cache_salt, which keeps tenants apart.
"""

from __future__ import annotations

import sys
import time

from folovllm import LLM, SamplingParams
from folovllm.outputs import RequestOutput

DOCUMENT = "\n".join(
    f"Rule {i}: on day {i} of the month the {animal} is fed at {7 + i % 5} o'clock and sleeps in room {i}."
    for i, animal in enumerate(["cat", "dog", "owl", "fox", "hare", "mole", "toad", "newt"] * 3, 1)
)
QUESTIONS = ["When is the owl fed on day 3?", "Who sleeps in room 4?", "Which animals are there?"]


def timed(llm: LLM, prompt: str | dict[str, str], params: SamplingParams) -> tuple[RequestOutput, float]:
    """Return one request's output and its milliseconds."""
    start = time.perf_counter()
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    return output, (time.perf_counter() - start) * 1000


def report(name: str, output: RequestOutput, milliseconds: float) -> None:
    num_tokens = len(output.prompt_token_ids or [])
    print(f"  {name:34} {num_tokens:4} tokens, {output.num_cached_tokens:4} cached, {milliseconds:6.0f} ms")


def main() -> None:
    # enable_prefix_caching=True is the default.
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct", kv_cache_memory_bytes=1 << 28)
    first_token = SamplingParams(temperature=0, max_tokens=1)

    print("One document, several questions: only the first one pays for the document.")
    for question in QUESTIONS:
        report(question, *timed(llm, f"{DOCUMENT}\n\nQuestion: {question}\nAnswer:", first_token))

    print("A conversation: every turn finds all earlier ones, answers included.")
    messages = [{"role": "system", "content": "You answer in one short sentence."}]
    for text in ("Name a large animal.", "What does it eat?", "And where does it live?"):
        messages.append({"role": "user", "content": text})
        output, milliseconds = timed(llm, llm.preprocess_chat(messages), SamplingParams(temperature=0, max_tokens=32))
        report(text, output, milliseconds)
        messages.append({"role": "assistant", "content": output.outputs[0].text})

    print("Salts: whoever has another one cannot tell, not even by the clock, what others have asked.")
    for salt in ("tenant-a", "tenant-a", "tenant-b"):
        report(f"cache_salt={salt!r}", *timed(llm, {"prompt": DOCUMENT, "cache_salt": salt}, first_token))

    print("reset_prefix_cache() forgets everything:", llm.llm_engine.reset_prefix_cache())
    report("the document again", *timed(llm, DOCUMENT, first_token))


if __name__ == "__main__":
    main()
