"""What the step trace costs: the same steps with and without it, alternating, in one process.

    python tests/benchmark/step_trace_overhead.py [--pairs 7] [--batch 1 16 64] [--output-len 24] [--threads 2]

Two measurements per batch size of decoding requests:

- host: schedule() and update_from_output() alone with a fake model, in microseconds per step. Their difference is what
  the trace adds, with little noise.
- model: whole engine steps of SmolLM2-135M on the CPU, in milliseconds, medians over runs that alternate. Their
  difference carries the machine's noise; the host's difference as a share of such a step is the figure to trust.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from folovllm import LLM, SamplingParams
from folovllm.core.sched.interface import SchedulerInterface
from folovllm.core.sched.scheduler import Scheduler
from folovllm.core.sched.traced_scheduler import TracedScheduler
from tests.core_utils import create_scheduler, make_output, make_request

MODEL = "smollm2-135m-instruct"
TARGET_PERCENT = 2.0


def host_step_us(batch: int, path: str | None, num_steps: int) -> float:
    """Return the median time of schedule + update of `batch` decodes, blocks being allocated and cached on the way."""
    plain = create_scheduler(
        num_blocks=batch * 40, max_num_seqs=batch, max_num_batched_tokens=8192, enable_prefix_caching=True
    )
    scheduler: SchedulerInterface = plain if path is None else TracedScheduler(plain, path)
    for i in range(batch):
        # Lengths apart, so that every step has requests that need a new block.
        prompt = [(i * 31 + j) % 97 for j in range(17 + i % 16)]
        scheduler.add_request(make_request(str(i), prompt, max_tokens=num_steps + 2, ignore_eos=True))
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        output = scheduler.schedule()
        scheduled = time.perf_counter()
        sampled = make_output(output)
        updating = time.perf_counter()
        scheduler.update_from_output(output, sampled)
        times.append(time.perf_counter() - updating + scheduled - start)
    scheduler.shutdown()
    return statistics.median(times[1:]) * 1e6


def model_step_ms(llm: LLM, plain: Scheduler, batch: int, output_len: int, path: str | None) -> float:
    """Return the median time of an engine step in which `batch` requests decode."""
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    engine.reset_prefix_cache()
    core.scheduler = plain if path is None else TracedScheduler(plain, path)
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    for i in range(batch):
        prompt = [(i * 31 + j * 7) % 40000 + 100 for j in range(32)]
        engine.add_request(f"bench-{i}", {"prompt_token_ids": prompt}, params)
    times = []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    while plain.has_requests():
        engine.step()  # the worker forgets the requests
    if path is not None:
        core.scheduler.shutdown()
        core.scheduler = plain
    return statistics.median(times[1:-1]) * 1e3


def alternate(pairs: int, measure: Callable[[bool], float]) -> tuple[float, float, float]:
    """Return (median off, median on, median of the differences of pairs); the order changes from pair to pair."""
    off, on = [], []
    for pair in range(pairs + 1):
        for traced in (False, True) if pair % 2 else (True, False):
            value = measure(traced)
            if pair:  # the first pair warms up
                (on if traced else off).append(value)
    added = statistics.median(b - a for a, b in zip(off, on, strict=True))
    return statistics.median(off), statistics.median(on), added


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--output-len", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--host-only", action="store_true", help="leave the model out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    llm = None
    if not args.host_only:
        llm = LLM(MODEL, max_model_len=256, kv_cache_memory_bytes=1 << 28, max_num_seqs=max(args.batch))
    with tempfile.TemporaryDirectory() as folder:
        for batch in args.batch:
            report(llm, batch, args, str(Path(folder) / "trace.jsonl"))


def report(llm: LLM | None, batch: int, args: argparse.Namespace, path: str) -> None:
    """Measure and print one batch size."""
    off, on, added = alternate(args.pairs, lambda traced: host_step_us(batch, path if traced else None, 64))
    print(f"batch {batch:3}  host : off {off:7.0f} us/step, on {on:7.0f}, added {added:7.0f}", flush=True)
    if llm is None:
        return
    plain = llm.llm_engine.engine_core.engine_core.scheduler
    assert isinstance(plain, Scheduler)
    step_off, step_on, step_added = alternate(
        args.pairs, lambda traced: model_step_ms(llm, plain, batch, args.output_len, path if traced else None)
    )
    percent = added / (step_off * 1e3) * 100
    print(
        f"           model: off {step_off:7.2f} ms/step, on {step_on:7.2f}, added {step_added:7.2f}; "
        f"host's added time / step = {percent:.2f}% (target < {TARGET_PERCENT}%)",
        flush=True,
    )


if __name__ == "__main__":
    main()
