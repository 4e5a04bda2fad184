"""`folovllm serve [MODEL]`: answer OpenAI's requests over HTTP (vLLM: `entrypoints/cli/serve.py`)."""

from __future__ import annotations

import argparse

from folovllm.engine.arg_utils import DEFAULT_MODEL, EngineArgs
from folovllm.entrypoints.cli.common import UsageError
from folovllm.entrypoints.openai.settings import ServerSettings

_DESCRIPTION = """\
Serve a model under OpenAI's API: /v1/completions and /v1/chat/completions, with vLLM's extra fields. Answers on
127.0.0.1:8000 unless told otherwise. Ctrl-C or SIGTERM lets running requests finish, then exits with 0."""


def add_subparser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the parser of `folovllm serve`."""
    parser = subparsers.add_parser(
        "serve",
        help="answer OpenAI's requests over HTTP",
        description=_DESCRIPTION,
        usage="folovllm serve [MODEL] [flags]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model_tag",
        nargs="?",
        metavar="MODEL",
        help=f"folder, .gguf file, Hugging Face id or built-in name (default: {DEFAULT_MODEL})",
    )
    ServerSettings.add_cli_args(parser)
    EngineArgs.add_cli_args(parser)
    # Statistics are what /metrics shows.
    parser.set_defaults(run=run, model=None, disable_log_stats=False)


def run(args: argparse.Namespace) -> int:
    """Run `folovllm serve` and return the exit code: 0 after a signal, 1 if the engine died.

    Raises:
        UsageError: contradictory flags.
        ValueError: a flag or the model cannot be used, or the server's packages are missing.
        OSError: the address cannot be listened on.
    """
    if args.model is not None and args.model_tag is not None and args.model != args.model_tag:
        raise UsageError(f"two models: {args.model_tag!r} and --model {args.model!r}; give one.")
    args.model = args.model_tag or args.model or DEFAULT_MODEL
    try:
        settings = ServerSettings.from_cli_args(args)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        import fastapi
        import prometheus_client
        import uvicorn
    except ImportError as error:
        raise ValueError(
            f'{error.name} is not installed, which the server needs: pip install "folovllm[server]"'
        ) from error
    del fastapi, prometheus_client, uvicorn
    from folovllm.entrypoints.openai.launcher import run_server

    return run_server(EngineArgs.from_cli_args(args), settings)
