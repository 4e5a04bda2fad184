"""The engine process of async_engine.py: a real EngineCore whose model takes no time, or a given one."""

from __future__ import annotations

import os
import time
from typing import Any

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.core import EngineCore
from folovllm.engine.core_proc import main
from folovllm.outputs import ModelRunnerOutput
from tests.fakes import FakeExecutor

STEP_MS = "ASYNC_ENGINE_STEP_MS"
"""Environment variable: milliseconds of a step."""


class FreeExecutor(FakeExecutor):
    """Answers every request with the same tokens in turn, and checks nothing."""

    def __init__(self, vocab_size: int, block_size: int, step_s: float) -> None:
        super().__init__(vocab_size, block_size=block_size, memory_bytes=1 << 22)
        self.step_s = step_s
        self.step = 0
        self.missing: dict[str, int] = {}
        """Prompt tokens that are not computed yet."""

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> ModelRunnerOutput:
        """Sleep through a step."""
        if self.step_s:
            time.sleep(self.step_s)
        for new in scheduler_output.scheduled_new_reqs:
            self.missing[new.req_id] = len(new.prompt_token_ids) - new.num_computed_tokens
        self.step += 1
        token = 1000 + self.step % 20000
        sampled = []
        for req_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            self.missing[req_id] -= num_tokens
            sampled.append([token] if self.missing[req_id] <= 0 else [])
        req_ids = list(scheduler_output.num_scheduled_tokens)
        return ModelRunnerOutput(req_ids, {req_id: i for i, req_id in enumerate(req_ids)}, sampled)


def free_executor(engine_args: EngineArgs, vocab_size: int) -> Any:
    """Return an executor that takes STEP_MS per step."""
    return FreeExecutor(vocab_size, engine_args.block_size, float(os.environ.get(STEP_MS, "0")) / 1e3)


def start_core(engine_args: EngineArgs) -> tuple[EngineCore, str]:
    """Stand in for core_proc.start_core."""
    config = engine_args.create_engine_config()
    executor = free_executor(engine_args, config.model_config.get_vocab_size())
    return EngineCore(config, executor, not engine_args.disable_log_stats), ""


if __name__ == "__main__":
    main(start_core)
