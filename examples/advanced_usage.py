"""A tour of what a request can ask for: priorities, seeds, log probabilities, cache salts, streaming; the step trace.

    python examples/advanced_usage.py [MODEL]

One engine runs it all, and writes down every step. The last stop reads what it wrote.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

from folovllm import LLM, SamplingParams
from folovllm.sampling_params import RequestOutputKind

STORY = "Once upon a time, in a village by the sea, there lived an old clockmaker who never slept. Every night he"


def seeds(llm: LLM) -> None:
    """A seeded request draws the same tokens alone and in a crowd: randomness is a function of seed and position."""
    seeded = SamplingParams(temperature=1.0, seed=7, max_tokens=8)
    alone = llm.generate(STORY, seeded, use_tqdm=False)[0]
    crowd = [SamplingParams(temperature=1.0, max_tokens=12), seeded, SamplingParams(temperature=0, max_tokens=5)]
    together = llm.generate(["Roses are", STORY, "Two plus two is"], crowd, use_tqdm=False)[1]
    print(f"alone:      {alone.outputs[0].text!r}")
    print(f"in a crowd: {together.outputs[0].text!r}")
    # In bfloat16 the batch can round a logit the other way, and a draw that was very close then changes.
    print(f"the same tokens: {alone.outputs[0].token_ids == together.outputs[0].token_ids}")


def log_probabilities(llm: LLM) -> None:
    """How sure the model is, of its own tokens and of the prompt's."""
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=3, prompt_logprobs=0)
    output = llm.generate("The capital of France is", params, use_tqdm=False)[0]
    sample = output.outputs[0]
    assert sample.logprobs is not None and output.prompt_logprobs is not None
    for candidates in sample.logprobs:
        ranked = sorted(candidates.values(), key=lambda candidate: candidate.rank or 0)
        print("  ".join(f"{c.decoded_token!r} {math.exp(c.logprob):.0%}" for c in ranked))
    surprise = [-next(iter(entry.values())).logprob for entry in output.prompt_logprobs if entry]
    print(f"the prompt's own perplexity: {math.exp(sum(surprise) / len(surprise)):.1f}")


def cache_salts(llm: LLM) -> None:
    """Prompts share cached blocks only under the same salt: nobody can time whether somebody else asked the same.

    Those without a salt share with each other: the story has been told before.
    """
    params = SamplingParams(temperature=0, max_tokens=1)
    tenants = ("alice", "alice", "bob", None)
    for salt in tenants:
        prompt = {"prompt": STORY * 2} | ({"cache_salt": salt} if salt else {})
        output = llm.generate([prompt], params, use_tqdm=False)[0]  # type: ignore[list-item]
        assert output.prompt_token_ids is not None
        print(f"salt {salt!s:5}  {output.num_cached_tokens:2} of {len(output.prompt_token_ids)} tokens were cached")


def priorities(llm: LLM) -> None:
    """Smaller numbers first. Two requests run at a time here, so the others wait for their turn."""
    ranks = [2, 2, 1, 0, 1, 0]
    engine = llm.llm_engine
    for i, rank in enumerate(ranks):
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        engine.add_request(f"{i} (priority {rank})", f"Item {i}:", params, priority=rank)
    done: list[str] = []
    while engine.has_unfinished_requests():
        done += [output.request_id for output in engine.step() if output.finished]
    print("finished in this order: " + ", ".join(done))


def streaming(llm: LLM) -> None:
    """Two answers growing at once. DELTA brings only what is new; text never holds half a character."""
    engine = llm.llm_engine
    for name, prompt in (("sky", "The sky is blue because"), ("sea", "The sea is salty because")):
        params = SamplingParams(temperature=0, max_tokens=8, output_kind=RequestOutputKind.DELTA)
        engine.add_request(name, prompt, params)
    while engine.has_unfinished_requests():
        news = [f"{output.request_id} {output.outputs[0].text!r}" for output in engine.step()]
        print("  |  ".join(news))


def step_trace(path: Path) -> None:
    """What the engine did, from its own record: docs/step_trace.md explains the lines."""
    header, *steps = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [step for step in steps if step["num_tokens"]]
    kinds = [request["kind"] for step in steps for request in step["requests"]]
    hits = sum(len(ids) for step in steps for kind, ids in step["events"] if kind == "hit")
    print(f"{len(steps)} steps with {sum(step['num_tokens'] for step in steps)} tokens", end="; ")
    print(f"{kinds.count('prefill')} prompts or parts of them, {kinds.count('decode')} decodes; {hits} blocks found")
    print(f"{header['config']['num_blocks']} blocks of {header['config']['block_size']} tokens. The last steps:")
    for step in steps[-4:]:
        who = ", ".join(f"{r['id']} {r['kind']} {r['start']}-{r['end']}" for r in step["requests"])
        print(f"  step {step['step']:3}  {step['ms']['execute']:6.1f} ms  {who}")


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        llm = LLM(
            model,
            max_model_len=512,
            max_num_seqs=2,
            kv_cache_memory_bytes=1 << 27,
            scheduling_policy="priority",
            step_trace_path=str(trace),
        )
        for stop in (seeds, log_probabilities, cache_salts, priorities, streaming):
            print(f"\n{stop.__name__.replace('_', ' ')}: {(stop.__doc__ or '').splitlines()[0]}")
            stop(llm)
        llm.llm_engine.shutdown()  # writes what is still in memory
        print(f"\nstep trace: {step_trace.__doc__}")
        step_trace(trace)


if __name__ == "__main__":
    main()
