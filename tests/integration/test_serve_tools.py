"""Tool calls through the whole server, with a model that writes them: the official client's round trip, both modes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import openai

from folovllm.entrypoints.openai.local_server import LocalServer
from tests.scripted_server import SCRIPT
from tests.serve_utils import save_tiny_chat_model

ROOT = Path(__file__).resolve().parents[2]
CALLS = """Let me see.
<tool_call>
{"name": "find_city", "arguments": {"city": "K\u00f6ln", "size": 2}}
</tool_call>
<tool_call>
{"name": "stop_now", "arguments": {}}
</tool_call>"""
MESSAGES: list[Any] = [{"role": "user", "content": "Find it."}]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("find_city", "stop_now")
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    model = save_tiny_chat_model(tmp_path_factory.mktemp("model"))
    command = [sys.executable, "-m", "tests.scripted_server", "serve"]
    env = {SCRIPT: CALLS, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    args = [str(model), "--served-model-name", "tiny", "--device", "cpu", "--num-gpu-blocks-override", "400"]
    with (
        LocalServer(args, env, command=command) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client
        assert "Traceback" not in server.log()


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, "tools": TOOLS, **fields})


def test_round_trip(client: openai.OpenAI) -> None:
    choice = ask(client).choices[0]
    assert choice.finish_reason == "tool_calls"
    message = choice.message
    assert message.content == "Let me see."
    assert [call.function.name for call in message.tool_calls] == ["find_city", "stop_now"]
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "K\u00f6ln", "size": 2}
    assert len({call.id for call in message.tool_calls}) == 2
    answered = [*MESSAGES, message.model_dump(exclude_none=True)]
    answered += [{"role": "tool", "tool_call_id": call.id, "content": "found"} for call in message.tool_calls]
    again = ask(client, messages=answered)
    assert again.usage.prompt_tokens > len(CALLS) - 50  # a token is a byte: the calls are in the prompt
    assert again.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("n", [1, 2])
def test_streamed(client: openai.OpenAI, n: int) -> None:
    content, reasons = [""] * n, [""] * n
    calls: list[dict[int, list[str]]] = [{} for _ in range(n)]
    ids = set()
    for event in ask(client, stream=True, n=n):
        for choice in event.choices:
            content[choice.index] += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                name, arguments = calls[choice.index].setdefault(call.index, ["", ""])
                name, arguments = name + (call.function.name or ""), arguments + (call.function.arguments or "")
                calls[choice.index][call.index] = [name, arguments]
                ids |= {call.id} - {None}
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert content == ["Let me see."] * n and reasons == ["tool_calls"] * n
    assert calls == [{0: ["find_city", '{"city": "K\u00f6ln", "size": 2}'], 1: ["stop_now", "{}"]}] * n
    assert len(ids) == 2 * n


def test_without_tools_it_is_text(client: openai.OpenAI) -> None:
    for fields in ({"tool_choice": "none"}, {"tools": openai.NOT_GIVEN}):
        choice = ask(client, **fields).choices[0]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALLS, None, "stop")


def test_a_call_that_is_cut_is_text(client: openai.OpenAI) -> None:
    choice = ask(client, max_tokens=60).choices[0]
    assert choice.finish_reason == "length" and not choice.message.tool_calls
    assert choice.message.content == CALLS.encode()[:60].decode()


def test_continuous_usage(client: openai.OpenAI) -> None:
    """vLLM's option, which load generators set: the counts so far in every event."""
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    events = list(ask(client, stream=True, max_tokens=5, tool_choice="none", stream_options=options))
    counts = [event.usage.completion_tokens for event in events]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 5
    assert events[-1].choices == [] and all(event.usage.prompt_tokens == counts_of(events) for event in events)


def counts_of(events: list[Any]) -> int:
    return int(events[-1].usage.prompt_tokens)
