"""FoloVLLM on the CPU beside vLLM's CPU build and transformers: the same workloads, engines alternating (A B A B ...).

    python tests/benchmark/cpu_throughput.py [--engines folovllm vllm transformers] [--workloads single b c d s p]
        [--vllm-python PATH] [--vllm-eager] [--hf-model DIR] [--pairs 5] [--startup-runs 3] [--json FILE]

Workloads (random token ids, fresh ones in every round but the same for all engines; greedy, end-of-sequence ignored):

    single  one request, 128 tokens in, 128 out; and 128 in, 1 out, the time to the first token
    b       16 requests, 128 in, 64 out
    c       32 requests, in randint(32, 512), out randint(16, 128) after random.seed(0)
    d       16 requests that share 512 tokens and have 32 of their own, 8 out: cold, then warm (other own tokens)
    s       b's 16 requests at once, against --serial-requests like them one at a time
    p       one request of 512 + 32 tokens, 1 out: cold, then with the 512 cached (other own tokens)

SmolLM2-135M-Instruct in bfloat16. FoloVLLM reads the built-in GGUF file; the others a dequantized Hugging
Face copy of it, made in --hf-model (or a temporary folder) where that holds none. Every engine lives in a process of
its own, all are loaded at once, and those that are not measured are stopped (SIGSTOP), so that no idle thread spins.
Each timed run follows a few untimed tokens; a first round, of every workload, is thrown away. Tokens counted are those
asked for: what a padded batch computes beyond them is its own loss. vLLM gets every core, no second process and
--kv-gib of cache, and is compiled unless --vllm-eager.

Prints a line per run on stderr, then a Markdown table: medians (minimum to maximum) of --pairs rounds, the median of
the rounds' ratios, targets. Memory is resident bytes less the resident pages of the KV cache. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m-instruct"
WORKER = Path(__file__).with_name("cpu_throughput_worker.py")
ROOT = Path(__file__).parents[2]
OURS = "folovllm"
RUNS_ON = {  # engines without a prefix cache have nothing to show in d and p
    "single": ("folovllm", "vllm", "transformers"),
    "b": ("folovllm", "vllm", "transformers"),
    "c": ("folovllm", "vllm", "transformers"),
    "d": ("folovllm", "vllm"),
    "s": ("folovllm",),
    "p": ("folovllm", "vllm"),
}
TARGETS: dict[
    tuple[str, str | None], tuple[str, float]
] = {  # (metric, peer) -> bound on the ratio ours / peer's, or with peer None on our own value
    ("single: decode tok/s", "vllm"): (">=", 1.0),
    ("b: output tok/s", "vllm"): (">=", 1.1),
    ("c: output tok/s", "vllm"): (">=", 1.1),
    ("c: output tok/s", "transformers"): (">=", 4.0),
    ("d: warm s", "vllm"): ("<=", 0.8),
    ("s: batch / one at a time", None): (">=", 5.0),
    ("p: TTFT cold / warm", None): (">=", 5.0),
    ("import to first token s", None): ("<=", 6.0),
    ("memory without KV, end, GiB", None): ("<=", 1.2),
}
COPY_SCRIPT = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from folovllm.model_executor.model_loader.source import resolve_model_source
source, folder = resolve_model_source(sys.argv[1]), Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
weights = {name: tensor.bfloat16().contiguous() for name, tensor in source.weights(torch.bfloat16)}
save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
(folder / "config.json").write_text(json.dumps(source.hf_config() | {"torch_dtype": "bfloat16"}))
"""


@dataclass(frozen=True)
class Job:
    """Requests that are timed together; the fields are the worker's."""

    prompts: list[list[int]]
    max_tokens: list[int]
    reset: bool = True
    serial: bool = False
    warm_up: bool = True


class EngineProcess:
    """A worker, stopped unless it has a question to answer."""

    def __init__(self, name: str, python: str, env: dict[str, str], log: Path) -> None:
        """Start it; what it prints goes to `log`."""
        self.name, self.log = name, log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [python, str(WORKER), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ | env,
                start_new_session=True,
            )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Wake it, send the request, wait for the answer, stop it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise SystemExit(f"{self.name} ended:\n{tail}")
        os.killpg(self.process.pid, signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def random_ids(rng: random.Random, count: int) -> list[int]:
    """Return token ids that are neither special nor rare."""
    return [rng.randrange(100, 40000) for _ in range(count)]


def make_jobs(workload: str, seed: int, serial_requests: int) -> dict[str, Job]:
    """Return the jobs of one round, in order; see the top of this file."""
    rng = random.Random(f"{workload}-{seed}")
    if workload == "single":
        return {
            "first": Job([random_ids(rng, 128)], [1]),
            "whole": Job([random_ids(rng, 128)], [128]),
        }
    if workload in ("b", "s"):
        batch = Job([random_ids(rng, 128) for _ in range(16)], [64] * 16)
        if workload == "b":
            return {"batch": batch}
        alone = [random_ids(rng, 128) for _ in range(serial_requests)]
        return {"batch": batch, "serial": Job(alone, [64] * serial_requests, serial=True)}
    if workload == "c":
        random.seed(0)
        lengths = [(random.randint(32, 512), random.randint(16, 128)) for _ in range(32)]
        return {"batch": Job([random_ids(rng, n) for n, _ in lengths], [out for _, out in lengths])}
    shared = random_ids(rng, 512)
    count, out = (16, 8) if workload == "d" else (1, 1)
    return {
        name: Job([shared + random_ids(rng, 32) for _ in range(count)], [out] * count, reset=name == "cold")
        for name in ("cold", "warm")
    }


def metrics(workload: str, jobs: dict[str, Job], seconds: dict[str, float]) -> dict[str, float]:
    """Turn the seconds of a round into figures."""
    rate = {name: sum(jobs[name].max_tokens) / seconds[name] for name in jobs}
    if workload == "single":
        return {
            "single: decode tok/s": 127 / (seconds["whole"] - seconds["first"]),
            "single: output tok/s": rate["whole"],
            "single: TTFT(128) ms": seconds["first"] * 1e3,
        }
    if workload in ("b", "c"):
        return {f"{workload}: output tok/s": rate["batch"]}
    if workload == "d":
        return {"d: cold s": seconds["cold"], "d: warm s": seconds["warm"]}
    if workload == "s":
        return {
            "s: batch tok/s": rate["batch"],
            "s: one at a time tok/s": rate["serial"],
            "s: batch / one at a time": rate["batch"] / rate["serial"],
        }
    return {
        "p: TTFT cold ms": seconds["cold"] * 1e3,
        "p: TTFT warm ms": seconds["warm"] * 1e3,
        "p: TTFT cold / warm": seconds["cold"] / seconds["warm"],
    }


def start_engine(name: str, args: argparse.Namespace, hf_model: str, folder: Path) -> tuple[EngineProcess, Any]:
    """Start and load one engine; return it and {import_s, load_s, first_token_s, spawn_to_first_s, ...}."""
    cores = sorted(os.sched_getaffinity(0))
    contiguous = cores == list(range(cores[0], cores[-1] + 1))
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    python = args.python
    if name == "vllm":
        python = args.vllm_python
        env |= {
            "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}" if contiguous else ",".join(map(str, cores)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": f"{args.kv_gib:g}",
            "VLLM_NO_USAGE_STATS": "1",
        }
        env |= dict(pair.split("=", 1) for pair in args.vllm_env)
    else:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start = time.perf_counter()
    engine = EngineProcess(name, python, env, folder / f"{name}.log")
    info = engine.ask(op="load", model=MODEL if name == OURS else hf_model, kv_gib=args.kv_gib, eager=args.vllm_eager)
    first = Job([random_ids(random.Random(1), 128)], [1], reset=False, warm_up=False)
    info["first_token_s"] = engine.ask(op="run", **asdict(first))["seconds"]
    info["spawn_to_first_token_s"] = time.perf_counter() - start
    info["import_to_first_token_s"] = info["import_s"] + info["load_s"] + info["first_token_s"]
    note(f"{name} started: {json.dumps(info)}")
    return engine, info


def measure(engines: dict[str, EngineProcess], args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Run the rounds; return metric -> engine -> a value per round."""
    samples: dict[str, dict[str, list[float]]] = {}
    for round_ in range(args.pairs + 1):
        for workload in args.workloads:
            jobs = make_jobs(workload, round_, args.serial_requests)
            for name in [n for n in engines if n in RUNS_ON[workload]]:
                seconds = {job: engines[name].ask(op="run", **asdict(jobs[job]))["seconds"] for job in jobs}
                figures = metrics(workload, jobs, seconds)
                shown = ", ".join(f"{metric} {value:.2f}" for metric, value in figures.items())
                note(f"round {round_}{' (warm-up)' if round_ == 0 else ''} {name}: {shown}")
                for metric, value in figures.items() if round_ else ():
                    samples.setdefault(metric, {}).setdefault(name, []).append(value)
    return samples


def summarize(samples: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return metric -> {engines: {median, min, max, values}, ratios: {peer: {median, min, max}}}."""
    summary: dict[str, Any] = {}
    for metric, by_engine in samples.items():
        entry: dict[str, Any] = {"engines": {n: spread(values) | {"values": values} for n, values in by_engine.items()}}
        ours = by_engine.get(OURS, [])
        entry["ratios"] = {
            peer: spread([a / b for a, b in zip(ours, values, strict=True)])
            for peer, values in by_engine.items()
            if ours and peer != OURS and len(ours) == len(values)
        }
        summary[metric] = entry
    return summary


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def markdown(summary: dict[str, Any], engines: Sequence[str]) -> Iterator[str]:
    """Yield the table's lines."""
    peers = [name for name in engines if name != OURS]
    yield "| " + " | ".join(["metric", *engines, *(f"ours / {p}" for p in peers), "target"]) + " |"
    yield "|---" * (2 + len(engines) + len(peers)) + "|"
    for metric, entry in summary.items():
        cells = [metric]
        for name in engines:
            cells.append(show(entry["engines"][name]) if name in entry["engines"] else "")
        for peer in peers:
            cells.append(show(entry["ratios"][peer]) if peer in entry["ratios"] else "")
        verdicts = []
        for (target, rival), (sign, bound) in TARGETS.items():
            source = entry["engines"].get(OURS) if rival is None else entry["ratios"].get(rival)
            if target == metric and source is not None:
                met = source["median"] >= bound if sign == ">=" else source["median"] <= bound
                against = f" against {rival}" if rival else ""
                verdicts.append(f"{sign} {bound:g}{against}: {'met' if met else 'MISSED'}")
        yield "| " + " | ".join([*cells, "; ".join(verdicts)]) + " |"


def show(values: dict[str, float]) -> str:
    """Return "median (min to max)" with about three digits."""

    def digits(x: float) -> str:
        return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"

    if values["min"] == values["max"]:
        return digits(values["median"])
    return f"{digits(values['median'])} ({digits(values['min'])} to {digits(values['max'])})"


def note(text: str) -> None:
    """Tell how it goes."""
    print(text, file=sys.stderr, flush=True)


def parse_args() -> argparse.Namespace:
    """Return the arguments, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=("folovllm", "vllm", "transformers"))
    parser.add_argument("--workloads", nargs="+", choices=tuple(RUNS_ON), default=list(RUNS_ON))
    parser.add_argument("--python", default=sys.executable, help="runs folovllm and transformers")
    parser.add_argument("--vllm-python", help="runs vllm: the Python of an environment with vLLM's CPU build")
    parser.add_argument("--vllm-eager", action="store_true", help="do not compile")
    parser.add_argument("--vllm-env", action="append", default=[], metavar="NAME=VALUE", help="for vLLM's process")
    parser.add_argument("--hf-model", type=Path, help="Hugging Face copy of the model; made there if absent")
    parser.add_argument("--kv-gib", type=float, default=4, help="KV cache of folovllm and of vllm")
    parser.add_argument("--pairs", type=int, default=5, help="rounds that count")
    parser.add_argument("--serial-requests", type=int, default=4, help="requests of s that run one at a time")
    parser.add_argument("--startup-runs", type=int, default=3, help="fresh processes of folovllm, start to first token")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.engines is None:
        args.engines = ["folovllm", *(["vllm"] if args.vllm_python else []), "transformers"]
    if "vllm" in args.engines and not args.vllm_python:
        parser.error("--engines vllm needs --vllm-python PATH")
    if args.pairs < 1 or args.startup_runs < 1 or args.serial_requests < 1:
        parser.error("--pairs, --startup-runs and --serial-requests must be at least 1")
    if any("=" not in pair for pair in args.vllm_env):
        parser.error("--vllm-env takes NAME=VALUE")
    return args


def main() -> None:
    """Start the engines, run the rounds, print."""
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    samples: dict[str, dict[str, list[float]]] = {}
    start_up: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hf_model = args.hf_model or folder / "hf"
        if set(args.engines) - {OURS} and not (hf_model / "config.json").is_file():
            env = os.environ | {"PYTHONPATH": str(ROOT)}
            subprocess.run([args.python, "-c", COPY_SCRIPT, MODEL, str(hf_model)], check=True, env=env)
        engines: dict[str, EngineProcess] = {}
        started: dict[str, list[float]] = {}
        for name in args.engines:
            for run in range(args.startup_runs if name == OURS else 1):
                if run:
                    engines[name].close()
                engines[name], start_up[name] = start_engine(name, args, str(hf_model), folder)
                stack.callback(engines[name].close)
                started.setdefault(name, []).append(start_up[name]["import_to_first_token_s"])
        after_load = {name: engine.ask(op="memory") for name, engine in engines.items()}
        samples = measure(engines, args)
        at_end = {name: engine.ask(op="memory") for name, engine in engines.items()}
    samples["import to first token s"] = started
    for when, by_engine in (("after load", after_load), ("end", at_end)):
        samples[f"memory without KV, {when}, GiB"] = {
            name: [(m["rss"] - m["kv_resident"]) / 2**30] for name, m in by_engine.items()
        }
    samples["memory peak with KV, GiB"] = {name: [m["peak_rss"] / 2**30] for name, m in at_end.items()}
    summary = summarize(samples)
    if args.json:
        result = {
            "pairs": args.pairs,
            "cores": len(os.sched_getaffinity(0)),
            "machine": platform.processor() or platform.machine(),
            "start_up": start_up,
            "memory": {"after load": after_load, "end": at_end},
            "metrics": summary,
        }
        args.json.write_text(json.dumps(result, indent=1))
    print("\n".join(markdown(summary, args.engines)))


if __name__ == "__main__":
    main()
