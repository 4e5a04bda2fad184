"""`folovllm quantize MODEL --output DIR`: make a 4-bit or 8-bit GPTQ checkpoint. vLLM has no such command."""

from __future__ import annotations

import argparse
import contextlib
import sys

from folovllm.config import DEVICES
from folovllm.engine.arg_utils import EngineArgs
from folovllm.entrypoints.cli.common import UsageError
from folovllm.quantize.spec import BITS, GROUP_SIZES, METHODS, QuantizationSpec

_DESCRIPTION = """\
Quantize a model's linear layers to 4 or 8 bits with GPTQ and write a checkpoint in the usual GPTQ format, which
FoloVLLM, vLLM and transformers with GPTQModel load. Embeddings and LM head stay as they are. Works layer by layer,
on a CPU or a GPU."""
MIB = 1 << 20


def add_subparser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the parser of `folovllm quantize`."""
    parser = subparsers.add_parser(
        "quantize",
        help="make a 4-bit or 8-bit checkpoint",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, .gguf file, Hugging Face id or built-in name")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make; it must not exist, or be empty")
    form = parser.add_argument_group("format")
    form.add_argument("--bits", type=int, choices=BITS, default=4, help="bits of a weight (default: 4)")
    form.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=128,
        help="input channels that share a scale; -1: all (default: 128)",
    )
    symmetry = form.add_mutually_exclusive_group()
    symmetry.add_argument("--sym", dest="sym", action="store_true", default=True, help="zero in the middle (default)")
    symmetry.add_argument("--asym", dest="sym", action="store_false", help="a zero point per group; not for vLLM")
    form.add_argument("--desc-act", action="store_true", help="act-order: quantize the most active channels first")
    form.add_argument("--method", choices=METHODS, default="gptq", help="rtn: round to nearest, without calibration")
    form.add_argument("--damp-percent", type=float, default=0.01, metavar="X", help="damping (default: 0.01)")
    data = parser.add_argument_group("calibration")
    data.add_argument("--calibration", metavar="FILE", help="text in UTF-8 (default: the model writes one)")
    data.add_argument("--num-samples", type=int, default=128, metavar="N", help="sequences (default: 128)")
    data.add_argument("--seq-len", type=int, default=512, metavar="N", help="tokens of each (default: 512)")
    data.add_argument("--seed", type=int, default=0, metavar="N", help="of the text that the model writes")
    where = parser.add_argument_group("model")
    where.add_argument("--device", choices=DEVICES, default="auto", help="where to run")
    where.add_argument("--tokenizer", metavar="NAME", help="folder, id or file of the tokenizer (default: the model's)")
    where.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    where.add_argument("--download-dir", metavar="DIR", help="where hub downloads are kept")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no summary")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `folovllm quantize` and return the exit code."""
    try:
        spec = QuantizationSpec(args.bits, args.group_size, args.sym, args.desc_act, args.method, args.damp_percent)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if args.method == "rtn" and args.calibration is not None:
        raise UsageError("--method rtn uses no calibration text: leave out --calibration.")
    engine_args = EngineArgs(
        model=args.model,
        tokenizer=args.tokenizer,
        revision=args.revision,
        download_dir=args.download_dir,
        device=args.device,
        seed=args.seed,
    )
    from folovllm.quantize.pipeline import Calibration, quantize_model  # imports torch

    try:
        calibration = Calibration(args.calibration, args.num_samples, args.seq_len, args.seed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    with contextlib.redirect_stdout(sys.stderr):
        report = quantize_model(engine_args, args.output, spec, calibration, use_tqdm=not args.quiet)
    if not args.quiet:
        seconds = ", ".join(f"{name} {value:.1f} s" for name, value in report.phase_seconds.items())
        mean = sum(report.errors.values()) / len(report.errors)
        of_what = "outputs" if report.num_calibration_tokens else "weights"
        print(
            f"{args.output}: {report.num_bytes / MIB:.1f} MiB of tensors; {args.bits} bits, group size "
            f"{args.group_size}"
        )
        print(f"calibration tokens: {report.num_calibration_tokens}; mean relative error of {of_what}: {mean:.3e}")
        print(f"time: {seconds}")
    return 0
