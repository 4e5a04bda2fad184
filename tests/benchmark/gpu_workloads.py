"""FoloVLLM on one GPU beside vLLM 0.24, the targets and the roofline: Qwen3 shapes, random weights and token ids.

    python tests/benchmark/gpu_workloads.py --model 0.6B|8B --workloads A B D steps E S [--repeats 3] [--json FILE]
        [--max-seconds N] [--max-num-seqs N] [--eager] [--no-cold] [--profile FILE] [--trace FILE] [--engine-args JSON]
        [--bits 4|8]

Workloads; end-of-sequence is ignored everywhere, and token ids are fresh in each run, so that only E finds cached ones:

    A      256 requests, in and out randint(100, 1024) after random.seed(0), temperature 0.6: output tokens per second
           (with --model 8B its name is C)
    B      the same with 1024 requests
    D      one greedy stream, 128 in, 256 out: (t_256 - t_1) / 255; and time to the first token of a 2048-token prompt
    steps  a step in which 1, 32, 128, 256 requests decode, contexts 128 to 257: seconds of many steps over their
           number, nothing synchronised between; `host` is what of it the host did not spend waiting for the device, in
           three parts: EngineCore.step without the launches of recorded steps (schedule, prepare, update), these
           launches, and the making of outputs, which a server does in another process
    E      64 requests that share 2048 tokens and have 32 of their own, 1 out: cold, warm (other own tokens), unshared
    S      from the start of a new process to the first token of a 16-token prompt: with empty folders for compiled
           kernels, then with the same folders again (--no-cold: the user's folders only, after an untimed run)

--profile runs torch.profiler over steady decode steps (batch 1 and 256) and writes a text: the GPU's busy share,
kernels by time, calls that wait. --trace writes Chrome traces of three such steps, `_batch1` and so on in the name.

The roofline of A: every output token reads its context's keys and values, every step the weights, at the copy
bandwidth measured at the start; prompts take their FLOPs at the measured matmul rate; there are as many steps as the
longest output has tokens. The others are computed alike. Medians (minimum to maximum) of --repeats runs after an
untimed one, a table last. One workload's failure leaves the others; what --max-seconds leaves no time for is left
out. The exit status is 1 if a workload failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from folovllm import LLM, SamplingParams
from folovllm.sampling_params import RequestOutputKind
from tests.benchmark.gpu_workloads_report import (
    REFERENCE,
    TABLE_HEAD,
    CallTimes,
    Ceiling,
    ProfileReport,
    Roofline,
    Row,
    host_waits,
)

ROOT = Path(__file__).parents[2]
COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "max_position_embeddings": 4096,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}
SIZE_NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
MODELS: dict[str, dict[str, Any]] = {
    name: COMMON | dict(zip(SIZE_NAMES, sizes, strict=True))
    for name, sizes in {
        "0.6B": (1024, 3072, 28, 16, 8, 128, 151936, True),
        "8B": (4096, 12288, 36, 32, 8, 128, 151936, False),
        "tiny": (128, 256, 2, 4, 2, 64, 512, True),
    }.items()
}
# Where libraries that compile at run time keep the result: Triton, Inductor, the driver, CuTe DSL, FlashInfer.
KERNEL_CACHES = (
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "CUDA_CACHE_PATH",
    "CUTE_DSL_CACHE_DIR",
    "FLASHINFER_WORKSPACE_BASE",
)
STARTUP_SCRIPT = """
import json, sys, time
begin = time.monotonic()
from folovllm import LLM, SamplingParams
imported = time.monotonic()
llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
ready = time.monotonic()
params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
output = llm.generate({"prompt_token_ids": list(range(100, 116))}, params, use_tqdm=False)[0]
assert len(output.outputs[0].token_ids) == 1
done = time.monotonic()
times = {"import": imported - begin, "engine": ready - imported, "first token": done - ready}
print("STARTUP", json.dumps({"at": done, "phases": times, "report": llm.llm_engine.startup_report}))
"""
NUM_TRACED_STEPS = 3
STARTUP_LIMIT_S = 300


class OutOfTime(Exception):
    """--max-seconds leaves no time for even one run."""


@dataclass(frozen=True)
class Sizes:
    """How large the workloads are."""

    throughput: dict[str, int] = field(default_factory=lambda: {"A": 256, "B": 1024, "C": 256})
    lengths: tuple[int, int] = (100, 1024)
    stream: tuple[int, int] = (128, 256)
    long_prompt: int = 2048
    batches: tuple[int, ...] = (1, 32, 128, 256)
    step_lengths: tuple[int, int] = (128, 129)
    shared: tuple[int, int, int] = (64, 2048, 32)
    profiled_batches: tuple[int, ...] = (1, 256)
    profiled_steps: int = 30
    max_num_batched_tokens: int = 16384


TINY_SIZES = Sizes({"A": 6, "B": 12, "C": 6}, (4, 12), (8, 16), 40, (1, 4), (8, 16), (4, 32, 8), (1, 4), 5, 64)


class Bench:
    """Runs workloads on one engine and keeps what they bring."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        """Write the model's config into `folder`. Leaves the GPU alone: S wants it as a new process finds it."""
        self.args, self.folder = args, folder
        self.model = "tiny" if args.tiny else args.model
        self.sizes = TINY_SIZES if args.tiny else Sizes()
        self.config = config = dict(MODELS[self.model])
        if args.bits:
            self.model += f"-{args.bits}bit"
            group_size = 64 if args.tiny else 128
            config["quantization_config"] = {"quant_method": "gptq", "bits": args.bits, "group_size": group_size}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        self.vocab_size: int = config["vocab_size"]
        self.engine_args = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "max_num_seqs": args.max_num_seqs,
            "max_num_batched_tokens": self.sizes.max_num_batched_tokens,
            "block_size": 16,
            "enforce_eager": args.eager,
            "use_tqdm_on_load": False,
        } | args.engine_args
        for path in filter(None, (args.json, args.profile, args.trace)):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = []
        self.errors: dict[str, str] = {}
        self.info: dict[str, Any] = {
            "torch": torch.__version__,
            "model": self.model,
            "engine_args": self.engine_args,
        }
        self._ids = torch.Generator().manual_seed(1)
        self._num_requests = 0

    # ---- Bookkeeping ----

    def time_left(self) -> float:
        """Seconds until --max-seconds."""
        return float(self.args.deadline - time.monotonic())

    def add(self, metric: str, runs: list[float], roofline: float | None = None, note: str = "") -> None:
        """Keep a metric and print its line."""
        row = Row(metric, runs, roofline, *REFERENCE.get((self.model, metric), (None, None)), note)
        self.rows.append(row)
        print(row.as_line(), flush=True)

    def attempt(self, name: str, workload: Callable[[], None]) -> None:
        """Run a workload; whatever it raises is kept, not passed on. Writes the JSON file."""
        start = time.monotonic()
        try:
            if self.time_left() <= 0:
                raise OutOfTime
            workload()
        except OutOfTime:
            self.errors[name] = "left out: --max-seconds"
        except Exception:
            self.errors[name] = traceback.format_exc()
            print(f"{name} failed:\n{self.errors[name]}", file=sys.stderr, flush=True)
            self._clear()
        self.info.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
        if self.args.json:
            content = self.info | {"rows": [row.as_json() for row in self.rows], "errors": self.errors}
            self.args.json.write_text(json.dumps(content, indent=1))

    def repeated(self, run: Callable[[], float], repeats: int | None = None, least_s: float = 0) -> list[float]:
        """Return the results of --repeats runs, or of as many as there is time for.

        Raises:
            OutOfTime: there is not even time for one, which takes `least_s` seconds at best.
        """
        results: list[float] = []
        if self.time_left() <= least_s:
            raise OutOfTime
        for _ in range(repeats or self.args.repeats):
            start = time.monotonic()
            results.append(run())
            if self.time_left() < 1.2 * (time.monotonic() - start):
                break
        return results

    def _clear(self) -> None:
        """End what a failed workload has left, so that the next one can run."""
        if not hasattr(self, "engine"):
            return
        try:
            self.engine.abort_request([f"r{i}" for i in range(self._num_requests)])
            while self.engine.has_unfinished_requests():
                self.engine.step()
        except Exception:
            self.errors["after a failure"] = traceback.format_exc()

    # ---- Requests ----

    def measure_device(self) -> None:
        """Find out what the roofline is made of."""
        self.gpu = torch.cuda.is_available()
        self.roofline = Roofline(self.config, Ceiling.measure("cuda" if self.gpu else "cpu"))
        self.info["device"] = torch.cuda.get_device_name() if self.gpu else "cpu"
        self.info |= asdict(self.roofline.ceiling)

    def start_engine(self) -> None:
        """Load the model."""
        start = time.monotonic()
        self.engine = LLM(self.folder, **self.engine_args).llm_engine
        self.info["engine_seconds"] = time.monotonic() - start
        self.info["startup_report"] = self.engine.startup_report

    def token_ids(self, length: int) -> list[int]:
        """Return `length` random ids, never the same ones again."""
        return torch.randint(0, self.vocab_size, (length,), generator=self._ids).tolist()

    def queue(self, prompt: list[int], max_tokens: int, **params: Any) -> None:
        """Add a request; its output comes when it is complete, unless params say otherwise."""
        defaults = {"temperature": 0, "ignore_eos": True, "detokenize": False}
        params = defaults | {"output_kind": RequestOutputKind.FINAL_ONLY} | params
        prompt_dict = {"prompt_token_ids": prompt}
        self.engine.add_request(f"r{self._num_requests}", prompt_dict, SamplingParams(max_tokens=max_tokens, **params))
        self._num_requests += 1

    def finish(self) -> tuple[int, int]:
        """Step until all requests have ended; return (output tokens, steps)."""
        num_tokens = num_steps = 0
        while self.engine.has_unfinished_requests():
            num_steps += 1
            for output in self.engine.step():
                num_tokens += sum(len(sample.token_ids) for sample in output.outputs)
        return num_tokens, num_steps

    def generate(self, prompts: list[list[int]], max_tokens: Sequence[int], **params: Any) -> tuple[float, int]:
        """Return (seconds, steps) of the requests, queued together."""
        start = time.perf_counter()
        for prompt, limit in zip(prompts, max_tokens, strict=True):
            self.queue(prompt, limit, **params)
        num_tokens, num_steps = self.finish()
        seconds = time.perf_counter() - start
        if num_tokens != sum(max_tokens):
            raise RuntimeError(f"{num_tokens} output tokens instead of {sum(max_tokens)}.")
        return seconds, num_steps

    def start_decoding(self, batch: int, input_len: int, output_len: int) -> int:
        """Queue requests and step until all decode; return the number of steps in which they surely all do."""
        self.engine.reset_prefix_cache()
        for _ in range(batch):
            self.queue(self.token_ids(input_len), output_len)
        scheduler: Any = self.engine.engine_core.engine_core.scheduler
        while True:
            self.engine.step()
            counts = [request.num_output_tokens for request in scheduler.running]
            if len(counts) == batch and min(counts) > 0:
                # Two of a request's tokens may be in flight already.
                return int(output_len - max(counts) - 2)
            if not self.engine.has_unfinished_requests():
                raise RuntimeError(f"{batch} requests of {input_len} + {output_len} tokens never decode together.")

    # ---- Workloads ----

    def throughput(self, name: str) -> None:
        """A, B and C."""
        num_seqs = self.sizes.throughput[name]
        input_lens, output_lens = draw_lengths(num_seqs, *self.sizes.lengths)
        steps = []

        def run(limit: int = 1 << 30) -> float:
            self.engine.reset_prefix_cache()
            prompts = [self.token_ids(n) for n in input_lens]
            limits = [min(n, limit) for n in output_lens]
            seconds, num_steps = self.generate(prompts, limits, temperature=0.6)
            steps.append(num_steps)
            return sum(limits) / seconds

        run(limit=8)
        least_s = self.roofline.throughput(input_lens, output_lens)
        runs = self.repeated(run, least_s=least_s)
        roofline = sum(output_lens) / least_s
        seconds = sum(output_lens) / statistics.median(runs)
        note = f"{seconds:.2f} s, {steps[-1]} steps of {seconds / steps[-1] * 1e3:.2f} ms"
        self.add(f"{name}: output tok/s", runs, roofline, note)

    def stream(self) -> None:
        """D."""
        input_len, output_len = self.sizes.stream
        long_prompt = self.sizes.long_prompt

        def run(num_in: int, num_out: int) -> tuple[float, float]:
            """Return seconds to the first token, and per token after it."""
            self.engine.reset_prefix_cache()
            prompt = self.token_ids(num_in)
            start = time.perf_counter()
            self.queue(prompt, num_out, output_kind=RequestOutputKind.DELTA)
            while not self.engine.step():
                pass
            first = time.perf_counter()
            self.finish()
            return first - start, (time.perf_counter() - first) / max(1, num_out - 1)

        run(input_len, output_len)
        runs = self.repeated(lambda: run(input_len, output_len)[1] * 1e3)
        context = input_len + output_len / 2
        self.add("D: ms per output token", runs, self.roofline.decode(1, context) * 1e3)
        run(long_prompt, 1)
        runs = self.repeated(lambda: run(long_prompt, 1)[0] * 1e3, 3 * self.args.repeats)
        self.add(f"D: first token of {long_prompt}, ms", runs, self.roofline.prefill(long_prompt) * 1e3)

    def decode_steps(self, batch: int) -> None:
        """One batch size of `steps`."""
        input_len, output_len = self.sizes.step_lengths
        parts: list[tuple[float, float, float]] = []

        def run() -> float:
            num_steps = self.start_decoding(batch, input_len, output_len)
            core_time = CallTimes((self.engine.engine_core, "get_output"))
            launch_time = CallTimes((torch.cuda.CUDAGraph, "replay"))
            with host_waits() as waits, core_time, launch_time:
                start = time.perf_counter()
                for _ in range(num_steps):
                    self.engine.step()
                seconds = time.perf_counter() - start
            self.finish()
            core = core_time.seconds - waits.seconds - launch_time.seconds
            outputs = seconds - core_time.seconds
            parts.append((core / num_steps, launch_time.seconds / num_steps, outputs / num_steps))
            return seconds / num_steps * 1e3

        run()
        parts.clear()
        runs = self.repeated(run)
        roofline = self.roofline.decode(1, batch * (input_len + output_len / 2)) * 1e3
        core, launches, outputs = (statistics.median(part) * 1e3 for part in zip(*parts, strict=True))
        note = f"host: schedule, prepare, update {core:.3f} ms, launches {launches:.3f}, outputs {outputs:.3f}"
        self.add(f"steps: ms, batch {batch}", runs, roofline, note)

    def shared_prefix(self) -> None:
        """E."""
        num_requests, shared, own = self.sizes.shared
        runs: dict[str, list[float]] = {"cold": [], "warm": [], "unshared": []}

        def run() -> float:
            self.engine.reset_prefix_cache()
            prefix = self.token_ids(shared)
            whole = 0.0
            for kind in runs:
                start = [] if kind == "unshared" else prefix
                prompts = [start + self.token_ids(shared + own - len(start)) for _ in range(num_requests)]
                seconds, _ = self.generate(prompts, [1] * num_requests)
                runs[kind].append(seconds)
                whole += seconds
            return whole

        run()
        for values in runs.values():
            values.clear()
        self.repeated(run)
        warm = num_requests * self.roofline.prefill(own, shared)
        cold, unshared = warm + self.roofline.prefill(shared), num_requests * self.roofline.prefill(shared + own)
        for (kind, values), roofline in zip(runs.items(), (cold, warm, unshared), strict=True):
            self.add(f"E: {kind} s", values, roofline)

    def startup(self) -> None:
        """S; before this process has an engine, which would hold the memory."""
        phases: dict[str, Any] = {}

        def run(kind: str, caches: dict[str, str]) -> float:
            if self.time_left() <= 0:
                raise OutOfTime
            env = os.environ | caches
            env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
            command = [sys.executable, "-c", STARTUP_SCRIPT, self.folder, json.dumps(self.engine_args)]
            start = time.monotonic()
            limit = min(self.time_left(), STARTUP_LIMIT_S)
            result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit)
            lines = [line for line in result.stdout.splitlines() if line.startswith("STARTUP ")]
            if result.returncode or not lines:
                raise RuntimeError(f"start-up, {kind}, rc {result.returncode}:\n{result.stderr[-3000:]}")
            phases[kind] = json.loads(lines[-1].removeprefix("STARTUP "))
            return float(phases[kind]["at"] - start)

        def note(kind: str) -> str:
            return ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases[kind]["phases"].items())

        self.info["startup"] = phases
        with tempfile.TemporaryDirectory() as folder:
            caches = {name: str(Path(folder) / name.lower()) for name in KERNEL_CACHES} if self.args.cold else {}
            first = run("cold", caches)
            if self.args.cold:
                self.add("S: cold s", [first], note=note("cold"))
            self.add("S: warm s", self.repeated(lambda: run("warm", caches)), note=note("warm"))

    # ---- Profile ----

    def profile(self, batch: int) -> None:
        """Profile steady decode steps; adds the text to --profile's file."""
        num_steps, input_len = self.sizes.profiled_steps, self.sizes.step_lengths[0]
        self.start_decoding(batch, input_len, 2 * num_steps + NUM_TRACED_STEPS + 20)
        self._profiled(2)  # the profiler's own start-up
        with host_waits() as waits:
            start = time.perf_counter()
            for _ in range(num_steps):
                self.engine.step()
            step_us = (time.perf_counter() - start) / num_steps * 1e6
        host_us = step_us - waits.seconds / num_steps * 1e6
        if self.args.profile:
            report = ProfileReport(self._profiled(num_steps).events(), num_steps)
            text = f"---- batch {batch} ----\n{report.text(step_us, host_us)}\n"
            print(text, flush=True)
            with self.args.profile.open("a") as file:
                file.write(text)
            self.info.setdefault("profile", {})[batch] = text
            if report.num_kernels:
                idle = 100 - 100 * report.busy_us / report.window_us
                note = f"{100 - 100 * report.busy_us / num_steps / step_us:.1f}% of a step without the profiler"
                self.add(f"profile: GPU idle %, batch {batch}", [idle], note=note)
        if self.args.trace:
            path = self.args.trace
            stem, _, suffix = path.name.partition(".")
            self._profiled(NUM_TRACED_STEPS).export_chrome_trace(
                str(path.with_name(f"{stem}_batch{batch}.{suffix or 'json'}"))
            )
        self.finish()

    def _profiled(self, num_steps: int) -> torch.profiler.profile:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(num_steps):
                self.engine.step()
        return cast("torch.profiler.profile", profiler)


def draw_lengths(num_seqs: int, low: int, high: int) -> tuple[list[int], list[int]]:
    """Return input and output lengths after random.seed(0).

    Token ids of 0 to 10000 are drawn between the input lengths, as in nano-vLLM's benchmark: the same lengths.
    """
    random.seed(0)
    input_lens = []
    for _ in range(num_seqs):
        input_lens.append(random.randint(low, high))
        for _ in range(input_lens[-1]):
            random.randint(0, 10000)
    return input_lens, [random.randint(low, high) for _ in range(num_seqs)]


def run_workloads(bench: Bench) -> None:
    """Run what the arguments ask for: S before the engine starts, the profile, which slows down the rest, last."""
    names: list[str] = bench.args.workloads
    if "S" in names:
        bench.attempt("S", bench.startup)
    bench.measure_device()
    if names == ["S"] and not (bench.args.profile or bench.args.trace):
        return
    bench.attempt("engine", bench.start_engine)
    if not hasattr(bench, "engine"):
        return
    workloads: dict[str, Callable[[], None]] = {"D": bench.stream, "E": bench.shared_prefix}
    for name in names:
        if name in bench.sizes.throughput:
            bench.attempt(name, lambda name=name: bench.throughput(name))  # type: ignore[misc]
        elif name == "steps":
            for batch in bench.sizes.batches:
                if batch <= bench.args.max_num_seqs:
                    bench.attempt(f"steps, batch {batch}", lambda batch=batch: bench.decode_steps(batch))  # type: ignore[misc]
        elif name in workloads:
            bench.attempt(name, workloads[name])
    if bench.gpu:
        bench.info["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    if bench.args.profile or bench.args.trace:
        for batch in bench.sizes.profiled_batches:
            if batch <= bench.args.max_num_seqs:
                bench.attempt(f"profile, batch {batch}", lambda batch=batch: bench.profile(batch))  # type: ignore[misc]


def print_table(bench: Bench) -> None:
    """Print the result, a line per metric."""
    ceiling = bench.roofline.ceiling
    print(
        f"\nQwen3-{bench.model} on {bench.info['device']}, torch {torch.__version__}, "
        f"{'eager' if bench.args.eager else 'graphs'}, max_num_seqs {bench.args.max_num_seqs}; "
        f"copy {ceiling.bytes_per_s / 1e12:.3f} TB/s, matmul {ceiling.flops_per_s / 1e12:.0f} TFLOP/s"
    )
    print(TABLE_HEAD)
    for row in bench.rows:
        print(row.as_line())
    for name, error in bench.errors.items():
        print(f"{name}: {error.strip().splitlines()[-1][:150]}")


def parse_args() -> argparse.Namespace:
    """Return the arguments, checked and completed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("0.6B", "8B"), default="0.6B")
    names = ("A", "B", "C", "D", "steps", "E", "S")
    parser.add_argument("--workloads", nargs="*", choices=names, default=["D", "steps", "E", "A"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="results, written again after each workload")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="start nothing that would end later")
    parser.add_argument("--max-num-seqs", type=int, help="default: 1024 if B is among the workloads, else 256")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--cold", action=argparse.BooleanOptionalAction, default=True, help="S also with empty caches")
    parser.add_argument("--profile", type=Path, help="text file for the profile of decode steps")
    parser.add_argument("--trace", type=Path, help="Chrome trace of three decode steps (.json or .json.gz)")
    parser.add_argument("--engine-args", type=json.loads, default={}, help='e.g. \'{"attention_backend": "paged"}\'')
    parser.add_argument("--bits", type=int, choices=(4, 8), help="GPTQ weights, symmetric, in groups of 128")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short workloads, to try this script")
    args = parser.parse_args()
    args.deadline = time.monotonic() + args.max_seconds
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} must be at least 1")
    if "C" in args.workloads and args.model != "8B" and not args.tiny:
        parser.error("workload C is A with --model 8B")
    # On the larger model A has a name of its own.
    if args.model == "8B":
        args.workloads = ["C" if name == "A" else name for name in args.workloads]
    args.workloads = list(dict.fromkeys(args.workloads))
    if args.max_num_seqs is None:
        args.max_num_seqs = 16 if args.tiny else 1024 if "B" in args.workloads else 256
    if args.profile:
        args.profile.unlink(missing_ok=True)
    return args


def main() -> None:
    """See the module."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        run_workloads(bench)
        print_table(bench)
    sys.exit(any("left out" not in error for error in bench.errors.values()))


if __name__ == "__main__":
    main()
