"""Structured output: answers that a JSON schema, a choice, a regular expression or a grammar allows, and no others.

    python examples/structured_output.py                                    # starts a server of its own for a while
    python examples/structured_output.py --base-url http://127.0.0.1:8000   # or uses one that runs

Needs `pip install "folovllm[server]" openai`.
"""

from __future__ import annotations

import argparse
import contextlib
import json

import openai

from folovllm.entrypoints.openai.local_server import LocalServer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "legs": {"type": "integer", "minimum": 0, "maximum": 8},
        "sounds": {"type": "array", "items": {"type": "string", "maxLength": 10}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "legs", "sounds"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= verb " the " noun\nverb ::= "open" | "close"\nnoun ::= "door" | "window"'


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", help="a running server (default: start one)")
    parser.add_argument("--api-key", default="none", help="if that server asks for one")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = args.base_url or stack.enter_context(LocalServer(["smollm2-135m-instruct", "--max-num-seqs", "8"])).url
        tour(openai.OpenAI(base_url=f"{url}/v1", api_key=args.api_key))


def tour(client: openai.OpenAI) -> None:
    """One constraint after another."""
    model = client.models.list().data[0].id

    def ask(question: str, **fields: object) -> str:
        messages = [{"role": "user", "content": question}]
        options = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 100}
        answer = client.chat.completions.create(**options, **fields)
        # Cut by max_tokens, JSON is not complete: always look.
        assert answer.choices[0].finish_reason == "stop", answer.choices[0].finish_reason
        return answer.choices[0].message.content

    response_format = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
    text = ask("Describe a dog as JSON.", response_format=response_format)
    print("JSON schema: ", json.loads(text))

    constraints = {
        "choice": ("Is the sky blue or green?", ["blue", "green"]),
        "regex": ("When was the Eiffel Tower completed?", r"In (18|19)\d\d\."),
        "grammar": ("It is cold. What should I do?", GRAMMAR),
    }
    for name, (question, constraint) in constraints.items():
        text = ask(question, extra_body={"structured_outputs": {name: constraint}})
        print(f"{name + ':':13} {question} {text}")

    try:
        ask("x", extra_body={"structured_outputs": {"regex": "("}})
    except openai.BadRequestError as error:
        print("refused:     ", error.body["message"])


if __name__ == "__main__":
    main()
