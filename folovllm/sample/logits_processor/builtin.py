"""Logits processors for min_tokens, logit_bias and min_p (vLLM: `v1/sample/logits_processor/builtin.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from folovllm.sample.logits_processor.interface import BatchRow, LogitsProcessor, LogitsProcessors
from folovllm.sampling_params import SamplingParams

_NEG_INF = float("-inf")


class MinTokensLogitsProcessor(LogitsProcessor):
    """Forbids every token that would end a request, until it has generated `min_tokens` tokens."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        super().__init__(vocab_size, device)
        self._rows: list[tuple[BatchRow, list[int]]] = []

    def is_argmax_invariant(self) -> bool:
        """Return False: the forbidden token may be the best."""
        return False

    def wants(self, params: SamplingParams) -> bool:
        """Return whether there is a minimum and something to hold back."""
        return params.min_tokens > 0 and bool(params.all_stop_token_ids)

    def update_state(self, rows: Sequence[BatchRow]) -> None:
        """Take the rows; a stop id outside the vocabulary can never be drawn and is left out."""
        self._rows = [
            (row, sorted(i for i in row.params.all_stop_token_ids if 0 <= i < self.vocab_size)) for row in rows
        ]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Set the stop tokens of rows that are still too short to -inf, in place."""
        indices: list[int] = []
        forbidden: list[int] = []
        for row, stop_token_ids in self._rows:
            if len(row.output_token_ids) < row.params.min_tokens:
                indices += [row.index] * len(stop_token_ids)
                forbidden += stop_token_ids
        if indices:
            logits[indices, forbidden] = _NEG_INF
        return logits


class LogitBiasLogitsProcessor(LogitsProcessor):
    """Adds `logit_bias` to the logits of its tokens."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        super().__init__(vocab_size, device)
        self._indices = torch.empty(2, 0, dtype=torch.int64, device=device)
        self._biases = torch.empty(0, device=device)

    def is_argmax_invariant(self) -> bool:
        """Return False: another token may become the best."""
        return False

    def wants(self, params: SamplingParams) -> bool:
        """Return whether there is a bias."""
        return bool(params.logit_bias)

    def update_state(self, rows: Sequence[BatchRow]) -> None:
        """Flatten {token id: bias} of all rows; the ids are inside the vocabulary (the Processor checked)."""
        entries = [
            (row.index, token_id, bias) for row in rows for token_id, bias in (row.params.logit_bias or {}).items()
        ]
        self._indices = torch.tensor(
            [[entry[0] for entry in entries], [entry[1] for entry in entries]],
            dtype=torch.int64,
            device=self.device,
        )
        self._biases = torch.tensor([entry[2] for entry in entries], dtype=torch.float32, device=self.device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Add the biases in place; every (row, token) pair occurs once."""
        logits[self._indices[0], self._indices[1]] += self._biases
        return logits


class MinPLogitsProcessor(LogitsProcessor):
    """Drops tokens less likely than `min_p` times the best one."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        super().__init__(vocab_size, device)
        self._rows = torch.empty(0, dtype=torch.int64, device=device)
        self._log_min_p = torch.empty(0, 1, device=device)

    def is_argmax_invariant(self) -> bool:
        """Return True: the best token stays."""
        return True

    def wants(self, params: SamplingParams) -> bool:
        """Return whether min_p drops anything."""
        return params.min_p > 0.0

    def update_state(self, rows: Sequence[BatchRow]) -> None:
        """Take the rows' min_p."""
        self._rows = torch.tensor([row.index for row in rows], dtype=torch.int64, device=self.device)
        min_p = torch.tensor([row.params.min_p for row in rows], dtype=torch.float32, device=self.device)
        self._log_min_p = min_p.log_().unsqueeze(1)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Set the dropped tokens of its rows to -inf, in place.

        p >= min_p * p_best is logit >= best logit + log(min_p): no softmax is needed.
        """
        rows = logits[self._rows]
        floor = rows.amax(dim=-1, keepdim=True) + self._log_min_p
        logits[self._rows] = rows.masked_fill_(rows < floor, _NEG_INF)
        return logits


def build_logitsprocs(vocab_size: int, device: torch.device | str) -> LogitsProcessors:
    """Return the built-in processors for logits [B, vocab_size] on `device`, in the order of application."""
    target = torch.device(device)
    return LogitsProcessors(
        [
            MinTokensLogitsProcessor(vocab_size, target),
            LogitBiasLogitsProcessor(vocab_size, target),
            MinPLogitsProcessor(vocab_size, target),
        ]
    )
