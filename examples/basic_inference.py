"""Text in, text out: completion, chat, streaming and log probabilities.

    python examples/basic_inference.py [MODEL]

MODEL is a folder, a .gguf file, a hub id or a built-in name; the default is the small built-in chat model.
"""

from __future__ import annotations

import sys

from folovllm import LLM, RequestOutputKind, SamplingParams


def main() -> None:
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct", max_model_len=2048)

    # Several prompts at once, each with its own parameters. Temperature 0 is greedy.
    prompts = ["The capital of Italy is", "In the year 2050,"]
    params = [SamplingParams(temperature=0, max_tokens=12), SamplingParams(temperature=0.8, seed=7, max_tokens=24)]
    for output in llm.generate(prompts, params, use_tqdm=False):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r} ({output.outputs[0].finish_reason})")

    # A conversation, in the model's own chat format.
    messages = [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ]
    answer = llm.chat(messages, SamplingParams(temperature=0, max_tokens=48), use_tqdm=False)[0].outputs[0]
    print(f"chat -> {answer.text!r}")

    # Log probabilities of the drawn token and of the three best ones.
    output = llm.generate("Two plus two is", SamplingParams(temperature=0, max_tokens=1, logprobs=3), use_tqdm=False)[0]
    for token_id, entry in output.outputs[0].logprobs[0].items():
        print(f"  {entry.decoded_token!r:10} id {token_id:6} rank {entry.rank} logprob {entry.logprob:.3f}")

    # Streaming: the engine's own loop. Each step gives what is new.
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=32, output_kind=RequestOutputKind.DELTA)
    engine.add_request("stream", llm.preprocess_chat(messages), params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            print(output.outputs[0].text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
