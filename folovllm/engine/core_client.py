"""How the engine's front reaches its core (vLLM: `v1/engine/core_client.py`)."""

from __future__ import annotations

from folovllm.engine.core import EngineCore
from folovllm.outputs import EngineCoreOutputs
from folovllm.request import EngineCoreRequest


class InprocClient:
    """The core in this process: each call is a function call."""

    def __init__(self, engine_core: EngineCore) -> None:
        """Take over a started core."""
        self.engine_core = engine_core

    def check_fits(self, request: EngineCoreRequest) -> None:
        """Raise ValueError if the request could never run."""
        self.engine_core.check_fits(request)

    def add_request(self, request: EngineCoreRequest) -> None:
        """Queue a request."""
        self.engine_core.add_request(request)

    def get_output(self) -> EngineCoreOutputs:
        """Run a step and return its outputs."""
        return self.engine_core.step()

    def abort_requests(self, request_ids: list[str]) -> None:
        """End requests; unknown ids are ignored."""
        if request_ids:
            self.engine_core.abort_requests(request_ids)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks; False if requests still hold some."""
        return self.engine_core.reset_prefix_cache()

    def shutdown(self) -> None:
        """Free the devices."""
        self.engine_core.shutdown()
