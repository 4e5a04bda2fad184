"""`folovllm bench ladder`: one workload up the milestones, each rung in a process of its own, rungs taking turns.

round 0   m1 m2 m3 ... transformers          every run -> raw events (events/NAME-ROUND.json.gz) -> figures
round 1   m1 m2 m3 ... transformers          after each run everything is written anew: an interrupt loses one run
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
from tqdm.auto import tqdm

from folovllm.benchmarks import checkpoints, peers
from folovllm.benchmarks.child import ChildSpec
from folovllm.benchmarks.machine import least_seconds
from folovllm.benchmarks.metrics import run_figures
from folovllm.benchmarks.rungs import PEERS, RUNG_NAMES, Rung, Sizes, make_rungs, select_rungs, sizes_as_json
from folovllm.benchmarks.schema import (
    BenchmarkResult,
    Entry,
    Figure,
    Machine,
    RunRecord,
    read_record,
    write_result,
)
from folovllm.engine.arg_utils import EngineArgs
from folovllm.utils.common import check_choice, check_range

RUN_LIMIT_S = 3600.0
"""A run that takes longer is ended, and its rung left out."""


@dataclass
class LadderOptions:
    """What to climb."""

    engine_args: EngineArgs
    """Model, device, dtype, load format, tokenizer and the like; what a rung sets replaces what stands here."""
    sizes: Sizes
    """How much work."""
    output_dir: Path
    """Where everything is written."""
    rounds: int = 3
    """Runs of each rung."""
    rungs: list[str] | None = None
    """Names of rungs; None: all of this device."""
    peers: list[str] = field(default_factory=lambda: list(PEERS))
    """Other engines to run where they are installed."""
    vllm_python: str | None = None
    """Python of an environment with vLLM; None: this one."""
    text: str | None = None
    """File for perplexity; None: none is measured."""
    gptq_model: str | None = None
    """GPTQ checkpoint for M7; None: one is made, and kept in FOLOVLLM_CACHE."""
    use_tqdm: bool = True
    """Show progress."""

    def __post_init__(self) -> None:
        check_range("rounds", self.rounds, low=1)
        self.sizes.check()
        for name in self.rungs or ():
            check_choice("rungs", name, RUNG_NAMES)
        if self.text is not None and not Path(self.text).is_file():
            raise ValueError(f"perplexity_file={self.text!r} is no file.")
        peers.check_names(self.peers)


SHARED_ENGINE_FIELDS = ("dtype", "device", "load_format", "revision", "download_dir", "seed", "kv_cache_dtype")
"""Fields of EngineArgs that every rung takes from the command line."""


class Ladder:
    """One climb. `run` fills `result`."""

    def __init__(self, options: LadderOptions, command: Sequence[str]) -> None:
        """Find the model and the machine.

        Raises:
            ValueError: the model, the device or a rung's name cannot be used.
        """
        self.options = options
        options.output_dir.mkdir(parents=True, exist_ok=True)
        self.events = options.output_dir / "events"
        self.events.mkdir(exist_ok=True)
        self.model = checkpoints.named_shape(options.engine_args, options.output_dir)
        self.hf_config = replace(options.engine_args, model=self.model).resolve_model_source().hf_config()
        self.machine = self._measure_machine()
        self.rungs = select_rungs(make_rungs(self.machine.device, options.sizes), options.rungs)
        self.entries: dict[str, Entry] = {}
        self.failed = False
        """Whether a run of a rung failed."""
        self._values: dict[str, list[RunRecord]] = {}
        settings = {"model": options.engine_args.model, "rounds": options.rounds, "sizes": sizes_as_json(options.sizes)}
        settings |= {name: getattr(options.engine_args, name) for name in SHARED_ENGINE_FIELDS}
        self.result = BenchmarkResult("ladder", time.time(), list(command), self.machine, settings, [])

    def _measure_machine(self) -> Machine:
        """In a process of its own: this one leaves the device alone."""
        args = self.options.engine_args
        stored = self.hf_config.get("dtype") or self.hf_config.get("torch_dtype") or ""
        command = [sys.executable, "-m", "folovllm.benchmarks.machine", args.device, args.dtype, str(stored)]
        done = subprocess.run(command, env=child_env({}), capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(last_line(done.stderr).removeprefix("ValueError: "))
        return msgspec.json.decode(done.stdout, type=Machine)

    # ---- What to run ----

    def run(self) -> BenchmarkResult:
        """Run all rounds; an interrupt ends them and keeps what is done. Writes the result after every run."""
        quiet = not self.options.use_tqdm
        try:
            with interruptible(), tqdm(desc="Ladder", unit="run", disable=quiet) as bar:
                specs = self._specs()
                jobs = [(round_, spec) for round_ in range(self.options.rounds) for spec in specs]
                bar.reset(total=len(jobs))
                for round_, spec in jobs:
                    bar.set_postfix_str(f"round {round_ + 1} of {self.options.rounds}: {spec.rung}")
                    if spec.rung not in self.result.skipped:
                        # Perplexity is the same in every round.
                        text = None if round_ else spec.text
                        self._run_one(msgspec.structs.replace(spec, round=round_, text=text))
                    bar.update(1)
        except KeyboardInterrupt:
            self.result.interrupted = True
        self._write()
        return self.result

    def _specs(self) -> list[ChildSpec]:
        """One spec per rung and per peer that can run; the reasons of the others go to `skipped`."""
        options, specs = self.options, []
        base = {name: getattr(options.engine_args, name) for name in SHARED_ENGINE_FIELDS}
        for rung in self.rungs:
            model = self.model
            if rung.quantized:
                try:
                    model = self._gptq_model()
                except ValueError as error:
                    self.result.skipped[rung.name] = str(error)
                    continue
            specs.append(self._spec(rung, model, base | rung.engine_args))
            self._add_entry(rung)
        for name in options.peers:
            try:
                peer = peers.prepare(name, self.model, options.engine_args, self.machine.device, options.vllm_python)
            except peers.Unavailable as reason:
                self.result.skipped[name] = str(reason)
                continue
            engine_args = base | {"max_model_len": options.sizes.max_model_len, "python": peer.python}
            engine_args["max_num_seqs"] = options.sizes.max_num_seqs
            specs.append(ChildSpec(name, 0, name, peer.model, engine_args, peer.env, options.sizes, ["mixed"]))
            self.entries[name] = Entry(name, name, peer.note, engine=name, engine_args=engine_args, env=peer.env)
        return specs

    def _spec(self, rung: Rung, model: str, engine_args: dict[str, Any]) -> ChildSpec:
        options = self.options
        text = options.text if rung.perplexity else None
        if rung.perplexity and options.engine_args.load_format == "dummy":
            text = None
        tokenizer = options.engine_args.tokenizer or self.model
        return ChildSpec(
            rung=rung.name,
            round=0,
            engine="folovllm",
            model=model,
            engine_args=engine_args,
            env=rung.env,
            sizes=options.sizes,
            workloads=list(rung.workloads),
            whole_warm_up=rung.whole_warm_up,
            text=text,
            tokenizer=tokenizer,
        )

    def _add_entry(self, rung: Rung) -> None:
        self.entries[rung.name] = Entry(
            rung.name, rung.title, rung.idea, engine_args=dict(rung.engine_args), env=dict(rung.env)
        )
        if rung.quantized and self.options.gptq_model is None and self.options.engine_args.load_format != "dummy":
            samples, length = self.options.sizes.calibration
            note = f"GPTQ, 4 bits, calibrated with {samples} x {length} tokens that the model wrote itself."
            self.entries[rung.name].notes.append(note)

    def _gptq_model(self) -> str:
        if self.options.gptq_model is not None:
            return self.options.gptq_model
        return checkpoints.gptq_checkpoint(
            replace(self.options.engine_args, model=self.model),
            self.hf_config,
            self.options.sizes.calibration,
            self.options.output_dir,
            child_env({}),
        )

    # ---- A run ----

    def _run_one(self, spec: ChildSpec) -> None:
        """Run one rung once and take in what it wrote; a failure leaves the rung out from now on."""
        path = self.events / f"{spec.rung}-{spec.round}.json.gz"
        path.unlink(missing_ok=True)
        error = run_child(spec, path, self.events / f"{spec.rung}-{spec.round}.log")
        if error is not None:
            self.result.skipped[spec.rung] = error
            self.failed = self.failed or spec.engine == "folovllm"
        else:
            self._values.setdefault(spec.rung, []).append(read_record(path))
            self._take_in(spec.rung)
        self._write()

    def _take_in(self, name: str) -> None:
        """Compute an entry's figures anew, from the raw events of its runs."""
        runs = self._values[name]
        entry = self.entries[name]
        entry.engine = runs[0].engine
        entry.workloads, entry.process = summarize(runs, self.machine)
        self.result.entries = [entry for key, entry in self.entries.items() if key in self._values]

    def _write(self) -> None:
        write_result(self.options.output_dir / "ladder.json", self.result)

    def records(self) -> dict[str, list[RunRecord]]:
        """Return the raw events: rung -> a record per round."""
        return self._values


def summarize(runs: Sequence[RunRecord], machine: Machine) -> tuple[dict[str, dict[str, Figure]], dict[str, Figure]]:
    """Return ({workload: {metric: figure}}, {metric of the process: figure}) of one rung's runs."""
    by_workload: dict[str, dict[str, list[float]]] = {}
    process: dict[str, list[float]] = {}
    for run in runs:
        workloads, of_process = run_figures(run, lambda record, run=run: least_seconds(run, record, machine))  # type: ignore[misc]
        for workload, figures in workloads.items():
            for metric, value in figures.items():
                by_workload.setdefault(workload, {}).setdefault(metric, []).append(value)
        for metric, value in of_process.items():
            process.setdefault(metric, []).append(value)
    figures_of = {
        workload: {metric: figure(values) for metric, values in metrics.items()}
        for workload, metrics in by_workload.items()
    }
    return figures_of, {metric: figure(values) for metric, values in process.items()}


def figure(values: Sequence[float]) -> Figure:
    """Return values with their median and spread."""
    return Figure(statistics.median(values), min(values), max(values), list(values))


def child_env(env: dict[str, str]) -> dict[str, str]:
    """Return this process's environment with `env`, and with this package where a child finds it."""
    package_parent = str(Path(__file__).parents[2])
    paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | env


def run_child(spec: ChildSpec, output: Path, log: Path, limit_s: float = RUN_LIMIT_S) -> str | None:
    """Run a spec in a process of its own, which ends with this one; return None, or why it failed."""
    with tempfile.TemporaryDirectory() as folder, log.open("w") as log_file:
        spec_path = Path(folder) / "spec.json"
        spec_path.write_bytes(msgspec.json.encode(spec))
        python = spec.engine_args.get("python") or sys.executable
        env = child_env(spec.env) if python == sys.executable else peers.foreign_env(folder, spec.env)
        process = subprocess.Popen(
            [python, "-m", "folovllm.benchmarks.child", str(spec_path), str(output)],
            stdin=subprocess.PIPE,  # its end tells the child that nobody waits any more
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the child
        )
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return f"took longer than {limit_s:g} s"
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()
    if code == 0 and output.exists():
        return None
    return f"failed (exit code {code}): {last_line(log.read_text(errors='replace'))}; all of it in {log}"


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


class interruptible:
    """Within it SIGTERM interrupts as Ctrl-C does."""

    def __enter__(self) -> None:
        """Install the handler; outside the main thread, which alone may, nothing changes."""
        self._previous: Any = None
        try:
            self._previous = signal.signal(signal.SIGTERM, self._interrupt)
        except ValueError:
            self._previous = None

    def __exit__(self, *_: object) -> None:
        """Restore the handler."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    @staticmethod
    def _interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt
