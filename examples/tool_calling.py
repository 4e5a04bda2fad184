"""Tool calling: the model asks for a function, the program runs it, the model gets the result.

    python examples/tool_calling.py                                    # starts a server of its own for a while
    python examples/tool_calling.py --base-url http://127.0.0.1:8000   # or uses one that runs

The built-in model is too small to decide well and its template knows no tools, so the call is required and the tools
are described in the prompt. Qwen2.5 and Qwen3 know the format: there leave out both, and use tool_choice="auto".
Needs `pip install "folovllm[server]" openai`.
"""

from __future__ import annotations

import argparse
import contextlib
import json

import openai

from folovllm.entrypoints.openai.local_server import LocalServer

TEMPERATURES = {"Paris": 18, "Oslo": 7}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_temperature",
            "description": "The temperature of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Paris", "Oslo", "Rome"]},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    }
]


def get_temperature(city: str, unit: str) -> str:
    """The function that the model may call."""
    if city not in TEMPERATURES:
        return f"no measurement for {city}"
    celsius = TEMPERATURES[city]
    return f"{celsius} degrees" if unit == "celsius" else f"{celsius * 9 // 5 + 32} degrees Fahrenheit"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", help="a running server (default: start one)")
    parser.add_argument("--api-key", default="none", help="if that server asks for one")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = args.base_url or stack.enter_context(LocalServer(["smollm2-135m-instruct", "--max-num-seqs", "8"])).url
        tour(openai.OpenAI(base_url=f"{url}/v1", api_key=args.api_key))


def tour(client: openai.OpenAI) -> None:
    """A round trip, then the same call as a stream."""
    model = client.models.list().data[0].id
    messages = [
        {"role": "system", "content": f"You can call these functions: {json.dumps(TOOLS)}"},
        {"role": "user", "content": "How warm is it in Paris, in celsius?"},
    ]
    options = {"model": model, "temperature": 0, "max_tokens": 64}
    answer = client.chat.completions.create(messages=messages, tools=TOOLS, tool_choice="required", **options)
    message = answer.choices[0].message
    print("finish_reason:", answer.choices[0].finish_reason)
    messages.append(message.model_dump(exclude_none=True))
    for call in message.tool_calls:
        result = get_temperature(**json.loads(call.function.arguments))
        print(f"{call.function.name}({call.function.arguments}) = {result}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    # This model's template has no place for tool messages of its own: it reads the result as text.
    print("answer:", client.chat.completions.create(messages=messages, **options).choices[0].message.content)

    named = {"type": "function", "function": {"name": "get_temperature"}}
    stream = client.chat.completions.create(
        messages=messages[:2], tools=TOOLS, tool_choice=named, stream=True, **options
    )
    print("streamed:", end=" ")
    for event in stream:
        for delta in event.choices[0].delta.tool_calls or []:
            print(delta.function.name or "", delta.function.arguments or "", end="")
    print()


if __name__ == "__main__":
    main()
