"""`folovllm bench ladder | throughput | latency | serve`: measure the engine (vLLM: `entrypoints/cli/benchmark/`).

The measuring itself is in folovllm/benchmarks; here are the flags. All commands write the same kind of JSON file
(folovllm/benchmarks/schema.py).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from folovllm.benchmarks.rungs import PEERS, RUNG_NAMES, SHAPES, Sizes, default_sizes
from folovllm.config import DEVICES, DTYPES, KV_CACHE_DTYPES, LOAD_FORMATS
from folovllm.engine.arg_utils import DEFAULT_MODEL, EngineArgs
from folovllm.entrypoints.cli.common import UsageError

if TYPE_CHECKING:
    from folovllm.benchmarks.ladder import LadderOptions

EXIT_INTERRUPTED = 130
PACKAGE = "folovllm.benchmarks"

_LADDER = """\
Run one workload up the milestones: one request at a time, continuous batching, a paged KV cache, flash attention,
chunked prefill, prefix caching, and on. Each rung is a configuration of the same engine, adds one thing to the rung
before it, and runs in a process of its own. Other engines run beside it where they are installed. Writes tables
(ladder.md), figures (ladder.json), pictures, and the raw events that all of them follow from."""


def add_subparser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the parser of `folovllm bench` and of its commands."""
    parser = subparsers.add_parser("bench", help="measure the engine", description="Measure.", allow_abbrev=False)
    kinds = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", title="benchmarks", required=True)
    ladder = kinds.add_parser(
        "ladder", help="what each idea buys on this machine", description=_LADDER, allow_abbrev=False
    )
    _add_ladder_args(ladder)
    ladder.set_defaults(run=run_ladder)
    for name, text in (
        ("throughput", "many requests at once: tokens per second"),
        ("latency", "one batch again and again: seconds"),
    ):
        kind = kinds.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        _module(name).add_cli_args(kind)
        EngineArgs.add_cli_args(kind)
        kind.set_defaults(run=_runner(name))
    if importlib.util.find_spec(f"{PACKAGE}.serve") is not None:
        text = "load a running server"
        serve = kinds.add_parser("serve", help=text, description="Load a running server.", allow_abbrev=False)
        _module("serve").add_args(serve)
        serve.set_defaults(run=_runner("serve"))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{name}")


def _runner(name: str) -> object:
    def run(args: argparse.Namespace) -> int:
        code: int = _module(name).run(args)
        return code

    return run


def _add_ladder_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the ladder; those of the engine are only the ones that no rung sets itself."""
    parser.add_argument("--quick", action="store_true", help="small workloads and 2 rounds: under 3 minutes on 2 cores")
    parser.add_argument(
        "--rungs", nargs="+", metavar="RUNG", help=f"only these of {', '.join(RUNG_NAMES)} (default: all of the device)"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="runs of each rung (default: 3; --quick: 2)")
    text = "where to write (default: ladder); files of the same names are replaced"
    parser.add_argument("--output-dir", type=Path, default=Path("ladder"), metavar="DIR", help=text)
    parser.add_argument("--no-plots", dest="plots", action="store_false", help="no pictures, no need for matplotlib")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no table")
    model = parser.add_argument_group("model")
    text = "folder, .gguf file, Hugging Face id or built-in name"
    model.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"{text} (default: {DEFAULT_MODEL}); with --load-format dummy also {', '.join(SHAPES)}: its shape alone",
    )
    model.add_argument("--device", choices=DEVICES, default="auto", help="where to run")
    model.add_argument("--dtype", choices=DTYPES, default="auto", help="number format")
    model.add_argument("--load-format", choices=LOAD_FORMATS, default="auto", help="dummy: random weights")
    model.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="fp8: on CUDA")
    model.add_argument("--tokenizer", metavar="NAME", help="for perplexity and GPTQ (default: the model's)")
    model.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    model.add_argument("--download-dir", metavar="DIR", help="where hub downloads are kept")
    model.add_argument("--seed", type=int, default=0, metavar="N", help="of random weights")
    model.add_argument("--gptq-model", metavar="NAME", help="checkpoint for M7 (default: made here, and kept)")
    model.add_argument("--perplexity-file", metavar="FILE", help="UTF-8 text (default: a novel, in a source checkout)")
    work = parser.add_argument_group("workload", "Defaults depend on the device and on --quick.")
    work.add_argument("--num-prompts", type=int, metavar="N", help="requests that every rung gets")
    work.add_argument("--input-len", type=int, nargs=2, metavar=("MIN", "MAX"), help="their prompt tokens")
    work.add_argument("--output-len", type=int, nargs=2, metavar=("MIN", "MAX"), help="their output tokens")
    work.add_argument("--max-model-len", type=int, metavar="N", help="most tokens of a request")
    work.add_argument("--contiguous-slots", type=int, metavar="N", help="room for N requests of max_model_len tokens")
    work.add_argument("--max-num-seqs", type=int, metavar="N", help="most requests of a step, from M2 on")
    peers = parser.add_argument_group("other engines")
    text = "which to run beside it, where installed (default: all); without a name: none"
    peers.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help=text)
    peers.add_argument("--vllm-python", metavar="PATH", help="the Python of an environment that has vLLM")


_SIZE_FLAGS = {
    "num_prompts": "num_prompts",
    "input_len": "input_lens",
    "output_len": "output_lens",
    "max_model_len": "max_model_len",
    "contiguous_slots": "contiguous_slots",
    "max_num_seqs": "max_num_seqs",
}
"""Flag -> field of Sizes."""


def run_ladder(args: argparse.Namespace) -> int:
    """Run `folovllm bench ladder` and return the exit code: 1 if a rung failed, 130 after Ctrl-C."""
    options = _ladder_options(args)
    from folovllm.benchmarks.ladder import Ladder
    from folovllm.benchmarks.report import markdown

    if args.plots:
        from folovllm.benchmarks.plots import check_installed

        check_installed()  # before minutes of measuring, not after them
    with contextlib.redirect_stdout(sys.stderr):
        ladder = Ladder(options, ["folovllm", *sys.argv[1:]])
        result = ladder.run()
    pictures: list[str] = []
    if args.plots and result.entries:
        from folovllm.benchmarks.plots import draw_all

        pictures = draw_all(result, ladder.records(), options.output_dir)
    report = markdown(result, pictures)
    (options.output_dir / "ladder.md").write_text(report, encoding="utf-8")
    if not args.quiet:
        print(report)
        print(f"Written to {options.output_dir}: ladder.json, ladder.md, {', '.join(pictures) or 'no pictures'}")
    if result.interrupted:
        return EXIT_INTERRUPTED
    return int(ladder.failed)


def _ladder_options(args: argparse.Namespace) -> LadderOptions:
    """Return what the flags ask for.

    Raises:
        UsageError: a flag is out of its range.
        ValueError: a workload does not fit max_model_len.
    """
    from folovllm.benchmarks.ladder import SHARED_ENGINE_FIELDS, LadderOptions
    from folovllm.benchmarks.machine import guess_device

    # The machine is not asked twice: sizes need the device now, the speeds are measured later.
    sizes = default_sizes(guess_device(args.device), args.quick)
    given = {flag: getattr(args, flag) for flag in _SIZE_FLAGS if getattr(args, flag) is not None}
    for flag, value in given.items():
        low, high = (min(value), value) if isinstance(value, list) else (value, [value, value])
        if low < 1 or high[0] > high[1]:
            name = flag.replace("_", "-")
            raise UsageError(f"--{name} {value} must be at least 1, and no less at the end than at the start.")
    changes: dict[str, Any] = {_SIZE_FLAGS[flag]: tuple(v) if isinstance(v, list) else v for flag, v in given.items()}
    sizes = fit_sizes(dataclasses.replace(sizes, **changes), "max_model_len" in given)
    return LadderOptions(
        engine_args=EngineArgs(**{name: getattr(args, name) for name in ("model", "tokenizer", *SHARED_ENGINE_FIELDS)}),
        sizes=sizes,
        output_dir=args.output_dir,
        rounds=args.rounds if args.rounds is not None else 2 if args.quick else 3,
        rungs=args.rungs,
        peers=args.peers,
        vllm_python=args.vllm_python,
        text=args.perplexity_file or default_text(),
        gptq_model=args.gptq_model,
        use_tqdm=not args.quiet,
    )


def fit_sizes(sizes: Sizes, shrink: bool) -> Sizes:
    """Return `sizes`; with `shrink`, the workloads of single ideas scaled to max_model_len ("mixed" is the user's)."""
    if not shrink:
        return sizes
    length = sizes.max_model_len
    streams, num_long, _ = sizes.arrivals
    count, _, own, output = sizes.shared
    conversations, turns, first, later, answer = sizes.chat
    room = max(1, length - (turns - 1) * (later + answer) - answer)
    return dataclasses.replace(
        sizes,
        arrivals=(streams, num_long, max(1, length * 9 // 10)),
        shared=(count, max(1, min(length // 2, length - own - output)), own, output),
        chat=(conversations, turns, min(first, room), later, answer),
    )


def default_text() -> str | None:
    """Return the novel beside a source checkout's tests; None for an installed package, which has no tests."""
    path = Path(__file__).parents[3] / "tests" / "data" / "persuasion.txt"
    return str(path) if path.is_file() else None
