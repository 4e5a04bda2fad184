"""What the scheduler knows of structured output: when a grammar is ready, and whether a token follows it.

The core is plain Python; who compiles grammars and fills masks implements this (structured_output/manager.py).
vLLM: `v1/structured_output/backend_types.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from folovllm.request import Request


class GrammarError(Exception):
    """A grammar cannot be compiled, or not in time; the message is for the request's owner."""


class Grammar(ABC):
    """Where one request stands in its grammar. It moves with accepted tokens alone, so it survives preemption."""

    @abstractmethod
    def accept_token(self, token_id: int) -> bool:
        """Move on by a token; False, and no move, where it does not follow. A stop token follows a complete text."""

    @abstractmethod
    def is_terminated(self) -> bool:
        """Return whether nothing may come any more: a stop token has been accepted, or there is none."""


class GrammarCompiler(ABC):
    """Compiles grammars beside the engine's thread, and fills the masks of a step. Used by that thread alone."""

    @abstractmethod
    def start(self, request: Request) -> None:
        """Begin to compile the grammar of a request's sampling_params.structured_outputs; returns at once."""

    @abstractmethod
    def poll(self, request: Request) -> Grammar | None:
        """Return the grammar of a request that was started, once; None: not yet.

        Raises:
            GrammarError: it will never come.
        """

    @abstractmethod
    def forget(self, request: Request) -> None:
        """The request has ended before its grammar came; nothing happens if it is not known."""

    @abstractmethod
    def fill_bitmask(self, grammars: Sequence[Grammar]) -> Any:
        """Return what may follow, [len(grammars), ceil(V / 32)] int32: token i is bit i % 32 of word i // 32."""

    @abstractmethod
    def wait(self, timeout_s: float) -> None:
        """Wait until a grammar is ready or has failed, but not longer than `timeout_s` seconds."""

    @abstractmethod
    def shutdown(self) -> None:
        """Compile nothing any more."""
