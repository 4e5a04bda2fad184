"""`folovllm bench latency`: one batch of equal requests, again and again (vLLM: `benchmarks/latency.py`).

Greedy, past any end-of-sequence token, new random token ids in every iteration: no prompt is found in the prefix cache.
"""

from __future__ import annotations

import argparse

from folovllm.benchmarks import workload

PERCENTILES = (10, 25, 50, 75, 90, 99)


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags, in vLLM's spelling and with its defaults."""
    group = parser.add_argument_group("workload")
    group.add_argument("--input-len", type=int, default=32, metavar="N", help="prompt tokens (default: 32)")
    group.add_argument("--output-len", type=int, default=128, metavar="N", help="output tokens (default: 128)")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="requests at once (default: 8)")
    group.add_argument("--num-iters-warmup", type=int, default=10, metavar="N", help="untimed runs (default: 10)")
    group.add_argument("--num-iters", type=int, default=30, metavar="N", help="timed runs (default: 30)")
    group.add_argument("--disable-detokenize", action="store_true", help="token ids only, no text")
    group.add_argument("--output-json", metavar="FILE", help="write the result")


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        ValueError: a flag, or the model, cannot be used.
    """
    # Not at the top: flags are added whenever the command `folovllm` starts, which must be quick.
    from tqdm.auto import tqdm

    from folovllm.benchmarks.metrics import percentile
    from folovllm.benchmarks.session import check_output, check_positive, session, write_session

    check_positive(args, ("input_len", "output_len", "batch_size", "num_iters"))
    check_positive(args, ("num_iters_warmup",), low=0)
    check_output(args)
    with session(args) as current:
        records = []
        current.check_lengths(args.input_len + args.output_len, "--input-len, --output-len")
        iterations = tqdm(range(-args.num_iters_warmup, args.num_iters), desc="Iterations", disable=None)
        for iteration in iterations:
            batch = workload.uniform(
                current.vocab_size,
                args.seed + args.num_iters_warmup + iteration,
                args.batch_size,
                args.input_len,
                args.output_len,
            )
            record = current.under_test.run(batch, current.make_params)
            if iteration >= 0:
                records.append(record)
        names = ("input_len", "output_len", "batch_size", "num_iters_warmup", "num_iters")
        result = write_session(args, "latency", current, records, {name: getattr(args, name) for name in names})
    figures = result.entries[0].workloads["uniform"]
    latencies = figures["duration_s"].values
    print(f"Avg latency: {sum(latencies) / len(latencies)} seconds")
    for percent in PERCENTILES:
        print(f"{percent}% percentile latency: {percentile(latencies, percent)} seconds")
    tokens = f", {figures['tpot_p50_ms'].median:.2f} ms per output token" if "tpot_p50_ms" in figures else ""
    print(f"TTFT {figures['ttft_p50_ms'].median:.1f} ms{tokens} (medians)")
    return 0
