"""Sampler: from the logits of a step to one token per request (vLLM: `v1/sample/sampler.py`).

    logits [B, V] --(raw log probabilities, if asked for)
      -> forbid: allowed token ids, bad words   } may change which token is best
      -> min tokens, logit bias, penalties      }
      -> grammar: last, so that it always holds }
      -> greedy rows: argmax, done
      -> temperature -> min-p -> top-k, top-p -> draw

A draw is a race: token i gets an exponential clock with rate p_i and the first to ring is the draw, which is
argmax(p_i / q_i) with q_i unit exponential noise (rng.py), or, without the softmax, argmax(logit_i - log
q_i). Since the noise of a token depends on (seed, position, token id) alone, the race may be held among the
candidates that top-k and top-p leave: the winner is the same as over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from folovllm.outputs import SamplerOutput
from folovllm.sample.metadata import SamplingMetadata
from folovllm.sample.ops.bad_words import apply_bad_words
from folovllm.sample.ops.grammar_mask import apply_grammar_mask, mark_dead_rows
from folovllm.sample.ops.logprobs import compute_logprobs, gather_logprobs
from folovllm.sample.ops.penalties import apply_all_penalties
from folovllm.sample.ops.topk_topp import apply_top_k_top_p_pytorch, restricted_rows, select_candidates
from folovllm.sample.rng import exponential_noise
from folovllm.sampling_params import SAMPLING_EPS

_CACHED_ELEMENTS = 1 << 19
"""So much noise at a time stays in a CPU's cache: twice as fast as a large batch at once."""


class Sampler(nn.Module):
    """Draws the next token of every row; holds no state and no weights."""

    compute_logprobs = staticmethod(compute_logprobs)
    gather_logprobs = staticmethod(gather_logprobs)

    def forward(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> SamplerOutput:
        """Draw one token per row.

        Args:
            logits: [B, V]; float32 logits are overwritten.
            sampling_metadata: for the same B rows.

        Returns:
            Token ids [B, 1] int64. Log probabilities, where a row wants them, are those of the logits as
            given, before any processing. A row in which every token is forbidden gets NO_TOKEN where it has a
            grammar, else an arbitrary token.

        Raises:
            ValueError: random rows have seeds but no positions.
        """
        num_logprobs = sampling_metadata.max_num_logprobs
        raw_logprobs = None if num_logprobs is None else compute_logprobs(logits)
        logits = logits.to(torch.float32)
        logits = self.apply_logits_processors(logits, sampling_metadata)
        mask = sampling_metadata.grammar_mask
        if mask is not None:
            apply_grammar_mask(logits, mask)
        sampled = self.sample(logits, sampling_metadata)
        logprobs = None
        if raw_logprobs is not None and num_logprobs is not None:
            logprobs = gather_logprobs(raw_logprobs, num_logprobs, sampled)
        if mask is not None:
            sampled = mark_dead_rows(sampled, logits, mask)
        return SamplerOutput(sampled_token_ids=sampled.unsqueeze(-1), logprobs_tensors=logprobs)

    @staticmethod
    def apply_logits_processors(
        logits: torch.Tensor, sampling_metadata: SamplingMetadata, predict_bonus_token: bool = False
    ) -> torch.Tensor:
        """Apply in place, and return, all that may change the best token: masks, processors, penalties.

        Raises:
            ValueError: `predict_bonus_token` is True; it belongs to speculative decoding.
        """
        if predict_bonus_token:
            raise ValueError("predict_bonus_token=True is not supported: there is no speculative decoding.")
        if sampling_metadata.allowed_token_ids_mask is not None:
            logits.masked_fill_(sampling_metadata.allowed_token_ids_mask, float("-inf"))
        if sampling_metadata.bad_words_token_ids:
            apply_bad_words(logits, sampling_metadata.bad_words_token_ids, sampling_metadata.output_token_ids)
        for processor in sampling_metadata.logitsprocs.non_argmax_invariant:
            logits = processor.apply(logits)
        return Sampler.apply_penalties(logits, sampling_metadata, sampling_metadata.output_token_ids)

    @staticmethod
    def apply_penalties(
        logits: torch.Tensor, sampling_metadata: SamplingMetadata, output_token_ids: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Apply repetition, frequency and presence penalties, if there are any, in place; return logits."""
        if sampling_metadata.no_penalties:
            return logits
        assert sampling_metadata.prompt_token_ids is not None
        return apply_all_penalties(
            logits,
            sampling_metadata.prompt_token_ids,
            sampling_metadata.presence_penalties,
            sampling_metadata.frequency_penalties,
            sampling_metadata.repetition_penalties,
            output_token_ids,
        )

    def sample(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> torch.Tensor:
        """Return token ids [B] int64 for processed logits [B, V] float32, which are overwritten."""
        if sampling_metadata.all_greedy:
            return argmax(logits)
        greedy = None if sampling_metadata.all_random else argmax(logits)
        temperature = sampling_metadata.temperature
        assert temperature is not None
        logits = self.apply_temperature(logits, temperature, sampling_metadata.all_random)
        for processor in sampling_metadata.logitsprocs.argmax_invariant:
            logits = processor.apply(logits)
        drawn = random_sample(logits, sampling_metadata)
        return drawn if greedy is None else torch.where(temperature < SAMPLING_EPS, greedy, drawn)

    @staticmethod
    def apply_temperature(logits: torch.Tensor, temperature: torch.Tensor, all_random: bool) -> torch.Tensor:
        """Divide `logits` [B, V] by `temperature` [B] in place; greedy rows, if there may be any, by 1."""
        if not all_random:
            temperature = torch.where(temperature < SAMPLING_EPS, 1.0, temperature)
        return logits.div_(temperature.unsqueeze(1))


def argmax(scores: torch.Tensor) -> torch.Tensor:
    """Return the index of the largest score of each row, the first of equals: [B, n] -> [B] int64."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        # numpy's is vectorised, torch's is not: 4 us a row against 62 us at V = 49152.
        return torch.from_numpy(scores.detach().numpy().argmax(axis=-1))
    return scores.argmax(dim=-1)


def random_sample(logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> torch.Tensor:
    """Draw from softmax(logits) restricted by top-k and top-p: [B, V] float32, overwritten -> [B] int64.

    On the CPU rows that are restricted are drawn among their candidates and the others from the whole
    vocabulary. On CUDA telling them apart would make the host wait, so one restricted row makes all of them
    candidates' races.
    """
    seeds, positions = sampling_metadata.seeds, sampling_metadata.positions
    k, p = sampling_metadata.top_k, sampling_metadata.top_p
    if seeds is None:
        logits = apply_top_k_top_p_pytorch(logits, k, p)
        return argmax(logits.sub_(_generator_noise(logits, sampling_metadata.generators).log_()))
    if positions is None:
        raise ValueError("positions=None with seeds: set SamplingMetadata.positions before sampling.")
    if k is None and p is None:
        return _race(logits, seeds, positions)
    restricted = restricted_rows(logits.shape[1], k, p)
    if logits.is_cuda or bool(restricted.all()):
        values, ids = select_candidates(logits, k, p)
        return _race(values, seeds, positions, ids)
    tokens = torch.empty_like(seeds)
    free = (~restricted).nonzero().squeeze(1)
    tokens[free] = _race(logits[free], seeds[free], positions[free])
    narrow = restricted.nonzero().squeeze(1)
    if narrow.numel() > 0:
        values, ids = select_candidates(
            logits[narrow], None if k is None else k[narrow], None if p is None else p[narrow]
        )
        tokens[narrow] = _race(values, seeds[narrow], positions[narrow], ids)
    return tokens


def _race(
    logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the id [B] that wins among `token_ids` [B, n] with these logits (None: the whole vocabulary)."""
    if token_ids is None and logits.device.type == "cpu":
        rows = max(1, _CACHED_ELEMENTS // logits.shape[1])
        if logits.shape[0] > rows:
            parts = zip(logits.split(rows), seeds.split(rows), positions.split(rows), strict=True)
            return torch.cat([_race(*part) for part in parts])
    noise = exponential_noise(seeds, positions, logits.shape[1], logits.device, token_ids).log_()
    winner = argmax(torch.sub(logits, noise, out=noise))
    return winner if token_ids is None else token_ids.gather(1, winner.unsqueeze(1)).squeeze(1)


def _generator_noise(logits: torch.Tensor, generators: dict[int, torch.Generator]) -> torch.Tensor:
    """Return unit exponential noise shaped like `logits` from the rows' generators, or torch's own."""
    noise = torch.empty_like(logits)
    if len(generators) < logits.shape[0]:
        noise.exponential_()
    for row, generator in generators.items():
        noise[row].exponential_(generator=generator)
    return noise
