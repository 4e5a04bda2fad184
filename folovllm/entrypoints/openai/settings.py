"""ServerSettings: all that can be set about the HTTP side, and its flags (vLLM: `entrypoints/openai/cli_args.py`).

Imports neither the web framework nor torch: `folovllm serve --help` reads only this.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from folovllm.utils.common import check_range

API_KEY_VARIABLE = "FOLOVLLM_API_KEY"
"""Environment variable with one more API key, which then shows in no list of processes."""


@dataclass(frozen=True)
class ServerSettings:
    """What build_app and the launcher go by; checked on construction.

    Raises:
        ValueError: a value is outside its range, or values contradict each other.
    """

    host: str = "127.0.0.1"
    """Address to listen on; only this machine unless told otherwise."""
    port: int = 8000
    """TCP port; 0 takes a free one."""
    uds: str | None = None
    """Listen on this unix domain socket instead of host and port."""
    ssl_certfile: str | None = None
    """Certificate chain (PEM) to serve HTTPS with."""
    ssl_keyfile: str | None = None
    """Private key (PEM) of the certificate."""
    served_model_name: list[str] = field(default_factory=list)
    """Names that clients may use for the model; the first stands in answers. Empty: the model's own."""
    chat_template: str | None = None
    """Jinja template in place of the model's."""
    api_key: list[str] = field(default_factory=list, repr=False)
    """Keys, one of which every request but /health must show; empty: none is asked for."""
    allowed_origins: list[str] = field(default_factory=list)
    """Web pages' origins that browsers may call from (CORS); empty: none."""
    isolate_prefix_cache: bool = False
    """Requests of different API keys share no cached prefixes."""
    trust_request_chat_template: bool = False
    """Requests may bring a chat template of their own; it runs in Jinja's sandbox, but may run long."""
    log_requests: bool = False
    """Write prompts and parameters into the log."""
    dev_mode: bool = False
    """Add POST /reset_prefix_cache."""
    stream_interval: int = 1
    """Tokens between two chunks of a stream; the first token and the end are always sent at once."""
    shutdown_timeout: float = 30.0
    """Seconds that running requests get at SIGTERM before they are ended."""
    restart_engine: bool = False
    """Start a new engine when it dies, instead of exiting."""
    in_process: bool = False
    """Run the engine in a thread of this process, for debugging: both then share Python's lock."""
    disable_access_log: bool = False
    """No log line per HTTP request."""
    timeout_keep_alive: int = 60
    """Seconds after which an idle connection is closed."""
    max_queued_requests: int = 1024
    """Sequences that may wait, beyond the max_num_seqs that run, before requests get 429."""
    max_body_bytes: int = 8 << 20
    """Largest request body."""
    max_prompts: int = 256
    """Most prompts of a completion request."""
    max_n: int = 128
    """Largest `n`."""
    max_output_tokens: int | None = None
    """Largest `max_tokens`, and its default where a request gives none; None: what the context has left."""
    max_stop_strings: int = 32
    """Most `stop` strings of a request; for `bad_words` and `stop_token_ids` as well."""
    max_stop_length: int = 1024
    """Characters of the longest `stop` string or bad word."""
    max_schema_bytes: int = 64 << 10
    """Largest JSON schema, grammar, regular expression or list of choices of a request; tools together as well."""

    def __post_init__(self) -> None:
        check_range("port", self.port, low=0, high=65535)
        for name in ("stream_interval", "max_body_bytes", "max_prompts", "max_n", "max_output_tokens"):
            check_range(name, getattr(self, name), low=1)
        for name in ("max_queued_requests", "max_stop_strings", "max_stop_length", "max_schema_bytes"):
            check_range(name, getattr(self, name), low=0)
        check_range("timeout_keep_alive", self.timeout_keep_alive, low=0)
        check_range("shutdown_timeout", self.shutdown_timeout, low=0.0)
        for key in self.api_key:
            if not key or not key.isascii() or not key.isprintable() or key != key.strip():
                raise ValueError("api_key: a key must be printable ASCII, not empty, without spaces around it.")
        if self.isolate_prefix_cache and not self.api_key:
            raise ValueError("isolate_prefix_cache separates API keys: give at least one with --api-key.")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile belong together: give both, or neither.")
        for name in ("ssl_certfile", "ssl_keyfile"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ValueError(f"{name}={path!r} is no file.")
        for name in self.served_model_name:
            if not name or not name.isprintable():
                raise ValueError(f"served_model_name={name!r} must be printable and not empty.")

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add one flag per field, in vLLM's spelling where vLLM has it."""
        group = parser.add_argument_group("server")
        for item in dataclasses.fields(ServerSettings):
            flag, kind = "--" + item.name.replace("_", "-"), str(item.type)
            default = [] if kind.startswith("list") else item.default
            kwargs: dict[str, Any] = {"dest": item.name, "default": default, "help": _help(item.name, default)}
            if kind == "bool":
                kwargs["action"] = "store_true"
            elif kind.startswith("list"):
                kwargs.update(action="extend", nargs="+", metavar=_METAVARS[item.name])
            else:
                kwargs["type"] = {"int": int, "float": float, "str": str}[kind.removesuffix(" | None")]
                kwargs["metavar"] = _METAVARS.get(item.name) or kwargs["type"].__name__.upper()
            group.add_argument(flag, **kwargs)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> ServerSettings:
        """Return the settings that `args` describe; keys of the environment are added.

        Raises:
            ValueError: see the class; also a --chat-template that is no file.
        """
        values = {item.name: getattr(args, item.name) for item in dataclasses.fields(cls)}
        if key := os.environ.get(API_KEY_VARIABLE):
            values["api_key"] = [*values["api_key"], key]
        if values["chat_template"] is not None:
            from folovllm.entrypoints.cli.common import read_chat_template

            values["chat_template"] = read_chat_template(values["chat_template"])
        return cls(**values)


_METAVARS = {
    "served_model_name": "NAME",
    "api_key": "KEY",
    "allowed_origins": "ORIGIN",
    "uds": "PATH",
    "ssl_certfile": "FILE",
    "ssl_keyfile": "FILE",
    "chat_template": "FILE",
    "shutdown_timeout": "SECONDS",
    "timeout_keep_alive": "SECONDS",
}

_HELP: dict[str, str] = {
    "host": "address to listen on; 0.0.0.0 for all, then with --api-key",
    "port": "port to listen on; 0 takes a free one",
    "uds": "listen on this unix domain socket instead",
    "ssl_certfile": "serve HTTPS with this certificate chain (PEM)",
    "ssl_keyfile": "private key (PEM) of --ssl-certfile",
    "served_model_name": "names that clients may use for the model (default: MODEL as given)",
    "chat_template": "Jinja chat template to use instead of the model's: a file, or the template itself",
    "api_key": f"ask for one of these keys in every request but /health; {API_KEY_VARIABLE} adds one",
    "allowed_origins": "let browsers call from these origins (CORS); * for all (default: none)",
    "isolate_prefix_cache": "share no cached prefixes between API keys",
    "trust_request_chat_template": "let requests bring a chat template of their own (sandboxed)",
    "log_requests": "write prompts and parameters into the log",
    "dev_mode": "add POST /reset_prefix_cache",
    "stream_interval": "tokens per chunk of a stream after the first",
    "shutdown_timeout": "how long running requests may take to finish at SIGTERM or Ctrl-C",
    "restart_engine": "start a new engine when it dies, instead of exiting",
    "in_process": "run the engine in a thread of the server's process (for debugging)",
    "disable_access_log": "no log line per HTTP request",
    "timeout_keep_alive": "close connections that are idle for so long",
    "max_queued_requests": "sequences that may wait before requests get 429",
    "max_body_bytes": "largest request body",
    "max_prompts": "most prompts of a completion request",
    "max_n": "largest n of a request",
    "max_output_tokens": "largest max_tokens of a request (default: what the context has left)",
    "max_stop_strings": "most stop strings, stop token ids or bad words of a request",
    "max_stop_length": "characters of the longest stop string or bad word",
    "max_schema_bytes": "largest schema, grammar, regex, list of choices, or list of tools",
}


def _help(name: str, default: object) -> str:
    shown = default is not None and default is not False and default != []
    return f"{_HELP[name]} (default: {default})" if shown else _HELP[name]
