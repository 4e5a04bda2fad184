"""An engine without a model, in its own process or in this one: a real EngineCore over tests/fakes.FakeExecutor.

`python -m tests.fake_engine` is the process. Some requests and models go wrong on purpose: see the constants.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from folovllm.config import VllmConfig
from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.async_llm import AsyncLLM
from folovllm.engine.core import EngineCore
from folovllm.engine.core_client import AsyncCoreClient, AsyncMPClient, AsyncThreadClient
from folovllm.engine.core_proc import main
from folovllm.engine.llm_engine import LLMEngine
from folovllm.metrics.loggers import StatLoggerBase
from folovllm.request import EngineCoreRequest
from tests.fakes import FakeExecutor, FakeTokenizer, next_token

TOKENIZER = FakeTokenizer()
STEP_SECONDS = "FAKE_ENGINE_STEP_SECONDS"
"""Environment variable: how long a step takes."""
CRASH_TOKEN = TOKENIZER.pad_token_id
"""A prompt that ends with it makes the step fail."""
BAD_ID = "bad"
"""A request whose id holds this cannot be added to the core."""
WRONG_MODEL, BROKEN_MODEL, KILLED_MODEL = "wrong-model", "broken-model", "killed-model"
"""Models at which the core raises ValueError, raises KeyError, or ends."""


def fake_config(engine_args: EngineArgs) -> VllmConfig:
    """Return the configuration of a model that is not there."""
    hf_config = {
        "architectures": ["FakeForCausalLM"],
        "max_position_embeddings": 4096,
        "vocab_size": TOKENIZER.vocab_size,
    }
    return engine_args.create_engine_config(SimpleNamespace(hf_config=lambda: hf_config))  # type: ignore[arg-type]


def choose(context: Sequence[int]) -> int:
    """Return the next token: never a special one, which would end the request."""
    if context[-1] == CRASH_TOKEN:
        raise RuntimeError("the crash that the test asked for")
    return next_token(context, TOKENIZER.vocab_size, range(TOKENIZER.first_byte))


def fake_executor(engine_args: EngineArgs) -> Any:
    """Return a FakeExecutor as slow as STEP_SECONDS says."""
    seconds = float(os.environ.get(STEP_SECONDS, "0"))
    return FakeExecutor(TOKENIZER.vocab_size, block_size=engine_args.block_size, choose=choose, step_seconds=seconds)


class FakeCore(EngineCore):
    """An EngineCore that refuses requests called BAD_ID."""

    def add_request(self, request: EngineCoreRequest) -> None:
        """See EngineCore."""
        if BAD_ID in request.request_id:
            raise KeyError("the failure that the test asked for")
        super().add_request(request)


def start_fake_core(engine_args: EngineArgs) -> tuple[EngineCore, str]:
    """Stand in for core_proc.start_core."""
    if engine_args.model == WRONG_MODEL:
        raise ValueError("model='wrong-model' is wrong.")
    if engine_args.model == BROKEN_MODEL:
        raise KeyError("model.weights")
    if engine_args.model == KILLED_MODEL:
        os._exit(7)
    config = fake_config(engine_args)
    core = FakeCore(config, fake_executor(engine_args), not engine_args.disable_log_stats)
    return core, core.startup_report({})


def fake_async_llm(
    engine_args: EngineArgs | None = None,
    *,
    in_process: bool = False,
    stat_loggers: Sequence[StatLoggerBase] = (),
    stream_interval: int = 1,
    tokenizer: Any = TOKENIZER,
) -> AsyncLLM:
    """Return what AsyncLLM.from_engine_args would."""
    engine_args = engine_args or EngineArgs(model="fake", disable_log_stats=not stat_loggers)
    client: AsyncCoreClient
    if in_process:
        client = AsyncThreadClient(*start_fake_core(engine_args))
    else:
        client = AsyncMPClient(engine_args, module="tests.fake_engine")
        try:
            client.wait_ready()
        except BaseException:
            client.close()
            raise
    config = fake_config(engine_args)
    return AsyncLLM(config, client, tokenizer, {}, stat_loggers=stat_loggers, stream_interval=stream_interval)


def fake_llm_engine(engine_args: EngineArgs | None = None) -> LLMEngine:
    """Return the synchronous engine over the same core."""
    engine_args = engine_args or EngineArgs(model="fake")
    return LLMEngine(fake_config(engine_args), fake_executor(engine_args), TOKENIZER, {})  # type: ignore[arg-type]


if __name__ == "__main__":
    main(start_fake_core)
