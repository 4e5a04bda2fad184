"""The server of server_overhead.py and server_soak.py: `folovllm serve` whose model takes no time, or a given one.

`python -m tests.benchmark.server_worker serve ...` is the server; without `serve` it is the server's engine process.
Where TIMES names a file, the engine writes there when each step ended: the n-th number belongs to token 1000 + n.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from typing import Any

from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.core import EngineCore
from folovllm.engine.core_client import AsyncMPClient
from folovllm.outputs import ModelRunnerOutput
from tests.benchmark.async_engine_worker import STEP_MS, FreeExecutor
from tests.scripted_server import run_as_server_or_core

TIMES = "SERVER_WORKER_TIMES"
"""Environment variable: a file of MAX_STEPS doubles."""
MAX_STEPS = 20_000
"""FreeExecutor's token ids begin again after so many."""
FIRST_TOKEN = 1000


class TimedExecutor(FreeExecutor):
    """Writes down when each step ended, on the clock that all processes of a machine share."""

    def __init__(self, vocab_size: int, block_size: int, step_s: float) -> None:
        super().__init__(vocab_size, block_size, step_s)
        self.times: mmap.mmap | None = None
        if TIMES in os.environ:
            with open(os.environ[TIMES], "r+b") as file:
                self.times = mmap.mmap(file.fileno(), 8 * MAX_STEPS)

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> ModelRunnerOutput:
        """See FreeExecutor."""
        output = super().execute_model(scheduler_output, non_block)
        if self.times is not None:
            struct.pack_into("<d", self.times, 8 * (self.step % MAX_STEPS), time.monotonic())
        return output


def start_core(engine_args: EngineArgs) -> tuple[EngineCore, str]:
    """Stand in for core_proc.start_core."""
    config = engine_args.create_engine_config()
    step_s = float(os.environ.get(STEP_MS, "0")) / 1e3
    executor = TimedExecutor(config.model_config.get_vocab_size(), engine_args.block_size, step_s)
    return EngineCore(config, executor, not engine_args.disable_log_stats), "A model that takes no time."


class FreeClient(AsyncMPClient):
    """Starts this file as its core."""

    def __init__(self, engine_args: EngineArgs) -> None:
        super().__init__(engine_args, module="tests.benchmark.server_worker")


if __name__ == "__main__":
    run_as_server_or_core(FreeClient, start_core)
