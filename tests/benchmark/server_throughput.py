"""Throughput through the server beside the same engine offline: same flags, same requests, clients that wait.

    python tests/benchmark/server_throughput.py                      # SmolLM2 on this machine, 16 clients
    python tests/benchmark/server_throughput.py --device cuda --model qwen3-0.6b --load-format dummy \\
        --concurrency 256 --num-requests 1024                        # an H100

Every round starts an offline engine, then a server, each in a process of its own, and asks both for the same prompts of
random tokens. Each client of the server sends its next request when it has the last one's answer; offline, all requests
are queued and `--concurrency` run at once. Flags that are not listed by --help are the engine's (--max-model-len, ...).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from folovllm.benchmarks.rungs import SHAPES  # noqa: E402
from folovllm.benchmarks.serve import send_all  # noqa: E402
from folovllm.benchmarks.serve_client import COMPLETIONS_ENDPOINT, ServeClient, ServeRequest  # noqa: E402
from folovllm.benchmarks.serve_report import make_figures  # noqa: E402
from folovllm.benchmarks.serve_workload import RandomRequests  # noqa: E402
from folovllm.engine.arg_utils import EngineArgs  # noqa: E402
from folovllm.entrypoints.openai.local_server import LocalServer  # noqa: E402

PERCENTILES = (50.0, 99.0)
RANGE_RATIO = 0.2
"""Lengths vary by this share."""


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """Return our flags, and the engine's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="smollm2-135m-instruct", help=f"or a shape: {', '.join(SHAPES)}")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--offline", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_known_args()


def write_shape(folder: Path, config: dict[str, Any]) -> str:
    """Write the config of a model of random weights, and a tokenizer that has a word for each token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    (folder / "config.json").write_text(json.dumps(config))
    vocab = {f"t{i}": i for i in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(folder)
    return str(folder)


def engine_flags(args: argparse.Namespace, flags: Sequence[str], model: str) -> list[str]:
    """Return the engine's flags, with what the workload needs where nothing is given."""
    longest = round((1 + RANGE_RATIO) * (args.input_len + args.output_len)) + 2
    needed = {"--max-num-seqs": args.concurrency, "--max-model-len": longest}
    more = [str(word) for name, value in needed.items() if name not in flags for word in (name, value)]
    return ["--model", model, *flags, *more]


def make_requests(args: argparse.Namespace, seed: int) -> list[ServeRequest]:
    """Return a round's requests."""
    source = RandomRequests(
        seed, input_len=args.input_len, output_len=args.output_len, range_ratio=RANGE_RATIO, vocab_size=args.vocab_size
    )
    return source.take(args.num_requests)


def run_offline(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """In a process of its own: print the tokens per second of LLMEngine."""
    from folovllm.engine.llm_engine import LLMEngine
    from folovllm.sampling_params import SamplingParams

    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(flags)))

    def run(requests: Sequence[ServeRequest]) -> float:
        start = time.perf_counter()
        for i, request in enumerate(requests):
            params = SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)
            engine.add_request(str(i), {"prompt_token_ids": list(request.prompt)}, params)  # type: ignore[arg-type]
        while engine.has_unfinished_requests():
            engine.step()
        return sum(request.max_tokens for request in requests) / (time.perf_counter() - start)

    run(make_requests(args, 1000)[: args.concurrency])  # warm
    print("RESULT", json.dumps({"tokens/s": run(make_requests(args, 0))}))


def offline(args: argparse.Namespace, flags: Sequence[str]) -> dict[str, float]:
    """Run run_offline, and return what it found."""
    own = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("concurrency", "num_requests")]
    own += [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("input_len", "output_len", "vocab_size")]
    command = [sys.executable, __file__, "--offline", *own, *flags]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=1800).stdout
    found: dict[str, float] = json.loads(output.rpartition("RESULT ")[2])
    return found


def served(args: argparse.Namespace, flags: Sequence[str]) -> dict[str, float]:
    """Start a server, ask it, and return figures."""
    with LocalServer([*flags, "--disable-access-log"], startup_timeout_s=900) as server:

        async def run() -> dict[str, float]:
            body = {"ignore_eos": True, "temperature": 0}
            async with ServeClient(server.url, COMPLETIONS_ENDPOINT, "", extra_body=body) as client:
                await client.resolve_model()
                await send_all(client, make_requests(args, 1000)[: args.concurrency], [0.0] * args.concurrency, None)
                requests = make_requests(args, 0)
                records = await send_all(client, requests, [0.0] * len(requests), args.concurrency)
            result = make_figures(records, PERCENTILES, {})
            assert not result.failures, result.failures
            assert result.figures["output_tokens"] == sum(request.max_tokens for request in requests)
            return {"tokens/s": result.figures["output_tok_s"]} | {
                name: result.figures[name] for name in ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
            }

        return asyncio.run(run())


def main() -> None:
    """Measure, print a table, and write it as JSON on request."""
    args, flags = parse_args()
    if args.offline:
        run_offline(args, ["--model", args.model, *flags])
        return
    results: dict[str, list[dict[str, float]]] = {"offline": [], "served": []}
    with tempfile.TemporaryDirectory() as folder:
        model = write_shape(Path(folder), SHAPES[args.model]) if args.model in SHAPES else args.model
        flags = engine_flags(args, flags, model)
        for number in range(args.rounds):
            # Which one goes first alternates: the machine may get warmer, or busier.
            for name in ("offline", "served") if number % 2 == 0 else ("served", "offline"):
                found = offline(args, flags) if name == "offline" else served(args, flags)
                results[name].append(found)
                print(f"round {number + 1} {name:8}", "  ".join(f"{key} {value:.1f}" for key, value in found.items()))
    medians = {name: statistics.median(found["tokens/s"] for found in rounds) for name, rounds in results.items()}
    print(f"served / offline: {medians['served'] / medians['offline']:.3f} of {medians['offline']:.0f} tokens/s")
    if args.json:
        args.json.write_text(json.dumps({"args": vars(args) | {"json": None}, "rounds": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
