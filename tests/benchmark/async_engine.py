"""What AsyncLLM costs beside LLMEngine, with a model that is free: output tokens per second, milliseconds per token.

    python tests/benchmark/async_engine.py [--streams 100] [--tokens 256] [--json out.json]

Everything but the model is real: scheduler, block pool, SmolLM2's tokenizer, detokenization, the process and its
sockets. Two questions:

- throughput: steps take no time, `--streams` readers. How many tokens per second pass, and how busy is the front?
- latency: a step takes 5 ms, 10 readers. How long after the end of the step in the core has a reader its token?
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from folovllm import SamplingParams
from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.async_llm import AsyncLLM
from folovllm.engine.core_client import AsyncMPClient, AsyncThreadClient
from folovllm.engine.llm_engine import LLMEngine
from folovllm.sampling_params import RequestOutputKind
from tests.benchmark.async_engine_worker import STEP_MS, free_executor, start_core

LATENCY_STREAMS = 10
LATENCY_TOKENS = 200
LATENCY_STEP_MS = 5.0
PROMPT_LEN = 32


def make_args(streams: int) -> EngineArgs:
    """Return arguments under which all streams run at once."""
    return EngineArgs(
        model="smollm2-135m-instruct",
        max_num_seqs=streams,
        max_num_batched_tokens=8192,
        max_model_len=2048,
        num_gpu_blocks_override=streams * 40,
        disable_log_stats=False,
    )


def make_params(tokens: int) -> SamplingParams:
    """Return the parameters of every request."""
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA)


def make_prompt(i: int) -> dict[str, list[int]]:
    """Return token ids of which no two prompts share a block."""
    return {"prompt_token_ids": [500 + i, *range(1000, 999 + PROMPT_LEN)]}


@contextmanager
def step_ms(value: float) -> Iterator[None]:
    """Let steps take `value` milliseconds, here and in processes that start meanwhile."""
    os.environ[STEP_MS] = str(value)
    yield
    del os.environ[STEP_MS]


def run_sync(streams: int, tokens: int, tokenizer: Any) -> dict[str, float]:
    """Run all requests through LLMEngine."""
    args = make_args(streams)
    config = args.create_engine_config()
    executor = free_executor(args, config.model_config.get_vocab_size())
    engine = LLMEngine(config, executor, tokenizer, {}, log_stats=True)
    for i in range(streams):
        engine.add_request(str(i), make_prompt(i), make_params(tokens))
    delays: list[float] = []
    started, cpu = time.perf_counter(), time.process_time()
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert output.metrics is not None
            delays.append(time.monotonic() - output.metrics.last_token_ts)
    return summary(streams * tokens, started, cpu, delays)


async def run_async(engine: AsyncLLM, streams: int, tokens: int) -> dict[str, float]:
    """Read all requests as streams, each by its own task."""
    delays: list[float] = []

    async def read(i: int) -> None:
        async for output in engine.generate(make_prompt(i), make_params(tokens), str(i)):
            assert output.metrics is not None
            delays.append(time.monotonic() - output.metrics.last_token_ts)

    await asyncio.gather(*(read(-1 - i) for i in range(streams)))  # warm
    delays.clear()
    await engine.reset_prefix_cache()
    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(read(i) for i in range(streams)))
    result = summary(streams * tokens, started, cpu, delays)
    await engine.shutdown()
    return result


def summary(num_tokens: int, started: float, cpu: float, delays: list[float]) -> dict[str, float]:
    """Return the figures of a run."""
    seconds = time.perf_counter() - started
    delays.sort()
    return {
        "tokens/s": num_tokens / seconds,
        "front's CPU us/token": (time.process_time() - cpu) / num_tokens * 1e6,
        "outputs": len(delays),
        "delay p50 ms": statistics.median(delays) * 1e3,
        "delay p99 ms": delays[int(len(delays) * 0.99)] * 1e3,
    }


def start_async(mode: str, streams: int, tokenizer: Any) -> AsyncLLM:
    """Return an AsyncLLM over the free model."""
    args = make_args(streams)
    client: AsyncMPClient | AsyncThreadClient
    if mode == "process":
        client = AsyncMPClient(args, module="tests.benchmark.async_engine_worker")
        client.wait_ready()
    else:
        client = AsyncThreadClient(*start_core(args))
    return AsyncLLM(args.create_engine_config(), client, tokenizer, {}, log_stats=True)


def main() -> None:
    """Measure, print a table, and write it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--uvloop", action="store_true", help="the event loop that the server runs on")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.uvloop:
        import uvloop

        runner = uvloop.run
    else:
        runner = asyncio.run
    tokenizer = make_args(1).resolve_model_source().tokenizer()
    results: dict[str, dict[str, float]] = {}
    for name, streams, tokens, ms in (
        ("throughput", options.streams, options.tokens, 0.0),
        ("latency", LATENCY_STREAMS, LATENCY_TOKENS, LATENCY_STEP_MS),
    ):
        with step_ms(ms):
            results[f"{name}, LLMEngine"] = run_sync(streams, tokens, tokenizer)
            for mode in ("process", "thread"):
                engine = start_async(mode, streams, tokenizer)
                results[f"{name}, AsyncLLM, {mode}"] = runner(run_async(engine, streams, tokens))
    for name, row in results.items():
        print(f"{name:<32}", "  ".join(f"{key} {value:9.2f}" for key, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
