"""The official `openai` client, talking to `folovllm serve`: completions, a streamed chat, samples, log probabilities.

    python examples/openai_client.py                                    # starts a server of its own for a while
    python examples/openai_client.py --base-url http://127.0.0.1:8000   # or uses one that runs

Needs `pip install "folovllm[server]" openai`.
"""

from __future__ import annotations

import argparse
import contextlib
import math

import openai

from folovllm.entrypoints.openai.local_server import LocalServer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", help="a running server (default: start one)")
    parser.add_argument("--api-key", default="none", help="if that server asks for one")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = args.base_url or stack.enter_context(LocalServer(["smollm2-135m-instruct", "--max-num-seqs", "8"])).url
        tour(openai.OpenAI(base_url=f"{url}/v1", api_key=args.api_key))


def tour(client: openai.OpenAI) -> None:
    """Show the API, call by call."""
    model = client.models.list().data[0].id
    print("model:", model)

    completion = client.completions.create(model=model, prompt="The sea is", max_tokens=12, temperature=0)
    print(f"completion: The sea is{completion.choices[0].text}")

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    print("streamed chat: ", end="")
    stream = client.chat.completions.create(
        model=model, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    for event in stream:
        if event.choices:
            print(event.choices[0].delta.content or "", end="", flush=True)
        if event.usage is not None:
            print(f"  ({event.usage.prompt_tokens} + {event.usage.completion_tokens} tokens)")

    # Several samples share the prompt's KV cache; a seed makes them come again.
    names = [{"role": "user", "content": "Invent a name for a cat. Only the name."}]
    samples = client.chat.completions.create(model=model, messages=names, n=3, seed=7, temperature=1.0, max_tokens=8)
    print("three samples:", [choice.message.content for choice in samples.choices])
    print("  cached prompt tokens:", samples.usage.prompt_tokens_details.cached_tokens)

    answer = client.chat.completions.create(
        model=model, messages=messages, max_tokens=1, temperature=0, logprobs=True, top_logprobs=3
    )
    best = answer.choices[0].logprobs.content[0].top_logprobs
    print("first token:", ", ".join(f"{token.token!r} {math.exp(token.logprob):.2f}" for token in best))

    # What OpenAI's API does not have goes into extra_body, as with vLLM.
    extra = {"top_k": 5, "repetition_penalty": 1.1, "min_tokens": 4}
    again = client.completions.create(model=model, prompt="The sea is", max_tokens=12, seed=1, extra_body=extra)
    print(f"with top_k and a penalty: The sea is{again.choices[0].text}")

    try:
        client.completions.create(model=model, prompt="x", temperature=-1)
    except openai.BadRequestError as error:
        print("refused:", error.body["param"], "-", error.body["message"])


if __name__ == "__main__":
    main()
