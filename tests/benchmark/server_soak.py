"""Memory, sockets and blocks of a server whose clients come, read slowly, and go away: does anything grow?

    python tests/benchmark/server_soak.py [--seconds 300] [--streams 200] [--json out.json]

`--streams` clients, each of which asks again and again: streams of different lengths, a third of them left in the
middle, some read with pauses, some not streamed. The model is tiny and random, everything else is real. After a fifth
of the time, in which caches and arenas fill, memory is looked at every second; growth is the median of the last tenth
over that of the first tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402

from tests.serve_utils import (  # noqa: E402
    engine_pid,
    is_idle,
    many_connections,
    num_open_files,
    read_metric,
    read_stream,
    resident_bytes,
    save_tiny_chat_model,
    start_tiny_server,
    wait_for,
)

NUM_PROMPTS = 500
"""Different prompts: tokenizers keep the last 10,000 words, and to the tiny model's each prompt is one word."""
WARM_UP = 0.2
"""Share of the time that is not looked at."""
MIB = 1 << 20


@functools.cache
def make_prompts() -> list[str]:
    """Return what clients choose from."""
    generator = random.Random(0)
    return ["".join(generator.choices("abcdefgh ", k=generator.randint(1, 200))) for _ in range(NUM_PROMPTS)]


async def client_loop(client: httpx.AsyncClient, url: str, seed: int, deadline: float, counts: Counter[str]) -> None:
    """One client: ask until the deadline."""
    generator = random.Random(seed)
    prompts = make_prompts()
    while time.monotonic() < deadline:
        fields: dict[str, Any] = {
            "prompt": generator.choice(prompts),
            "max_tokens": generator.randint(1, 100),
            "temperature": generator.choice([0.0, 1.0]),
            "ignore_eos": True,
            "logprobs": generator.choice([None, None, None, 2]),
        }
        kind = generator.choice(["read", "read", "leave", "leave", "whole", "pause"])
        if kind == "whole":
            response = await client.post(f"{url}/v1/completions", json=fields)
            counts[f"{kind} {response.status_code}"] += 1
        else:
            await read_stream(client, url, fields, generator.randint(1, 30) if kind == "leave" else None)
            counts[kind] += 1
        if kind == "pause":
            await asyncio.sleep(generator.random())


async def watch(pids: dict[str, int], deadline: float, samples: list[dict[str, float]]) -> None:
    """Look at memory and files every second."""
    while time.monotonic() < deadline:
        samples.append(
            {"time": time.monotonic()}
            | {f"{name} MiB": resident_bytes(pid) / MIB for name, pid in pids.items()}
            | {f"{name} files": num_open_files(pid) for name, pid in pids.items()}
        )
        await asyncio.sleep(1)


def main() -> None:
    """Measure, print a table, and write it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    samples: list[dict[str, float]] = []
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_chat_model(Path(folder))
        with start_tiny_server(model, "--max-num-seqs", "256", "--max-num-batched-tokens", "4096") as server:
            pids = {"server": server.process.pid, "engine": engine_pid(server)}
            files = {name: num_open_files(pid) for name, pid in pids.items()}

            async def run() -> None:
                deadline = time.monotonic() + options.seconds
                async with many_connections() as client:
                    await asyncio.gather(
                        watch(pids, deadline, samples),
                        *(client_loop(client, server.url, seed, deadline, counts) for seed in range(options.streams)),
                    )

            asyncio.run(run())
            wait_for(lambda: is_idle(server.url), "free blocks")
            wait_for(lambda: all(num_open_files(pid) <= files[n] + 2 for n, pid in pids.items()), "closed sockets")
            tokens = read_metric(server.url, "generation_tokens_total")
            assert server.stop() == 0
    after = samples[int(len(samples) * WARM_UP) :]
    tenth = max(1, len(after) // 10)
    result: dict[str, Any] = {"tokens": tokens, "requests": dict(counts)}
    for name in pids:
        first, last = (statistics.median(s[f"{name} MiB"] for s in part) for part in (after[:tenth], after[-tenth:]))
        result[f"{name} MiB"] = [round(first, 1), round(last, 1)]
        result[f"{name} growth"] = round(last / first - 1, 4)
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result | {"samples": samples}, indent=1) + "\n")


if __name__ == "__main__":
    main()
