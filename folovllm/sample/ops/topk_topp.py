"""Top-k and top-p: which tokens stay (vLLM: `v1/sample/ops/topk_topp_sampler.py`).

Sorting a vocabulary costs more than all the rest of sampling, and is rarely needed: `select_candidates` looks
at the few best tokens, and at more of them only if those turn out not to hold everything that stays. The
sampler draws among these candidates alone; `apply_top_k_top_p_pytorch` writes them back into a row of -inf.

Ties: top-k keeps every token that equals the k-th best (as vLLM does); of tokens with equal probability at
the edge of top-p those with the smallest ids stay. So the result never depends on the order in which a sort
leaves equals. Logits made in bfloat16 are full of ties.
"""

from __future__ import annotations

import torch

_NEG_INF = float("-inf")
_FIRST_GUESS_TOP_P = 256
_ROOM_FOR_EQUALS = 14
_GROWTH = 16


def restricted_rows(vocab_size: int, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    """Return which rows top-k or top-p restrict at all, bool [B]; at least one of `k`, `p` is given."""
    limited = [k < vocab_size] if k is not None else []
    limited += [p < 1.0] if p is not None else []
    return limited[0] if len(limited) == 1 else limited[0] | limited[1]


def select_candidates(
    logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best tokens of each row, best first, those that may not be drawn at -inf.

    Args:
        logits: [B, V] float32.
        k: [B] integers in [1, V]; V switches a row's top-k off. None: off for all.
        p: [B] float in (0, 1]; 1 switches a row's top-p off. None: off for all.

    Returns:
        (logits, token ids), [B, n] each, n <= V large enough for every row; ids are int64.
    """
    vocab_size = logits.shape[1]
    # softmax, not logsumexp: torch computes it row by row, so that no other row touches even the last bit.
    # Where top-k restricts every row, only what it leaves counts (on CUDA, finding out would cost a wait).
    top_k_everywhere = k is not None and not logits.is_cuda and bool((k < vocab_size).all())
    all_probs = None if p is None or top_k_everywhere else logits.softmax(dim=-1)
    n = _first_guess(logits, k)
    while True:
        values, ids = _best(logits, n)
        probs = None if all_probs is None else all_probs.gather(1, ids)
        kept, last_needed = _restrict(values, vocab_size, k, p, probs)
        if n == vocab_size:
            return kept, ids
        # Enough, if each row's list goes on below the last value that matters (so no equal of it is left out)
        # or has nothing left but forbidden tokens.
        end = values[:, -1:]
        if bool(((end < last_needed) | (end == _NEG_INF)).all()):
            return kept, ids
        n = min(vocab_size, n * _GROWTH)


def _first_guess(logits: torch.Tensor, k: torch.Tensor | None) -> int:
    """Return how many of the best tokens to look at first."""
    vocab_size = logits.shape[1]
    if logits.is_cuda:
        # Looking whether a guess was enough makes the host wait: there, sorting everything is cheaper.
        return vocab_size
    if k is None:
        return min(vocab_size, _FIRST_GUESS_TOP_P)
    guess = torch.where(k < vocab_size, k + _ROOM_FOR_EQUALS, _FIRST_GUESS_TOP_P)
    return min(vocab_size, int(guess.max()))


def _restrict(
    values: torch.Tensor,
    vocab_size: int,
    k: torch.Tensor | None,
    p: torch.Tensor | None,
    probs: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply top-k, then top-p to the best `values` [B, n] of each row, best first.

    `probs` [B, n] are their probabilities; they may be None if top-k restricts every row.

    Returns:
        (values, -inf where dropped; the smallest value [B, 1] that all of the row's result depends on).
    """
    last_needed = values[:, -1:]
    has_top_k = None
    if k is not None:
        has_top_k = (k < vocab_size).unsqueeze(1)
        kth = values.gather(1, k.to(torch.int64).clamp(1, values.shape[1]).unsqueeze(1) - 1)
        last_needed = torch.where(has_top_k, kth, last_needed)
        values = values.masked_fill(has_top_k & (values < kth), _NEG_INF)
    if p is not None:
        top_p = p.unsqueeze(1)
        if has_top_k is not None:
            # Top-p shares out the mass that top-k left.
            left = values.softmax(dim=-1)
            probs = left if probs is None else torch.where(has_top_k, left, probs)
        assert probs is not None
        mass_before = probs.cumsum(dim=-1).sub_(probs)
        dropped = (mass_before >= top_p) & (top_p < 1.0)
        dropped[:, 0] = False
        last_kept = values.masked_fill(dropped, float("inf")).amin(dim=-1, keepdim=True)
        last_needed = last_kept if has_top_k is None else torch.where(has_top_k, last_needed, last_kept)
        values = values.masked_fill(dropped, _NEG_INF)
    return values, last_needed


def _best(logits: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the n best (values, ids) of each row by falling value, equals by rising id.

    Where the n-th best has equals, any of them may be left out.
    """
    # Measured at V = 49152: topk(4096) 0.5 ms, a whole sort 3 ms.
    if n > logits.shape[1] // 4:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return values[:, :n], ids[:, :n]
    ids = logits.topk(n, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def best_tokens(logits: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the n best (values, int64 ids) [B, n] of each row by falling value, equals by rising id.

    On CUDA equals come in any order: sorting everything for it would cost more than the rest.
    """
    vocab_size = logits.shape[1]
    if logits.is_cuda:
        best = logits.topk(n, dim=-1)
        return best.values, best.indices
    look_at = n + _ROOM_FOR_EQUALS
    while True:
        values, ids = _best(logits, min(vocab_size, look_at))
        # Equals of the n-th best may have been left out, unless the list goes on below it.
        if look_at >= vocab_size or bool((values[:, -1] < values[:, n - 1]).all()):
            return values[:, :n], ids[:, :n]
        look_at *= _GROWTH


def apply_top_k_top_p_pytorch(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    """Set the logits of all tokens that top-k, then top-p, leave out to -inf, in place, and return `logits`.

    Args:
        logits: [B, V] float32.
        k: [B] integers or None; V (or more) switches a row off.
        p: float, [B] or broadcastable to it, or None; 1 switches a row off. Rows keep the smallest set of
            best tokens whose mass, of what top-k left, reaches p. The best token always stays.
    """
    batch_size, vocab_size = logits.shape
    if k is None and p is None:
        return logits
    k = None if k is None else k.expand(batch_size)
    p = None if p is None else p.expand(batch_size)
    rows = restricted_rows(vocab_size, k, p).nonzero().squeeze(1)
    if rows.numel() == 0:
        return logits
    chosen = logits[rows]
    values, ids = select_candidates(chosen, None if k is None else k[rows], None if p is None else p[rows])
    logits[rows] = chosen.fill_(_NEG_INF).scatter_(1, ids, values)
    return logits
