"""What the engine costs around the model: schedule + prepare + update of a step, with a fake model, on the CPU.

    python tests/benchmark/engine_overhead.py [--batch 256] [--steps 300] [--pairs 5] [--queued 100 10000]
        [--async-scheduling] [--profile] [--json FILE]

LLMEngine.step() itself runs, with the real scheduler, KV cache manager (prefix caching on), worker and model runner;
only the model is a stub that returns the same hidden states and logits at once. The requests decode greedily, without
text; in every step a sixteenth of them fill a block, which is hashed, and need another. Parts, in ms per step:

    schedule         Scheduler.schedule
    update states    ModelRunner._update_states: the scheduler's deltas
    prepare inputs   ModelRunner._prepare_inputs: ids, positions, slots, block table, the attention backend's metadata
    sample           ModelRunner._sample: the sampler (on a vocabulary of 64, so next to no arithmetic), placeholders
    rest of runner   what else ModelRunner.execute_model does, the stub's time left out
    get output       StepInFlight.get_output: tokens to the host's lists
    update           Scheduler.update_from_output
    total            all of these, per step: the figure with the target
    front            the rest of LLMEngine.step, not in total: a RequestOutput per request, the calls between layers,
                     and most of Python's garbage collection

Then the same with requests queued behind the running ones, runs alternating: `steady`, where nobody ends, and `churn`,
where 1 request in 32 ends in each step, the next in the queue takes its place, and the queue is filled up again
(outside the clock). Prints p50 and p99 over all steps, and the ratio of the p50s of the two queues, pair by pair; a
Markdown table last.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import itertools
import json
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from folovllm import LLM, SamplingParams
from folovllm.worker.model_runner import ModelRunner
from folovllm.worker.step_in_flight import StepInFlight

TARGET_MS = 1.0
PARTS = ("schedule", "update states", "prepare inputs", "sample", "rest of runner", "get output", "update")
VOCAB_SIZE = 64
CHURN_STEPS = 32
PROMPT_LEN = 64
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
}


class Clock:
    """Seconds by part, of the calls that it wraps, since `take`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, method: str, part: str) -> None:
        """Time owner.method as `part` from now on; owner is an object, or a class."""
        call = getattr(owner, method)

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        """Return the seconds and start over."""
        seconds, self.seconds = self.seconds, {}
        return seconds


class StubModel:
    """Hands out rows of two tensors; callable like the model."""

    def __init__(self, max_tokens: int, clock: Clock) -> None:
        self.hidden = torch.zeros(max_tokens, 1)
        self.logits = torch.zeros(max_tokens, VOCAB_SIZE)
        self.logits[:, 7] = 1.0
        clock.wrap(self, "forward", "stub")
        clock.wrap(self, "compute_logits", "stub")

    def __call__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.forward(input_ids)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return [T, 1]."""
        return self.hidden[: input_ids.shape[0]]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [B, V]."""
        return self.logits[: hidden.shape[0]]


@dataclass
class Bench:
    """An engine with a stub model, `queued` requests behind `batch` running ones."""

    llm: LLM
    batch: int
    queued: int
    churn: bool
    clock: Clock
    ids: Any = field(default_factory=itertools.count)

    def add(self, num_requests: int, steps: int) -> None:
        """Queue requests that live `steps` steps, or with churn the next of 1 to CHURN_STEPS times."""
        for _ in range(num_requests):
            i = next(self.ids)
            length = steps
            if self.churn:  # the first ones end one after the other, those that follow take CHURN_STEPS each
                length = 1 + i * CHURN_STEPS // self.batch if i < self.batch else CHURN_STEPS
            params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
            # No two start alike, so that no prompt is in the cache; lengths apart, so that blocks fill at all steps.
            prompt = [i % 61, i // 61 % 61, i // 3721 % 61, *((i * 31 + j) % 61 for j in range(PROMPT_LEN + i % 16))]
            self.llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, params)

    def run(self, steps: int) -> list[dict[str, float]]:
        """Return milliseconds by part of `steps` steps."""
        engine = self.llm.llm_engine
        warm_up = 2 * CHURN_STEPS if self.churn else 8
        self.add(self.batch + self.queued, steps + warm_up + 10)
        rows = []
        for step in range(steps + warm_up):
            missing = self.batch + self.queued - engine.get_num_unfinished_requests()
            if missing:
                self.add(missing, steps)
            self.clock.take()
            start = time.perf_counter()
            engine.step()
            whole = time.perf_counter() - start
            if step >= warm_up:
                rows.append(split(self.clock.take(), whole))
        engine.abort_request(list(engine.output_processor.request_states))
        while engine.engine_core.engine_core.scheduler.has_requests():
            engine.step()
        engine.reset_prefix_cache()
        return rows


def split(seconds: dict[str, float], whole: float) -> dict[str, float]:
    """Return milliseconds of PARTS, "total" and "front" from what the clock saw in one step."""
    inner = sum(seconds.get(part, 0.0) for part in ("update states", "prepare inputs", "sample", "stub"))
    row = {part: seconds.get(part, 0.0) for part in PARTS}
    row["rest of runner"] = seconds["runner"] - inner
    row["total"] = sum(row[part] for part in PARTS)
    row["front"] = whole - row["total"] - seconds.get("stub", 0.0)
    return {part: value * 1e3 for part, value in row.items()}


def make_llm(folder: str, batch: int, use_async: bool, policy: str, clock: Clock) -> LLM:
    """Return an LLM whose model is the stub, its parts timed by `clock`."""
    llm = LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        device="cpu",
        dtype="float32",
        max_num_seqs=batch,
        max_num_batched_tokens=max(8192, batch),
        num_gpu_blocks_override=batch * 40,
        async_scheduling=use_async,
        scheduling_policy=policy,
        use_tqdm_on_load=False,
    )
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    clock.wrap(scheduler, "schedule", "schedule")
    clock.wrap(scheduler, "update_from_output", "update")
    runner: ModelRunner = engine.executor.worker.model_runner  # type: ignore[attr-defined]
    runner.model = StubModel(max(8192, batch), clock)  # type: ignore[assignment]
    for method, part in (
        ("_update_states", "update states"),
        ("_prepare_inputs", "prepare inputs"),
        ("_sample", "sample"),
        ("execute_model", "runner"),
    ):
        clock.wrap(runner, method, part)
    return llm


def p50(values: list[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def p99(values: list[float]) -> float:
    """Return the 99th percentile: 1 value in 100 is higher."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


def measure(
    args: argparse.Namespace, make: Callable[[str], LLM], clock: Clock
) -> tuple[dict[str, list[dict[str, float]]], dict[str, list[float]]]:
    """Return case -> rows of all steps, and churn or steady -> ratios of the p50s, longest queue to shortest."""
    rows: dict[str, list[dict[str, float]]] = {}
    ratios: dict[str, list[float]] = {}
    for policy in args.policies:
        llm = make(policy)
        ids = itertools.count()
        for pair, churn in itertools.product(range(args.pairs + 1), (False, True)):
            kind = f"{policy}, {'churn' if churn else 'steady'}"
            medians = {}
            for queued in dict.fromkeys([0, *args.queued]):
                if churn and not queued:
                    continue
                bench = Bench(llm, args.batch, queued, churn, clock)
                if not churn:
                    bench.ids = ids
                new = bench.run(args.steps if pair else 20)
                medians[queued] = p50([row["total"] for row in new])
                if pair:
                    rows.setdefault(f"{kind}, {queued} queued", []).extend(new)
            if pair:
                ratios.setdefault(kind, []).append(medians[max(args.queued)] / medians[min(args.queued)])
            print(f"pair {pair}: {kind}: p50 by queue {medians}", file=sys.stderr, flush=True)
    return rows, ratios


def profile(llm: LLM, args: argparse.Namespace, clock: Clock) -> None:
    """Print the functions that take most of a steady step, by their own time."""
    profiler = cProfile.Profile()
    bench = Bench(llm, args.batch, 0, False, clock)
    step = llm.llm_engine.step

    def profiled() -> Any:
        profiler.enable()
        try:
            return step()
        finally:
            profiler.disable()

    llm.llm_engine.step = profiled  # type: ignore[method-assign]
    bench.run(args.steps)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


def parse_args() -> argparse.Namespace:
    """Return the arguments, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300, help="measured steps of a run")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--queued", type=int, nargs=2, default=[100, 10_000], help="two queue lengths to compare")
    parser.add_argument("--policies", nargs="+", choices=("fcfs", "priority"), default=["fcfs"])
    parser.add_argument("--async-scheduling", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where the time of a steady step goes, and end")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if min(args.batch, args.steps, args.pairs, *args.queued) < 1:
        parser.error("--batch, --steps, --pairs and --queued must be at least 1")
    if args.steps > 500:
        parser.error("--steps must be at most 500: the stub's cache holds no longer requests")
    return args


def main() -> None:
    """Measure and print."""
    args = parse_args()
    clock = Clock()
    clock.wrap(StepInFlight, "get_output", "get output")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(TINY))

        def make(policy: str) -> LLM:
            return make_llm(folder, args.batch, args.async_scheduling, policy, clock)

        if args.profile:
            profile(make("fcfs"), args, clock)
            return
        rows, ratios = measure(args, make, clock)
    names = [*PARTS, "total", "front"]
    result = {
        case: {
            name: {"p50_ms": p50([row[name] for row in case_rows]), "p99_ms": p99([row[name] for row in case_rows])}
            for name in names
        }
        for case, case_rows in rows.items()
    }
    if args.json:
        summary = {"batch": args.batch, "steps": args.steps, "pairs": args.pairs, "cases": result, "ratios": ratios}
        args.json.write_text(json.dumps(summary, indent=1))
    print(f"| {args.batch} running: ms per step, p50 / p99 | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for case, parts in result.items():
        cells = [f"{parts[name]['p50_ms']:.3f} / {parts[name]['p99_ms']:.3f}" for name in names]
        print("| " + " | ".join([case, *cells]) + " |")
    steady = next(parts for case, parts in result.items() if case.endswith("steady, 0 queued"))
    met = "met" if steady["total"]["p50_ms"] <= TARGET_MS else "MISSED"
    print(f"\nTotal of a steady step, p50: {steady['total']['p50_ms']:.3f} ms, target <= {TARGET_MS} ms: {met}.")
    for kind, values in ratios.items():
        print(
            f"{kind}: p50 with {max(args.queued)} queued / {min(args.queued)}: median {p50(values):.3f} "
            f"({min(values):.3f} to {max(values):.3f})."
        )


if __name__ == "__main__":
    main()
