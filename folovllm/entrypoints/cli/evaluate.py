"""`folovllm eval perplexity MODEL FILE`: how well a model predicts a text. vLLM has no such command.

Perplexity shows what quantization costs: measure the original and the quantized model on the same text, with the same
window and stride.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys

from folovllm.engine.arg_utils import DEFAULT_MODEL, EngineArgs
from folovllm.entrypoints.cli.common import UsageError

DEFAULT_WINDOW = 1024


def add_subparser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the parser of `folovllm eval`."""
    parser = subparsers.add_parser("eval", help="measure a model", description="Measure a model.", allow_abbrev=False)
    measures = parser.add_subparsers(dest="measure", metavar="MEASURE", title="measures", required=True)
    perplexity = measures.add_parser(
        "perplexity",
        help="how well a model predicts a text",
        description="Print exp(mean negative log probability) of a text's tokens, each seen once, through a window "
        "that slides over the text. A token sees at least window - stride tokens before it.",
        allow_abbrev=False,
    )
    perplexity.add_argument("eval_model", metavar="MODEL", help="folder, .gguf file, Hugging Face id or built-in name")
    perplexity.add_argument("file", metavar="FILE", help="text in UTF-8")
    perplexity.add_argument(
        "--window",
        type=int,
        metavar="N",
        help=f"tokens seen together (default: {DEFAULT_WINDOW}, or the model's limit)",
    )
    perplexity.add_argument(
        "--stride", type=int, metavar="N", help="tokens from window to window (default: half of one)"
    )
    perplexity.add_argument("--max-tokens", type=int, metavar="N", help="only the text's first N tokens")
    perplexity.add_argument("--json", action="store_true", help="print one JSON object")
    EngineArgs.add_cli_args(perplexity)
    perplexity.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `folovllm eval perplexity` and return the exit code."""
    if args.model != DEFAULT_MODEL:
        raise UsageError("--model: the model is the first argument here; leave --model out.")
    for name, low in (("window", 2), ("stride", 1), ("max_tokens", 2)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be at least {low}.")
    engine_args = dataclasses.replace(EngineArgs.from_cli_args(args), model=args.eval_model)
    from folovllm.engine.llm_engine import LLMEngine  # imports torch
    from folovllm.quantize.calibration import read_text_file
    from folovllm.quantize.perplexity import measure_perplexity

    text = read_text_file(args.file, "FILE")
    with contextlib.redirect_stdout(sys.stderr):
        engine = LLMEngine.from_engine_args(engine_args)
        limit = engine.vllm_config.model_config.max_model_len
        assert limit is not None
        window = min(DEFAULT_WINDOW, limit - 1) if args.window is None else args.window
        stride = max(1, window // 2) if args.stride is None else args.stride
        token_ids = engine.get_tokenizer().encode(text)[: args.max_tokens]
        result = measure_perplexity(engine, token_ids, window, stride, use_tqdm=not args.json)
    if args.json:
        record = {"model": args.eval_model, "file": args.file, **dataclasses.asdict(result)}
        print(json.dumps(record, allow_nan=False))
        return 0
    print(f"perplexity {result.perplexity:.4f} ({result.nats_per_token:.5f} nats per token)")
    print(
        f"{result.num_tokens} tokens, {result.num_scored_tokens} scored, {result.num_windows} windows of "
        f"{result.window} tokens, stride {result.stride}, {result.seconds:.1f} s"
    )
    return 0
