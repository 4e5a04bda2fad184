"""SamplingMetadata: what the sampler has to know of the batch (vLLM: `v1/sample/metadata.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from folovllm.sample.logits_processor.interface import LogitsProcessors
from folovllm.sample.ops.grammar_mask import GrammarMask


@dataclass
class SamplingMetadata:
    """Sampling parameters of B requests, in batch order; tensors lie on the device of the logits.

    InputBatch builds it anew when the batch changes and not otherwise; between changes only `positions` and
    `grammar_mask` (set by the model runner every step) and the lists in `output_token_ids` move on. Use keywords: the
    order is vLLM's.
    """

    temperature: torch.Tensor | None
    """[B] float32, 0 for greedy rows. None only if all are greedy."""
    all_greedy: bool
    """No row is drawn at random: one argmax is all the work."""
    all_random: bool
    """No row is greedy."""
    top_p: torch.Tensor | None
    """[B] float32 in (0, 1]; None where no row restricts it."""
    top_k: torch.Tensor | None
    """[B] int32 in [1, V], V is off; None where no row restricts it."""
    generators: dict[int, torch.Generator]
    """Row -> generator; used only where `seeds` is None."""
    max_num_logprobs: int | None
    """Most log probabilities that a row wants: 0 is the drawn token's alone, -1 all, None none."""
    no_penalties: bool
    """No row has a penalty: the fields for penalties are not read."""
    prompt_token_ids: torch.Tensor | None
    """[B, P] int64, padded with V; may be None without penalties."""
    frequency_penalties: torch.Tensor
    """[B] float32, 0 is off."""
    presence_penalties: torch.Tensor
    """[B] float32, 0 is off."""
    repetition_penalties: torch.Tensor
    """[B] float32, 1 is off."""
    output_token_ids: list[list[int]]
    """Generated tokens of each row: live lists."""
    allowed_token_ids_mask: torch.Tensor | None
    """[B, V] bool, True is forbidden; None where every token is allowed."""
    bad_words_token_ids: dict[int, list[list[int]]]
    """Row -> words that may not be generated, as token ids."""
    logitsprocs: LogitsProcessors = field(default_factory=LogitsProcessors)
    """Min tokens, logit bias, min-p: processors with the batch's state in them."""
    seeds: torch.Tensor | None = None
    """[B] int64: draws are functions of (seed, position, token id). None: draws come from `generators`, or
    from torch's default generator for rows without one."""
    positions: torch.Tensor | None = None
    """[B] int64: index of the token being drawn, that is, how many tokens come before it."""
    grammar_mask: GrammarMask | None = None
    """Which tokens the grammars of this step's rows allow; None where no row has one. Set every step."""
