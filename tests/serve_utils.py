"""What the end-to-end tests of the server share: a tiny model that has a tokenizer, and a look at /metrics."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx

from folovllm.entrypoints.openai.local_server import LocalServer
from tests.tiny_models import save_tiny_model

CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}[tool]{{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{{ m.tool_calls | tojson if m.tool_calls else '' }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TINY_ARGS = ["--device", "cpu", "--dtype", "float32", "--num-gpu-blocks-override", "400", "--disable-access-log"]
"""Flags for the tiny model: 6,384 tokens of KV cache."""
TIMEOUT_S = 60.0


def save_tiny_chat_model(path: Path, **config: int) -> Path:
    """Write a random Llama of a hundred thousand parameters, with a tokenizer of single bytes and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=4096
    )
    fast.chat_template = CHAT_TEMPLATE
    save_tiny_model(path, "llama", vocab_size=len(vocab), **{"max_position_embeddings": 4096, **config})
    fast.save_pretrained(path)
    return path


def read_metric(url: str, name: str, **headers: str) -> float:
    """Return the sum of a metric's samples; `name` without the prefix folovllm:, as in the text (with _total)."""
    response = httpx.get(f"{url}/metrics", headers=headers, timeout=TIMEOUT_S)
    response.raise_for_status()
    prefix = f"folovllm:{name}{{"
    values = [float(line.rsplit(" ", 1)[1]) for line in response.text.splitlines() if line.startswith(prefix)]
    assert values, f"/metrics has no {name}"
    return sum(values)


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> float:
    """Wait until `condition` holds; return the seconds that it took, or fail."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"waited {timeout_s:g} s for: {what}"
        time.sleep(0.01)
    return time.monotonic() - start


def is_idle(url: str) -> bool:
    """Whether no request runs or waits, and no block is held."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return all(read_metric(url, name) == 0 for name in names)


def children_of(pid: int) -> list[int]:
    """Return the process ids of a process's children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            state, parent = stat.rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(entry.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether the process exists and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def engine_pid(server: LocalServer) -> int:
    """Return the process id of the server's engine."""
    for pid in children_of(server.process.pid):
        if b"core_proc" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError("the server has no engine process")


def num_open_files(pid: int) -> int:
    """Return how many file descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_bytes(pid: int) -> int:
    """Return a process's resident memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def read_stream(
    client: httpx.AsyncClient, url: str, fields: dict[str, Any], stop_after: int | None = None
) -> str:
    """Return the text of a streamed completion; with `stop_after` go away after so many events.

    Raises:
        RuntimeError: the stream has an error, or breaks off.
    """
    text, count, rest = "", 0, b""
    body = {"model": "tiny", "stream": True, **fields}
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for data in response.aiter_raw():  # not aiter_lines: it splits at more than line feeds
            *parts, rest = (rest + data).split(b"\n\n")
            for part in parts:
                if part == b"data: [DONE]":
                    return text
                event = json.loads(part.removeprefix(b"data: "))
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                text += "".join(choice["text"] for choice in event["choices"])
                count += 1
                if count == stop_after:
                    return text
    raise RuntimeError("the stream broke off")


@contextlib.asynccontextmanager
async def many_connections() -> AsyncIterator[httpx.AsyncClient]:
    """A client without a limit, whose connections are closed after each request."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:
        yield client


def start_tiny_server(model: Path, *args: str) -> LocalServer:
    """Return a server of the tiny model, called "tiny", that is not started yet."""
    return LocalServer([str(model), "--served-model-name", "tiny", *TINY_ARGS, *args], env={"OMP_NUM_THREADS": "1"})


def completion(server: LocalServer, **fields: Any) -> Any:
    """Return a completion as JSON."""
    response = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", **fields}, timeout=TIMEOUT_S)
    assert response.status_code == 200, response.text
    return response.json()
