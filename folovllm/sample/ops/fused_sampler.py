"""Sampling without the host: Triton on CUDA, the sampler's own functions elsewhere (vLLM: `v1/worker/gpu/sample/`).

`can_sample_on_device` says which batches need nothing but temperature, top-k and top-p. For those `sample_tokens` draws
what `Sampler` draws, and its CUDA launches follow from (B, V) alone, so that a CUDA graph of the step can end with it.

Legend: B requests, V vocabulary.
"""

from __future__ import annotations

import functools
import types

import torch

from folovllm.sample.logits_processor.interface import LogitsProcessors
from folovllm.sample.metadata import SamplingMetadata
from folovllm.sample.sampler import Sampler, argmax


def can_sample_on_device(metadata: SamplingMetadata) -> bool:
    """Return whether `sample_tokens` draws all that `Sampler` would for this batch.

    Not so with log probabilities, penalties, allowed or bad words, any logits processor that has rows (min tokens,
    logit bias, min-p), or random rows without seeds or positions, which draw from generators. All of it is known on
    the host: asking costs no wait. A grammar's mask is not counted: the caller applies it to the logits before.
    """
    processors = metadata.logitsprocs
    return (
        metadata.max_num_logprobs is None
        and metadata.no_penalties
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and not processors.argmax_invariant
        and not processors.non_argmax_invariant
        and (metadata.all_greedy or metadata.seeds is not None)
    )


@functools.cache
def _load_kernels() -> types.ModuleType | None:
    """Return the Triton kernels, or None where Triton is not installed."""
    try:
        from folovllm.sample.ops import triton_sampler
    except ImportError:
        return None
    return triton_sampler


def sample_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Draw one token per row.

    Args:
        logits: [B, V], float32, bfloat16 or float16, rows contiguous; not changed.
        temperature: [B] float32, 0 for greedy rows; None: all are greedy.
        top_k: [B] integers, V or more is off; None: off for all.
        top_p: [B] float32 in (0, 1], 1 is off; None: off for all.
        seeds: [B] int64; greedy rows' are not looked at.
        positions: [B] int64: index of the token being drawn.
        out: [B] int64, where the ids go, or None for a new tensor.
        pdl: programmatic dependent launch, on Hopper GPUs and later; changes no token.

    Returns:
        Token ids [B] int64. They depend on the row alone. Of equal scores the lowest id wins. A row in which every
        token is forbidden gets an arbitrary token.
    """
    kernels = _load_kernels() if logits.is_cuda else None
    if kernels is None:
        return sample_tokens_torch(logits, temperature, top_k, top_p, seeds, positions, out)
    tokens: torch.Tensor = kernels.sample_tokens(logits, temperature, top_k, top_p, seeds, positions, out, pdl=pdl)
    return tokens


def sample_tokens_torch(
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The plain-torch twin of `sample_tokens`: Sampler.sample with these parameters and no others."""
    if temperature is None:
        tokens = argmax(logits.float())
    else:
        nothing = torch.empty(0)
        metadata = SamplingMetadata(
            temperature=temperature,
            all_greedy=False,
            all_random=False,
            top_p=top_p,
            top_k=top_k,
            generators={},
            max_num_logprobs=None,
            no_penalties=True,
            prompt_token_ids=None,
            frequency_penalties=nothing,
            presence_penalties=nothing,
            repetition_penalties=nothing,
            output_token_ids=[],
            allowed_token_ids_mask=None,
            bad_words_token_ids={},
            logitsprocs=LogitsProcessors(),
            seeds=seeds,
            positions=positions,
        )
        tokens = Sampler().sample(logits.to(torch.float32, copy=True), metadata)
    return tokens if out is None else out.copy_(tokens)
