"""What the server costs, with a model that is free: tokens per second streamed, milliseconds added to a token.

    python tests/benchmark/server_overhead.py [--streams 100] [--tokens 256] [--json out.json]

Real are HTTP, the scheduler, SmolLM2's tokenizer, detokenization, both processes and their sockets. The client runs on
the same cores; its CPU time is shown apart. Three questions:

- paced: steps take so long that `--streams` streams ask for about 6,700 tokens per second. Does every token get an
  event of its own? If the server were too slow, outputs would be merged, and there would be fewer events than tokens.
- free: steps take no time. How much passes at most?
- latency: a step takes 5 ms, ten streams. How long after the end of its step does a token reach the client, and how
  long after it an LLMEngine in the same process has its text?
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import aiohttp  # noqa: E402

from folovllm.benchmarks.serve import send_all  # noqa: E402
from folovllm.benchmarks.serve_client import COMPLETIONS_ENDPOINT, ServeClient, ServeRequest  # noqa: E402
from folovllm.entrypoints.openai.local_server import LocalServer  # noqa: E402
from tests.benchmark.async_engine import make_args, run_sync, step_ms  # noqa: E402
from tests.benchmark.async_engine_worker import STEP_MS  # noqa: E402
from tests.benchmark.server_worker import FIRST_TOKEN, MAX_STEPS, TIMES  # noqa: E402
from tests.serve_utils import children_of  # noqa: E402

MODEL = "smollm2-135m-instruct"
LATENCY_STREAMS = 10
LATENCY_TOKENS = 200
LATENCY_STEP_MS = 5.0
PACED_TOKENS_PER_S = 6700.0
PROMPT_LEN = 32
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def start(streams: int, ms: float, times: str | None = None) -> LocalServer:
    """Return a server, not started, whose steps take `ms` milliseconds."""
    args = ["serve", MODEL, "--max-num-seqs", str(streams), "--max-num-batched-tokens", "8192"]
    args += ["--max-model-len", "2048", "--num-gpu-blocks-override", str(streams * 40), "--disable-access-log"]
    env = {STEP_MS: str(ms), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | ({TIMES: times} if times else {})
    return LocalServer(args, env, command=[sys.executable, "-m", "tests.benchmark.server_worker"])


def make_requests(streams: int, tokens: int) -> list[ServeRequest]:
    """Return requests of which no two share a block."""
    return [ServeRequest([500 + i, *range(1000, 999 + PROMPT_LEN)], tokens) for i in range(streams)]


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def measure_throughput(streams: int, tokens: int, ms: float) -> dict[str, float]:
    """Stream `tokens` tokens to each of `streams` connections at once, after a round that is not counted."""
    with start(streams, ms) as server:
        pids = {"server": server.process.pid, "engine": children_of(server.process.pid)[0]}

        async def run() -> dict[str, float]:
            body = {"ignore_eos": True, "temperature": 0}
            async with ServeClient(server.url, COMPLETIONS_ENDPOINT, MODEL, extra_body=body) as client:
                await send_all(client, make_requests(streams, 16), [0.0] * streams, None)
                cpu = {name: cpu_seconds(pid) for name, pid in pids.items()}
                own, begin = time.process_time(), time.perf_counter()
                records = await send_all(client, make_requests(streams, tokens), [0.0] * streams, None)
                seconds = time.perf_counter() - begin
                own = time.process_time() - own
            failed = [record.error for record in records if record.error]
            assert not failed, failed[:3]
            count = sum(record.num_tokens for record in records)
            assert count == streams * tokens
            itls = sorted(gap for record in records for gap in record.itls_s)
            return {
                "tokens/s": count / seconds,
                "events per token": sum(len(record.event_times) for record in records) / count,
                **{f"{n} CPU us/token": (cpu_seconds(pid) - cpu[n]) / count * 1e6 for n, pid in pids.items()},
                "client CPU us/token": own / count * 1e6,
                "ITL p50 ms": statistics.median(itls) * 1e3,
                "ITL p99 ms": itls[int(0.99 * len(itls))] * 1e3,
            }

        return asyncio.run(run())


async def read_delays(session: aiohttp.ClientSession, url: str, body: dict[str, Any], times: str) -> list[float]:
    """Return, for each token of a stream, the seconds from the end of its step until it was here."""
    arrivals: list[tuple[int, float]] = []
    async with session.post(url, json=body) as response:
        assert response.status == 200, await response.text()
        rest = b""
        async for data in response.content.iter_any():
            now = time.monotonic()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        arrivals += [(token, now) for token in choice["token_ids"]]
    stamps = struct.unpack(f"<{MAX_STEPS}d", Path(times).read_bytes())
    return [now - stamps[token - FIRST_TOKEN] for token, now in arrivals]


def measure_latency(streams: int, tokens: int, ms: float) -> list[float]:
    """Return the delays of all tokens of `streams` streams, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        times = str(Path(folder) / "times")
        Path(times).write_bytes(b"\0" * 8 * MAX_STEPS)
        with start(streams, ms, times) as server:

            async def run() -> list[float]:
                async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                    found: list[float] = []
                    for count in (16, tokens):  # the first is not counted
                        bodies = [
                            {"prompt": request.prompt, "max_tokens": count, "stream": True, "ignore_eos": True}
                            | {"return_token_ids": True, "temperature": 0}
                            for request in make_requests(streams, count)
                        ]
                        url = server.url + COMPLETIONS_ENDPOINT
                        results = await asyncio.gather(*(read_delays(session, url, body, times) for body in bodies))
                        found = [delay for result in results for delay in result]
                    return found

            return asyncio.run(run())


def main() -> None:
    """Measure, print a table, and write it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, dict[str, float]] = {
        "paced": measure_throughput(options.streams, options.tokens, options.streams / PACED_TOKENS_PER_S * 1e3),
        "free": measure_throughput(options.streams, options.tokens, 0.0),
    }
    delays = sorted(measure_latency(LATENCY_STREAMS, LATENCY_TOKENS, LATENCY_STEP_MS))
    with step_ms(LATENCY_STEP_MS):
        tokenizer = make_args(1).resolve_model_source().tokenizer()
        own = run_sync(LATENCY_STREAMS, LATENCY_TOKENS, tokenizer)["delay p50 ms"]
    results["latency"] = {
        "tokens": len(delays),
        "delay p50 ms": statistics.median(delays) * 1e3,
        "delay p99 ms": delays[int(0.99 * len(delays))] * 1e3,
        "LLMEngine's p50 ms": own,
        "added p50 ms": statistics.median(delays) * 1e3 - own,
    }
    for name, row in results.items():
        print(f"{name:<8}", "  ".join(f"{key} {value:.2f}" for key, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
