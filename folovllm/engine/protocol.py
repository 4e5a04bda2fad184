"""EngineClient: what a server needs of an engine, wherever that engine runs (vLLM: `engine/protocol.py`).

AsyncLLM is the one that ships. A test gives the HTTP side a fake one, and needs neither model nor process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable
from typing import TYPE_CHECKING

from folovllm.config import VllmConfig
from folovllm.engine.processor import PromptType
from folovllm.outputs import RequestOutput
from folovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EngineDeadError(RuntimeError):
    """The engine core is gone: its process ended, or a step failed. Nothing more can be asked of this client."""


class EngineClient(ABC):
    """An engine as its users on one event loop see it. Every method belongs to that loop's thread."""

    vllm_config: VllmConfig
    """The checked configuration; not changed after start."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer; None under skip_tokenizer_init."""

    @property
    @abstractmethod
    def errored(self) -> bool:
        """Whether the engine has died of itself; False after an orderly shutdown."""

    @property
    @abstractmethod
    def is_running(self) -> bool:
        """Whether requests are taken: neither dead nor shut down."""

    @property
    @abstractmethod
    def dead_error(self) -> EngineDeadError:
        """What later calls raise once the engine is dead; says what killed it, where that is known."""

    @abstractmethod
    def generate(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Queue a request at the first `__anext__` and yield its outputs until the last one, which is `finished`.

        `sampling_params.output_kind` decides what each output holds. Outputs that the reader has not taken are
        merged, so a slow reader holds up nobody. Closing the generator, or cancelling its task, aborts the request.

        Args:
            prompt: text, token ids, or a dict of engine/processor.py's PROMPT_KEYS.
            sampling_params: how to draw, when to stop; copied, not changed.
            request_id: unique among the unfinished requests of this client.
            priority: smaller runs first; other than 0 only under the priority policy.

        Raises:
            ValueError: the request cannot run; nothing was queued.
            EngineDeadError: the engine is dead, or died while the request ran.
        """

    @abstractmethod
    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End these requests; their streams yield one last output of finish_reason "abort". Unknown ids pass."""

    @abstractmethod
    async def check_health(self) -> None:
        """Return if the engine can serve.

        Raises:
            EngineDeadError: it cannot.
        """

    @abstractmethod
    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing done, while requests hold blocks.

        Raises:
            EngineDeadError: the engine is dead.
        """

    @abstractmethod
    def get_default_sampling_params(self) -> SamplingParams:
        """Return the model's own defaults, from its generation_config.json."""

    @abstractmethod
    def num_unfinished_requests(self) -> int:
        """Return how many requests of this client are running or waiting; n > 1 counts once."""

    @abstractmethod
    async def wait_dead(self) -> None:
        """Return once `errored` is true. An orderly shutdown does not wake it: cancel the waiting task then."""

    @abstractmethod
    async def shutdown(self, timeout_s: float = 0.0) -> None:
        """Take no more requests, give the running ones up to `timeout_s` seconds, abort the rest, stop the engine.

        May be called again, and after the engine's death.
        """
