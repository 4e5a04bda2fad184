"""Logits processors: min_tokens, logit_bias, min_p, and the container that skips idle ones."""

from __future__ import annotations

import pytest
import torch

from folovllm.sample.logits_processor import (
    BatchRow,
    LogitBiasLogitsProcessor,
    LogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
    build_logitsprocs,
)
from folovllm.sampling_params import SamplingParams

V = 12
CPU = torch.device("cpu")
NEG_INF = float("-inf")


def row(index: int, output: list[int] | None = None, **params: object) -> BatchRow:
    return BatchRow(index, SamplingParams(**params), [1, 2], [] if output is None else output)  # type: ignore[arg-type]


def forbidden(logits: torch.Tensor) -> list[set[int]]:
    return [set((r == NEG_INF).nonzero().flatten().tolist()) for r in logits]


def test_min_tokens_holds_back_every_stop_token_until_reached() -> None:
    output: list[int] = []
    ended = row(0, [5, 5, 5], min_tokens=3, stop_token_ids=[3])
    waiting = row(2, output, min_tokens=2, stop_token_ids=[3, 7])
    waiting.params.update_from_generation_config({"eos_token_id": [9]}, eos_token_id=4)
    processor = MinTokensLogitsProcessor(V, CPU)
    processor.update_state([ended, waiting])
    assert not processor.is_argmax_invariant()
    for expected in ({3, 7, 9, 4}, {3, 7, 9, 4}, set(), set()):
        logits = processor.apply(torch.zeros(3, V))
        assert forbidden(logits) == [set(), set(), expected]
        output.append(1)


def test_min_tokens_holds_back_eos_under_ignore_eos_and_skips_impossible_ids() -> None:
    entry = row(0, min_tokens=1, stop_token_ids=[2, 4000], ignore_eos=True)
    entry.params.update_from_generation_config({}, eos_token_id=4)
    processor = MinTokensLogitsProcessor(V, CPU)
    processor.update_state([entry])
    assert forbidden(processor.apply(torch.zeros(1, V))) == [{2, 4}]


def test_logit_bias_is_added_to_its_tokens_only() -> None:
    processor = LogitBiasLogitsProcessor(V, CPU)
    processor.update_state([row(0, logit_bias={0: 1.5, 11: -100.0}), row(2, logit_bias={0: -0.5})])
    logits = torch.arange(3.0 * V).view(3, V)
    expected = logits.clone()
    expected[0, 0] += 1.5
    expected[0, 11] -= 100
    expected[2, 0] -= 0.5
    assert torch.equal(processor.apply(logits), expected)
    assert not processor.is_argmax_invariant()


def test_min_p_keeps_tokens_at_least_that_share_of_the_best() -> None:
    probs = torch.tensor([[0.5, 0.26, 0.24, 0.0], [0.4, 0.3, 0.2, 0.1], [0.97, 0.01, 0.01, 0.01]])
    processor = MinPLogitsProcessor(4, CPU)
    processor.update_state([row(0, min_p=0.5), row(2, min_p=1.0)])
    logits = processor.apply((probs.log() + 3).float())
    assert forbidden(logits) == [{2, 3}, set(), {1, 2, 3}]
    assert processor.is_argmax_invariant()


def test_min_p_one_keeps_all_equally_best() -> None:
    processor = MinPLogitsProcessor(4, CPU)
    processor.update_state([row(0, min_p=1.0)])
    assert forbidden(processor.apply(torch.tensor([[2.0, 2.0, 1.9, 2.0]]))) == [{2}]


@pytest.mark.parametrize(
    ("params", "wanted_by"),
    [
        ({}, set()),
        ({"min_p": 0.1}, {MinPLogitsProcessor}),
        ({"logit_bias": {1: 1.0}}, {LogitBiasLogitsProcessor}),
        ({"min_tokens": 2}, set()),
        ({"min_tokens": 2, "stop_token_ids": [1]}, {MinTokensLogitsProcessor}),
    ],
)
def test_only_wanted_processors_are_active(params: dict[str, object], wanted_by: set[type]) -> None:
    processors = build_logitsprocs(V, "cpu")
    entry = row(1, **params)
    assert processors.wants(entry.params) == bool(wanted_by)
    processors.update_state([row(0), entry])
    active = processors.argmax_invariant + processors.non_argmax_invariant
    assert {type(processor) for processor in active} == wanted_by
    processors.update_state([])
    assert processors.argmax_invariant == processors.non_argmax_invariant == []


def test_a_new_state_replaces_the_old_one() -> None:
    processors = build_logitsprocs(V, "cpu")
    processors.update_state([row(0, logit_bias={1: 1.0}), row(1, logit_bias={2: 1.0})])
    processors.update_state([row(0, logit_bias={3: 2.0})])
    (processor,) = processors.non_argmax_invariant
    assert processor.apply(torch.zeros(2, V)).nonzero().tolist() == [[0, 3]]


def test_custom_processors_join_in_order() -> None:
    class Double(LogitsProcessor):
        def is_argmax_invariant(self) -> bool:
            return False

        def wants(self, params: SamplingParams) -> bool:
            return params.logit_bias is not None

        def update_state(self, rows: object) -> None:
            pass

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            return logits * 2

    processors = LogitsProcessors([LogitBiasLogitsProcessor(V, CPU), Double(V, CPU)])
    processors.update_state([row(0, logit_bias={1: 1.0})])
    logits = torch.zeros(1, V)
    for processor in processors.non_argmax_invariant:
        logits = processor.apply(logits)
    assert logits[0, 1] == 2.0
