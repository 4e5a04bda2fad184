"""`folovllm bench serve`: how a running OpenAI-compatible server answers under load (vLLM: `benchmarks/serve.py`).

    serve_workload.py   what is asked, and when        serve_client.py   asks, and writes down when what came
    serve_report.py     figures, table, picture        serve.py          puts them together

Two kinds of load. Open loop (--request-rate): requests arrive by the clock, whether or not earlier ones are done, as
users do; a server that is too slow shows a growing queue. Closed loop (--max-concurrency alone): so many clients, each
sends its next request when the last one is answered; it shows throughput, and hides queueing. Both: arrivals by the
clock, of which no more than so many are under way.

Maintained load generators were looked at first. guidellm 0.8 keeps only the mean of each request's inter-token
latencies (a stall of one token does not show), asks for `continuous_usage_stats`, which is vLLM's own, and brings 31
packages (322 MB, pyarrow and pandas among them). aiperf 0.13 has it all, but pins psutil, rich and prometheus-client to
versions that our server cannot use. So the loop is here; HTTP is aiohttp's (`pip install "folovllm[bench]"`).
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from folovllm.benchmarks.schema import BenchmarkResult, Entry, Figure, write_result
from folovllm.benchmarks.serve_client import (
    CHAT_ENDPOINT,
    COMPLETIONS_ENDPOINT,
    ServeClient,
    ServeRecord,
    ServeRequest,
)
from folovllm.benchmarks.serve_workload import RandomRequests, arrival_times, read_requests

if TYPE_CHECKING:
    from folovllm.benchmarks.serve_report import ServeFigures

DEFAULT_URL = "http://127.0.0.1:8000"
HEARTBEAT_S = 0.01
"""How often the client looks at the clock to see whether it keeps up."""
MAX_LAG_S = 0.01
"""If it looks this much later than it should, one time in a hundred, the client was too slow to measure with."""


def add_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `folovllm bench serve`, spelled as vLLM's where it has them."""
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", default=DEFAULT_URL, metavar="URL", help="default: %(default)s")
    server.add_argument(
        "--endpoint",
        default=COMPLETIONS_ENDPOINT,
        metavar="PATH",
        help=f"{COMPLETIONS_ENDPOINT} (default) or {CHAT_ENDPOINT}",
    )
    server.add_argument("--model", default="", metavar="NAME", help="default: the first that the server lists")
    server.add_argument("--api-key", metavar="KEY", help="default: OPENAI_API_KEY of the environment, or none")
    server.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="a longer request has failed (default: %(default)g s)"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--num-prompts", type=int, default=100, metavar="N", help="requests (default: %(default)s)")
    load.add_argument(
        "--request-rate", type=float, default=math.inf, metavar="R", help="arrivals per second (default: all at once)"
    )
    load.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="B",
        help="shape of the gaps' Gamma distribution: 1 is a Poisson process (default), less comes in bursts",
    )
    load.add_argument("--max-concurrency", type=int, metavar="N", help="most requests under way (default: no limit)")
    load.add_argument("--num-warmups", type=int, default=0, metavar="N", help="requests before, not counted")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts, lengths and arrivals (default: 0)")
    _add_workload_args(parser.add_argument_group("requests"))
    report = parser.add_argument_group("report")
    report.add_argument(
        "--metric-percentiles", default="50,90,99", metavar="P,P", help="percentiles (default: %(default)s)"
    )
    report.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="count requests that meet these: ttft:500 tpot:50 e2el:5000",
    )
    report.add_argument("--save-result", metavar="FILE", help="write the figures as JSON")
    report.add_argument("--save-detailed", metavar="FILE", help="write every request's times, one JSON object a line")
    report.add_argument("--plot", metavar="FILE", help="draw latencies and throughput: .png, .svg or .pdf")


def _add_workload_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset-name",
        choices=("random", "prefix_repetition", "custom"),
        default="random",
        help="random tokens (default), the same after shared prefixes, or a file",
    )
    group.add_argument("--dataset-path", metavar="FILE", help='custom: lines of {"prompt": ..., "output_tokens": ...}')
    group.add_argument("--input-len", type=int, default=128, metavar="N", help="prompt tokens (default: %(default)s)")
    group.add_argument("--output-len", type=int, default=128, metavar="N", help="most output tokens (default: 128)")
    group.add_argument(
        "--random-range-ratio", type=float, default=0.0, metavar="R", help="lengths vary by this share, 0 to 1"
    )
    group.add_argument(
        "--prefix-repetition-prefix-len", type=int, default=256, metavar="N", help="tokens of a prefix (default: 256)"
    )
    group.add_argument(
        "--prefix-repetition-num-prefixes", type=int, default=10, metavar="N", help="prefixes (default: 10)"
    )
    group.add_argument(
        "--vocab-size", type=int, default=10_000, metavar="N", help="token ids are below it (default: %(default)s)"
    )
    group.add_argument("--ignore-eos", action="store_true", help="ask for exactly --output-len tokens (vLLM's field)")
    group.add_argument("--temperature", type=float, metavar="T", help="default: the server's")
    group.add_argument("--extra-body", metavar="JSON", help="further fields of every request, a JSON object")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 0 where every request was answered, 1 where some failed.

    Raises:
        ValueError: a flag is out of range, no server answers, a package is missing.
    """
    # Here, since it imports numpy, which `folovllm --help` need not wait for.
    from folovllm.benchmarks.serve_report import format_table, make_figures, parse_goodput, plot

    percents = _check(args)
    objectives = parse_goodput(args.goodput)
    records, lag_s, model = _run_loop(_measure(args))
    result = make_figures(records, percents, objectives)
    print(format_table(result, percents, objectives))
    if lag_s > MAX_LAG_S:
        print(
            f"warning: this client was {lag_s * 1e3:.0f} ms late at the 99th percentile: the figures are the client's "
            "as well as the server's. Give it a core of its own, or lower the load.",
            file=sys.stderr,
        )
    if args.save_detailed:
        Path(args.save_detailed).write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    if args.save_result:
        write_result(args.save_result, _to_result(args, result, model, lag_s))
    if args.plot:
        plot(args.plot, records, f"{model}: {len(records)} requests, {result.figures.get('output_tok_s', 0):.0f} tok/s")
    return 0 if not result.failures else 1


def _run_loop(main: Any) -> Any:
    """Run a coroutine, on uvloop where it is installed."""
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop

        return uvloop.run(main)
    return asyncio.run(main)


def _check(args: argparse.Namespace) -> list[float]:
    """Refuse what cannot be meant, before anything is sent; return the percentiles."""
    low = {"num_prompts": 1, "num_warmups": 0, "input_len": 1, "output_len": 1, "vocab_size": 2}
    low |= {"prefix_repetition_prefix_len": 1, "prefix_repetition_num_prefixes": 1, "max_concurrency": 1}
    for name, least in low.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}.")
    for name in ("request_rate", "burstiness", "timeout"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be above 0.")
    if not 0 <= args.random_range_ratio <= 1:
        raise ValueError(f"--random-range-ratio {args.random_range_ratio} must be in [0, 1].")
    if (args.dataset_name == "custom") != (args.dataset_path is not None):
        raise ValueError(f"--dataset-name {args.dataset_name}: --dataset-path goes with custom, and only with it.")
    from folovllm.benchmarks.serve_report import PLOT_FORMATS

    if args.plot and Path(args.plot).suffix not in PLOT_FORMATS:
        raise ValueError(f"--plot {args.plot}: the name must end in one of {', '.join(PLOT_FORMATS)}.")
    for package in ("aiohttp", "matplotlib") if args.plot else ("aiohttp",):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f'`folovllm bench serve` needs {package}: pip install "folovllm[bench]".')
    try:
        percents = [float(word) for word in args.metric_percentiles.split(",")]
    except ValueError:
        percents = [-1.0]
    if not all(0 <= percent <= 100 for percent in percents):
        raise ValueError(f"--metric-percentiles {args.metric_percentiles!r}: numbers in [0, 100] with commas.")
    return percents


def _extra_body(args: argparse.Namespace) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if args.ignore_eos:
        body["ignore_eos"] = True
    if args.temperature is not None:
        body["temperature"] = args.temperature
    if args.extra_body is not None:
        try:
            extra = json.loads(args.extra_body)
        except ValueError as error:
            raise ValueError(f"--extra-body is not JSON: {error}.") from error
        if not isinstance(extra, dict):
            raise ValueError("--extra-body must be a JSON object.")
        body |= extra
    return body


def _requests(args: argparse.Namespace, as_text: bool) -> tuple[list[ServeRequest], list[ServeRequest]]:
    """Return the warm-up requests and those that count."""
    if args.dataset_name == "custom":
        requests = read_requests(args.dataset_path, args.num_prompts, args.output_len)
        return [requests[i % len(requests)] for i in range(args.num_warmups)], requests
    shared = args.dataset_name == "prefix_repetition"
    source = RandomRequests(
        args.seed,
        input_len=args.input_len,
        output_len=args.output_len,
        range_ratio=args.random_range_ratio,
        prefix_len=args.prefix_repetition_prefix_len if shared else 0,
        num_prefixes=args.prefix_repetition_num_prefixes if shared else 1,
        vocab_size=args.vocab_size,
        as_text=as_text,
    )
    return source.take(args.num_warmups), source.take(args.num_prompts)


async def _measure(args: argparse.Namespace) -> tuple[list[ServeRecord], float, str]:
    """Send everything; return the records, the client's own lag (99th percentile, seconds) and the model."""
    client = ServeClient(
        args.base_url,
        args.endpoint,
        args.model,
        args.api_key or os.environ.get("OPENAI_API_KEY"),
        _extra_body(args),
        args.timeout,
    )
    warm_ups, requests = _requests(args, client.is_chat)
    async with client:
        model = await client.resolve_model()
        await send_all(client, warm_ups, [0.0] * len(warm_ups), args.max_concurrency)
        arrivals = list(islice(arrival_times(args.request_rate, args.burstiness, args.seed), len(requests)))
        lags: list[float] = []
        heartbeat = asyncio.create_task(_watch_lag(lags))
        try:
            records = await send_all(client, requests, arrivals, args.max_concurrency)
        finally:
            heartbeat.cancel()
    lags.sort()
    return records, lags[int(0.99 * len(lags))] if lags else 0.0, model


async def send_all(
    client: ServeClient, requests: Sequence[ServeRequest], arrivals: Sequence[float], max_concurrency: int | None
) -> list[ServeRecord]:
    """Send each request at its time (seconds from now); return the records in the same order.

    max_concurrency: a request whose time has come waits while so many are under way. None: no limit.
    """
    slots = asyncio.Semaphore(max_concurrency or max(1, len(requests)))
    start = time.perf_counter()

    async def send_at(request: ServeRequest, arrival: float) -> ServeRecord:
        await asyncio.sleep(start + arrival - time.perf_counter())
        async with slots:
            return await client.send(request, late_s=time.perf_counter() - start - arrival)

    return await asyncio.gather(*(send_at(*pair) for pair in zip(requests, arrivals, strict=True)))


async def _watch_lag(lags: list[float]) -> None:
    """Write down how late the event loop wakes this task, again and again."""
    while True:
        start = time.perf_counter()
        await asyncio.sleep(HEARTBEAT_S)
        lags.append(time.perf_counter() - start - HEARTBEAT_S)


def _to_result(args: argparse.Namespace, result: ServeFigures, model: str, lag_s: float) -> BenchmarkResult:
    settings = {name: value for name, value in vars(args).items() if name not in ("api_key", "run", "request_rate")}
    settings = {name: value for name, value in settings.items() if isinstance(value, (str, int, float, list))}
    # JSON has no infinity: null stands for "all at once".
    settings["request_rate"] = None if math.isinf(args.request_rate) else args.request_rate
    figures = result.figures | {"client_lag_p99_ms": lag_s * 1e3}
    return BenchmarkResult(
        kind="serve",
        time=time.time(),
        command=_without_secret(sys.argv),
        machine=None,
        settings=settings | {"model": model},
        entries=[
            Entry(
                name="serve",
                title=f"{model} at {args.base_url}",
                engine=args.base_url,
                workloads={args.dataset_name: {k: Figure(v, v, v, [v]) for k, v in figures.items()}},
                notes=[f"{count} requests failed: {error}" for error, count in result.failures.items()],
            )
        ],
    )


def _without_secret(argv: Sequence[str]) -> list[str]:
    """The command line without the value of --api-key."""
    words, hidden = [], False
    for word in argv:
        words.append("..." if hidden else "--api-key=..." if word.startswith("--api-key=") else word)
        hidden = word == "--api-key"
    return words
