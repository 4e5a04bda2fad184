"""What the HTTP side costs: tokens per second over many streams, and milliseconds that it adds to a token.

    python -m tests.benchmark.server_overhead_http    # the HTTP side alone

The engine is tests/http_utils.FakeEngine: no model, no scheduler, no other process, no detokenizer. The client is
another process and reads raw bytes, so that it costs little. Throughput: every stream's tokens are always ready.
Latency: each token is stamped when the engine yields it, and again when the client has read its chunk
(`time.monotonic` is one clock for all processes of a machine).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from collections.abc import AsyncGenerator
from typing import Any

from folovllm.engine.processor import PromptType
from folovllm.outputs import CompletionOutput, RequestOutput
from folovllm.sampling_params import SamplingParams
from tests.http_utils import FakeEngine, serve


class StampingEngine(FakeEngine):
    """Yields the time as text, every `interval_s` (0: at once) for as long as the request wants tokens."""

    interval_s = 0.0

    async def generate(
        self, prompt: PromptType, sampling_params: SamplingParams, request_id: str, *, priority: int = 0
    ) -> AsyncGenerator[RequestOutput, None]:
        """See EngineClient."""
        num_tokens = sampling_params.max_tokens or 1
        begin = time.monotonic()
        for i in range(num_tokens):
            await asyncio.sleep(max(0.0, begin + i * self.interval_s - time.monotonic()))
            last = i == num_tokens - 1
            text = f"{time.monotonic():.6f}"
            sample = CompletionOutput(0, text, [5], finish_reason="length" if last else None)
            yield RequestOutput(request_id, None, [5], None, [sample], last, num_cached_tokens=0)


async def one_stream(port: int, path: str, body: dict[str, Any], delays: list[float]) -> int:
    """Read one stream; return the number of chunks with text, append each one's delay in seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    marker = b'"content":"' if "chat" in path else b'"text":"'
    num_chunks = 0
    while block := await reader.read(1 << 16):
        now = time.monotonic()
        for part in block.split(marker)[1:]:
            stamp = part.partition(b'"')[0]
            if stamp:
                num_chunks += 1
                delays.append(now - float(stamp))
    writer.close()
    return num_chunks


def client(port: int, path: str, num_streams: int, num_tokens: int, results: Any) -> None:
    """Process: run the streams at once; put (chunks, seconds, delays)."""

    async def run() -> tuple[int, float, list[float]]:
        body: dict[str, Any] = {"stream": True, "max_tokens": num_tokens}
        body |= {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
        delays: list[float] = []
        begin = time.monotonic()
        chunks = await asyncio.gather(*(one_stream(port, path, body, delays) for _ in range(num_streams)))
        return sum(chunks), time.monotonic() - begin, delays

    results.put(asyncio.run(run()))


def measure(path: str, num_streams: int, num_tokens: int, interval_s: float) -> tuple[int, float, list[float]]:
    """Return (chunks, seconds, delays) of streams against a fresh server."""
    engine = StampingEngine()
    engine.interval_s = interval_s
    context = multiprocessing.get_context("spawn")
    with serve(engine) as server:
        results = context.Queue()
        process = context.Process(target=client, args=(server.port, path, num_streams, num_tokens, results))
        process.start()
        found: tuple[int, float, list[float]] = results.get(timeout=120)
        process.join(20)
    return found


def main() -> None:
    """Print both figures for both endpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400, help="tokens per stream")
    args = parser.parse_args()
    for path in ("/v1/completions", "/v1/chat/completions"):
        chunks, seconds, _ = measure(path, 100, args.tokens, 0.0)
        print(f"{path}: {chunks / seconds:,.0f} tokens/s over 100 streams ({chunks} chunks in {seconds:.2f} s)")
        _, _, delays = measure(path, 10, 200, 0.02)
        delays.sort()
        p50, p99 = statistics.median(delays) * 1e3, delays[int(len(delays) * 0.99)] * 1e3
        print(
            f"{path}: a token takes {p50:.3f} ms (p50), {p99:.3f} ms (p99) to its client at 10 streams of 50 tokens/s"
        )


if __name__ == "__main__":
    main()
