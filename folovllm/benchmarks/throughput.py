"""`folovllm bench throughput`: many requests at once, how many tokens per second (vLLM: `benchmarks/throughput.py`).

Greedy, past any end-of-sequence token, random token ids. vLLM's command draws at temperature 1.
"""

from __future__ import annotations

import argparse

from folovllm.benchmarks import workload


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags, in vLLM's spelling."""
    group = parser.add_argument_group("workload")
    group.add_argument("--dataset-name", choices=("random",), default="random", help="random token ids (default)")
    group.add_argument("--num-prompts", type=int, default=64, metavar="N", help="requests (default: 64)")
    group.add_argument("--input-len", type=int, default=128, metavar="N", help="prompt tokens (default: 128)")
    group.add_argument("--output-len", type=int, default=128, metavar="N", help="output tokens (default: 128)")
    group.add_argument("--prefix-len", type=int, default=0, metavar="N", help="further prompt tokens that all share")
    text = "draw lengths from len * (1 - X) to len * (1 + X)"
    group.add_argument("--random-range-ratio", type=float, default=0.0, metavar="X", help=text)
    group.add_argument("--num-warmups", type=int, default=4, metavar="N", help="untimed requests (default: 4)")
    group.add_argument("--disable-detokenize", action="store_true", help="token ids only, no text")
    group.add_argument("--output-json", metavar="FILE", help="write the result")


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        ValueError: a flag, or the model, cannot be used.
    """
    # Not at the top: flags are added whenever the command `folovllm` starts, which must be quick.
    from folovllm.benchmarks.session import check_output, check_positive, session, write_session

    check_positive(args, ("num_prompts", "input_len", "output_len"))
    check_positive(args, ("prefix_len", "num_warmups"), low=0)
    check_output(args)
    lengths = (args.input_len, args.output_len, args.prefix_len, args.random_range_ratio)
    with session(args) as current:
        measured = workload.uniform(current.vocab_size, args.seed, args.num_prompts, *lengths)
        current.check_lengths(measured.longest(), "--input-len, --output-len, --prefix-len")
        if args.num_warmups:
            warm_up = workload.uniform(current.vocab_size, workload.WARM_UP_SEED, args.num_warmups, *lengths)
            current.under_test.run(warm_up, current.make_params)
        record = current.under_test.run(measured, current.make_params)
        settings = {
            "num_prompts": args.num_prompts,
            "input_len": args.input_len,
            "output_len": args.output_len,
            "prefix_len": args.prefix_len,
            "random_range_ratio": args.random_range_ratio,
        }
        result = write_session(args, "throughput", current, [record], settings)
    figures = {metric: figure.median for metric, figure in result.entries[0].workloads["uniform"].items()}
    print(
        f"Throughput: {figures['requests_s']:.2f} requests/s, {figures['total_tok_s']:.2f} total tokens/s, "
        f"{figures['output_tok_s']:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens: {sum(request.num_prompt_tokens for request in record.requests)}")
    print(f"Total num output tokens: {workload.total_output(measured.requests)}")
    print(
        f"TTFT p50 {figures['ttft_p50_ms']:.1f} ms, p99 {figures['ttft_p99_ms']:.1f} ms; "
        f"{figures['num_steps']:.0f} steps of {figures['step_ms']:.2f} ms; "
        f"KV cache at most {figures['kv_use_peak']:.1%} in use"
    )
    return 0
