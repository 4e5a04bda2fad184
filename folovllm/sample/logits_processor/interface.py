"""The seam for anything that changes logits row by row (vLLM: `v1/sample/logits_processor/interface.py`).

A processor holds the state of the current batch: which rows it acts on and with what. InputBatch hands it
those rows whenever the batch changes; the sampler then calls `apply` every step.

# Simplified (vLLM: BatchUpdate): instead of a log of added, removed and moved rows every processor gets its
# rows anew. That is O(rows that use it), only when the batch changed, and cannot drift from the truth.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from folovllm.sampling_params import SamplingParams


@dataclass
class BatchRow:
    """One request of the batch as a processor sees it."""

    index: int
    """Row of the logits."""
    params: SamplingParams
    """Its parameters; not to be changed."""
    prompt_token_ids: Sequence[int]
    """Its prompt."""
    output_token_ids: Sequence[int]
    """What it has generated; live: grows by a token every step without a new update_state."""


class LogitsProcessor(ABC):
    """Changes the logits of those rows that ask for it."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        """`vocab_size` is V; `device` is where the logits will be."""
        self.vocab_size = vocab_size
        self.device = device

    @abstractmethod
    def is_argmax_invariant(self) -> bool:
        """Return whether the best token always stays the best: then greedy rows need not be processed."""

    @abstractmethod
    def wants(self, params: SamplingParams) -> bool:
        """Return whether a request with these parameters needs this processor."""

    @abstractmethod
    def update_state(self, rows: Sequence[BatchRow]) -> None:
        """Replace the state: `rows` are all rows of the batch that this processor wants, in index order."""

    @abstractmethod
    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the processed logits [B, V], changed in place or new. Called only while there are rows."""


class LogitsProcessors:
    """The processors of an engine, those that the current batch uses split by kind.

    `argmax_invariant` and `non_argmax_invariant` list processors that have rows now, so an unused one costs
    nothing.
    """

    def __init__(self, processors: Sequence[LogitsProcessor] = ()) -> None:
        """`processors` are applied in the given order."""
        self.all = list(processors)
        self.argmax_invariant: list[LogitsProcessor] = []
        self.non_argmax_invariant: list[LogitsProcessor] = []

    def wants(self, params: SamplingParams) -> bool:
        """Return whether any processor needs to see a request with these parameters."""
        return any(processor.wants(params) for processor in self.all)

    def update_state(self, rows: Sequence[BatchRow]) -> None:
        """Hand every processor its rows out of `rows`: at least all that `wants` is true for, by index."""
        self.argmax_invariant = []
        self.non_argmax_invariant = []
        for processor in self.all:
            wanted = [row for row in rows if processor.wants(row.params)]
            processor.update_state(wanted)
            if wanted:
                invariant = processor.is_argmax_invariant()
                (self.argmax_invariant if invariant else self.non_argmax_invariant).append(processor)
