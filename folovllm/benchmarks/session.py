"""What `bench throughput` and `bench latency` share: one engine in this process, and the file at the end."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from folovllm.benchmarks.ladder import figure
from folovllm.benchmarks.machine import describe_machine, memory_of, peak_device_bytes, peak_host_bytes
from folovllm.benchmarks.metrics import process_figures, workload_figures
from folovllm.benchmarks.runner import EngineUnderTest, ParamsFactory, greedy_params
from folovllm.benchmarks.schema import BenchmarkResult, Entry, MemoryRecord, RunRecord, WorkloadRecord, write_result
from folovllm.engine.arg_utils import EngineArgs
from folovllm.utils.common import check_range

if TYPE_CHECKING:
    from folovllm.benchmarks.schema import Figure
    from folovllm.engine.llm_engine import LLMEngine


class Session:
    """An engine that is measured."""

    def __init__(self, engine: LLMEngine, detokenize: bool, startup_s: float) -> None:
        """The engine must have been started with step_trace_path."""
        self.engine = engine
        self.under_test = EngineUnderTest(engine)
        self.startup_s = startup_s
        self.make_params: ParamsFactory = functools.partial(greedy_params, detokenize=detokenize)
        self.vocab_size = engine.vllm_config.model_config.get_vocab_size()

    def check_lengths(self, longest: int, flags: str) -> None:
        """Raise ValueError where a request would have more tokens than max_model_len."""
        limit = self.engine.vllm_config.model_config.max_model_len
        if limit is not None and longest > limit:
            raise ValueError(f"{flags}: a request of {longest} tokens is above max_model_len={limit}. Shorten it.")

    def run_record(self, records: Sequence[WorkloadRecord], engine_args: EngineArgs) -> RunRecord:
        """Return everything that was written down."""
        weights, kv_cache = memory_of(self.engine)
        return RunRecord(
            rung="",
            round=0,
            engine="folovllm",
            engine_args=changed_args(engine_args),
            env={},
            memory=MemoryRecord(peak_host_bytes(), weights, kv_cache, peak_device_bytes()),
            workloads=list(records),
            startup_report=self.engine.startup_report,
            startup_s=self.startup_s,
        )


@contextlib.contextmanager
def session(args: argparse.Namespace) -> Iterator[Session]:
    """Start the engine that the engine flags name, with a step trace in a temporary file unless one is asked for."""
    from folovllm.engine.llm_engine import LLMEngine

    engine_args = EngineArgs.from_cli_args(args)
    with tempfile.TemporaryDirectory() as folder:
        if engine_args.step_trace_path is None:
            engine_args = dataclasses.replace(engine_args, step_trace_path=str(Path(folder) / "trace.jsonl"))
        started = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            engine = LLMEngine.from_engine_args(engine_args)
        try:
            detokenize = not args.disable_detokenize and engine.tokenizer is not None
            yield Session(engine, detokenize, time.perf_counter() - started)
        finally:
            engine.shutdown()


def changed_args(engine_args: EngineArgs) -> dict[str, object]:
    """Return the fields that differ from their defaults."""
    default = EngineArgs()
    fields = dataclasses.fields(EngineArgs)
    return {f.name: v for f in fields if (v := getattr(engine_args, f.name)) != getattr(default, f.name)}


def write_session(
    args: argparse.Namespace,
    kind: str,
    current: Session,
    records: Sequence[WorkloadRecord],
    settings: dict[str, object],
) -> BenchmarkResult:
    """Return the result of a session, each record being one value of every figure; write --output-json."""
    engine_args = EngineArgs.from_cli_args(args)
    values: dict[str, list[float]] = {}
    for record in records:
        for metric, value in workload_figures(record).items():
            values.setdefault(metric, []).append(value)
    figures: dict[str, Figure] = {metric: figure(numbers) for metric, numbers in values.items()}
    process = process_figures(current.run_record(records, engine_args))
    device = "cuda" if current.engine.executor.get_startup_info().device.startswith("cuda") else "cpu"
    result = BenchmarkResult(
        kind=kind,
        time=time.time(),
        command=["folovllm", "bench", *sys.argv[2:]],
        machine=describe_machine(device),
        settings={"model": args.model} | settings,
        entries=[
            Entry(
                kind,
                kind,
                engine_args=changed_args(engine_args),
                workloads={"uniform": figures},
                process={metric: figure([value]) for metric, value in process.items()},
            )
        ],
    )
    if args.output_json:
        write_result(args.output_json, result)
    return result


def check_positive(args: argparse.Namespace, names: Sequence[str], low: int = 1) -> None:
    """Raise ValueError unless each of the flags `names` is at least `low`."""
    for name in names:
        check_range(name, getattr(args, name), low=low)


def check_output(args: argparse.Namespace) -> None:
    """Raise ValueError unless --output-json, where given, stands in a folder: before anything is measured."""
    if args.output_json and not Path(args.output_json).absolute().parent.is_dir():
        raise ValueError(f"output_json={args.output_json!r}: its folder does not exist. Make it first.")
