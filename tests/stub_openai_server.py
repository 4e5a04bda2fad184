"""A server that answers as OpenAI's does, with scripted tokens: what the load generator is tested and measured against.

Plain asyncio, a few microseconds per token, so that whatever is slow is the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stub:
    """What the server does, and what it has seen."""

    delay_s: float = 0.0
    """Seconds before each token."""
    first_delay_s: float = 0.0
    """Seconds before the first one, in addition."""
    tokens_per_chunk: int = 1
    """Tokens in one event."""
    fail_every: int = 0
    """Every so many-th request gets status 500, and every one after that breaks off after two tokens."""
    send_done: bool = True
    """Whether an answer ends with [DONE]."""
    send_usage: bool = True
    """Whether the last event says how many tokens there were."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies."""
    running: int = 0
    """Requests being answered."""
    max_running: int = 0
    """The most at once."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length:")[2].split()[0]) if "content-length:" in head else 0
                body = await reader.readexactly(length)
                if not await self.answer(head.split()[1], body, writer):
                    break
        writer.close()

    async def answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False where the connection is to be dropped."""
        if path.endswith("/models"):
            send(writer, b'{"object": "list", "data": [{"id": "stub", "object": "model"}]}')
            return True
        request = json.loads(body)
        self.requests.append(request)
        number = len(self.requests)
        if self.fail_every and number % self.fail_every == 0:
            send(writer, b'{"error": {"message": "scripted failure"}}', "500 Internal Server Error")
            return True
        self.running += 1
        self.max_running = max(self.running, self.max_running)
        try:
            broken = bool(self.fail_every) and number % self.fail_every == 1 and number > 1
            return await self.stream(request, "chat" in path, writer, broken)
        finally:
            self.running -= 1

    async def stream(self, request: dict[str, Any], chat: bool, writer: asyncio.StreamWriter, broken: bool) -> bool:
        """Send the tokens of one answer; `broken`: drop the connection after two."""
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        num_tokens = request.get("max_completion_tokens") or request["max_tokens"]
        text = "word " * self.tokens_per_chunk
        piece = {"delta": {"content": text}} if chat else {"text": text}
        choice = {"index": 0, "finish_reason": None, **piece}
        event = to_chunk(b"data: " + json.dumps({"id": "x", "model": "stub", "choices": [choice]}).encode() + b"\n\n")
        if chat:
            role = {"id": "x", "model": "stub", "choices": [{"index": 0, "delta": {"role": "assistant"}}]}
            writer.write(to_chunk(b"data: " + json.dumps(role).encode() + b"\n\n"))
        await asyncio.sleep(self.first_delay_s)
        for sent in range(0, num_tokens, self.tokens_per_chunk):
            if broken and sent >= 2:
                return False
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            writer.write(event)
            await writer.drain()
        if self.send_usage:
            usage = {"prompt_tokens": 7, "completion_tokens": num_tokens, "total_tokens": 7 + num_tokens}
            writer.write(to_chunk(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"))
        writer.write((to_chunk(b"data: [DONE]\n\n") if self.send_done else b"") + b"0\r\n\r\n")
        await writer.drain()
        return True


def to_chunk(data: bytes) -> bytes:
    """Frame `data` for chunked transfer encoding."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def send(writer: asyncio.StreamWriter, body: bytes, status: str = "200 OK") -> None:
    """Send a complete answer."""
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


@contextlib.asynccontextmanager
async def serving(stub: Stub) -> AsyncIterator[str]:
    """Serve on a free port of this event loop; gives the base URL."""
    server = await asyncio.start_server(stub.serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def main() -> None:
    """Serve until killed; prints the base URL. Argument: seconds before each token."""
    async with serving(Stub(delay_s=float(sys.argv[1]))) as url:
        print(url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
