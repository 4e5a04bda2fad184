"""`folovllm serve` whose model writes a given text: python -m tests.scripted_server serve MODEL FLAGS.

Everything but the model is real. Without `serve` this is the server's engine process. The text is in the environment
variable SCRIPT; it is written with MODEL's tokenizer, token by token, and then the end-of-sequence token.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.core import EngineCore
from folovllm.engine.core_client import AsyncMPClient
from folovllm.outputs import ModelRunnerOutput
from tests.fakes import FakeExecutor

SCRIPT = "SCRIPTED_SERVER_TEXT"
"""Environment variable: what the model writes."""


class ScriptedExecutor(FakeExecutor):
    """Gives every request the same tokens, one a step."""

    def __init__(self, vocab_size: int, block_size: int, script: list[int]) -> None:
        super().__init__(vocab_size, block_size=block_size, memory_bytes=1 << 22)
        self.script = script
        self.missing: dict[str, int] = {}
        """Prompt tokens that are not computed yet; below that, minus the tokens written."""

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> ModelRunnerOutput:
        """See FakeExecutor."""
        for new in scheduler_output.scheduled_new_reqs:
            self.missing[new.req_id] = len(new.prompt_token_ids) - new.num_computed_tokens
        sampled = []
        for req_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            self.missing[req_id] -= num_tokens
            written = -self.missing[req_id]
            sampled.append([self.script[min(written, len(self.script) - 1)]] if written >= 0 else [])
        req_ids = list(scheduler_output.num_scheduled_tokens)
        return ModelRunnerOutput(req_ids, {req_id: i for i, req_id in enumerate(req_ids)}, sampled)


def start_core(engine_args: EngineArgs) -> tuple[EngineCore, str]:
    """Stand in for core_proc.start_core."""
    source = engine_args.resolve_model_source()
    config = engine_args.create_engine_config(source)
    tokenizer = source.tokenizer()
    script = [*tokenizer.encode(os.environ[SCRIPT], add_special_tokens=False), tokenizer.eos_token_id]
    executor: Any = ScriptedExecutor(config.model_config.get_vocab_size(), engine_args.block_size, script)
    return EngineCore(config, executor, not engine_args.disable_log_stats), "A model that writes what it is told."


class ScriptedClient(AsyncMPClient):
    """Starts this file as its core."""

    def __init__(self, engine_args: EngineArgs) -> None:
        super().__init__(engine_args, module="tests.scripted_server")


def run_as_server_or_core(
    client_cls: type[AsyncMPClient], start_core: Callable[[EngineArgs], tuple[EngineCore, str]]
) -> None:
    """Be `folovllm serve` with `client_cls` if the command line begins with `serve`, else its engine process."""
    if sys.argv[1:2] == ["serve"]:
        from folovllm.engine import async_llm
        from folovllm.entrypoints.cli.main import main

        async_llm.AsyncMPClient = client_cls  # type: ignore[misc]
        sys.exit(main())
    from folovllm.engine.core_proc import main as core_main

    core_main(start_core)


if __name__ == "__main__":
    run_as_server_or_core(ScriptedClient, start_core)
