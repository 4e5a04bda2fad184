"""The command `folovllm`: parse, run a subcommand, turn every ending into an exit code.

vLLM's file is `entrypoints/cli/main.py`. Exit codes: 0 done; 1 the request failed (one line `error: ...`
on stderr); 2 the command line is wrong; 130 Ctrl-C; 141 whoever read the output went away.
FOLOVLLM_DEBUG=1 shows the traceback instead of the line.

Nothing here imports torch: `folovllm --help` must answer at once. Subcommands import the engine when they
run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from folovllm.entrypoints.cli import bench, chat, evaluate, generate, quantize, serve
from folovllm.entrypoints.cli.common import UsageError
from folovllm.version import __version__

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + 2
EXIT_BROKEN_PIPE = 128 + 13

SUBCOMMANDS = (generate, chat, serve, bench, quantize, evaluate)
"""Modules with `add_subparser(subparsers)`, which sets `run(args) -> exit code` as the default `run`."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    # Abbreviated flags are refused: what `--max` stands for would change with every new flag.
    parser = argparse.ArgumentParser(
        prog="folovllm",
        description="Run language models: a small, readable inference engine laid out like vLLM.",
        epilog="`folovllm COMMAND --help` lists the flags of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"folovllm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for module in SUBCOMMANDS:
        module.add_subparser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: the process's own) and return the exit code.

    Raises:
        SystemExit: from argparse, with code 0 (--help, --version) or 2 (a wrong command line).
        Exception: whatever the command raised, under FOLOVLLM_DEBUG=1; always for our own mistakes.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    try:
        code: int = args.run(args)
        # Here, not at interpreter exit: a reader that went away is noticed while it can still be handled.
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        return _fail(error, "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        _silence_stdout()
        return EXIT_BROKEN_PIPE
    except UsageError as error:
        return _fail(error, f"error: {error}\nSee `folovllm {args.command} --help`.", EXIT_USAGE)
    except (ValueError, OSError) as error:
        return _fail(error, f"error: {error}", EXIT_ERROR)


def _fail(error: BaseException, message: str, code: int) -> int:
    """Print `message` to stderr and return `code`; under FOLOVLLM_DEBUG=1 raise `error` instead."""
    if os.environ.get("FOLOVLLM_DEBUG") == "1":
        raise error
    print(message, file=sys.stderr)
    return code


def _silence_stdout() -> None:
    """Point stdout at nothing, so that the flush at interpreter exit does not fail once more."""
    try:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
    except (OSError, ValueError):  # stdout is not a file
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - lives until the process ends
