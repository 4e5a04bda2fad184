"""Sampling on the device: the sampler's race in one pass over the logits (vLLM: `v1/worker/gpu/sample/gumbel.py`,
`v1/sample/ops/topk_topp_triton.py`).

A draw is argmax(logit / T - log(noise)) with noise that depends on (seed, position, token id) alone (rng.py). So the
vocabulary may be cut among programs, and nothing of size [B, V] is ever written:

    logits row   |--- split 0 ---|--- split 1 ---|--- split 2 ---|        _race_kernel, B x S programs
                  (score, id)     (score, id)     (score, id)
    winner       best score, of equals the lowest id                      _pick_kernel, B programs

Noise costs more than the read: two logarithms a token. But -log(noise) <= -log(u) for the uniform number u behind it,
and the exponent and fraction of u, read as an integer, bound that from above for the price of two conversions. Only a
tile whose bound beats the best score so far is scored exactly: about ln(tiles) of them.

Top-k and top-p need no sort either (_restrict_kernel, B programs, one for a whole row):

    top-p   The unrestricted winner is the restricted one if it is allowed, and whether it is takes one pass: token t
            stays if the mass of what is better than t (a larger logit, or an equal one and a smaller id) is below p of
            the whole. If it is not allowed, nothing worse than it is either: race again among what is better, and so
            on. At p = 0.9 nine rows in ten need no second race.
    top-k   Each of 4096 lanes takes the best of the tokens it sees. The k-th best of those bounds the k-th best logit
            from below, and closely: what reaches it is a short list, finished in registers. Where the list would be
            long, the k-th best logit is searched three bits a pass instead.

Every launch's grid follows from (B, V), so that a CUDA graph can hold it; rows without restrictions leave at once.
Import this module only where Triton is installed; `fused_sampler.py` holds the dispatch and the plain-torch twin.
"""

import torch
import triton
import triton.language as tl

from folovllm.sampling_params import SAMPLING_EPS
from folovllm.utils.common import cdiv
from folovllm.utils.triton_launch import fast_launch

_NEG_INF = tl.constexpr(float("-inf"))
_EPS = tl.constexpr(SAMPLING_EPS)
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)
# rng.py's constants, as unsigned numbers.
_SEED64 = tl.constexpr(0x9E3779B97F4A7C15)
_POSITION64 = tl.constexpr(0xD6E8FEB86659FD93)
_MIX64_0 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX64_1 = tl.constexpr(0x94D049BB133111EB)
_SPREAD32 = tl.constexpr(0x9E3779B9)
_MIX32_0 = tl.constexpr(0x7FEB352D)
_MIX32_1 = tl.constexpr(0x846CA68B)
_SCALE = tl.constexpr(2.0**-31 * (1 - 2.0**-24))

_PROGRAMS = 1056
"""Programs that the race is cut into, about: eight for each of an H100's 132 multiprocessors."""
_MAX_SPLITS = 128
"""A power of two, and the same for every batch size, so that each kernel is compiled once."""


@triton.jit
def _keys(seed, position):  # type: ignore[no-untyped-def]
    """Two 32-bit keys of a row: splitmix64's finalizer of seed * A + position * B."""
    x = seed.to(tl.uint64) * _SEED64 + position.to(tl.uint64) * _POSITION64
    x ^= x >> 30
    x *= _MIX64_0
    x ^= x >> 27
    x *= _MIX64_1
    x ^= x >> 31
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def _random_bits(ids, key_0, key_1):  # type: ignore[no-untyped-def]
    """31 random bits for each token id, int32: the integers of rng.random_bits."""
    x = ids.to(tl.uint32) * _SPREAD32 + key_0
    x ^= x >> 16
    x *= _MIX32_0
    x += key_1
    x ^= x >> 15
    x *= _MIX32_1
    signed = x.to(tl.int32, bitcast=True)
    signed ^= signed >> 16  # an arithmetic shift, as rng.py's
    return signed & 0x7FFFFFFF


@triton.jit
def _score(x, temperature, bits):  # type: ignore[no-untyped-def]
    """logit / T - log(noise), noise = -log(1 - u), as the sampler computes it."""
    u = (bits.to(tl.float32) + 0.5) * _SCALE
    # log1p(-u): log(w) is off as w = 1 - u is rounded, and u / (1 - w) corrects for it.
    w = 1.0 - u
    lost = 1.0 - w
    noise = tl.where(lost == 0.0, u, -tl.log(w) * tl.div_rn(u, tl.where(lost == 0.0, 1.0, lost)))
    return tl.div_rn(x, temperature) - tl.log(noise)


@triton.jit
def _race_tile(x, ids, start, temperature, key_0, key_1, best, best_id):  # type: ignore[no-untyped-def]
    """Return the best (score, id) so far after tokens ids = start, start + 1, ... with logits x (-inf: not in it)."""
    bits = _random_bits(ids, key_0, key_1)
    # A positive float's bits, read as an integer, are 2**23 * (127 + its log2) or a little less. Hence an upper bound
    # of -log(u); 1e-6 and 1e-4 cover all rounding.
    log_bits = bits.to(tl.float32).to(tl.int32, bitcast=True).to(tl.float32)
    slope = 1.0 / temperature
    scaled = tl.maximum(x * (slope * (1 + 1e-6)), x * (slope * (1 - 1e-6)))
    bound = scaled + ((127 + 31) * _LN2 + 1e-4 - log_bits * (_LN2 * 2.0**-23))
    if tl.max(bound, axis=0) > best:
        score, index = tl.max(_score(x, temperature, bits), axis=0, return_indices=True)
        if score > best:
            best = score
            best_id = start + index
    return best, best_id


@fast_launch
@triton.jit  # type: ignore[untyped-decorator]
def _race_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [B, V]
    logits_stride,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    score_ptr,  # [B, S]
    id_ptr,
    max_ptr,
    V,
    tokens_per_split,
    HAS_TEMPERATURE: tl.constexpr,
    NEED_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The best token of split `program_id(1)` of row `program_id(0)`: greedy, or after the race."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    begin = split * tokens_per_split
    end = tl.minimum(V, begin + tokens_per_split)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    lanes = tl.arange(0, BLOCK)
    logits_row = logits_ptr + row * logits_stride
    temperature = 0.0
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
    at = row * tl.num_programs(1) + split
    best = tl.full([], _NEG_INF, tl.float32)
    best_id = begin
    if temperature < _EPS:
        # Each lane keeps the first of its largest; lanes are compared once, at the end.
        values = tl.full([BLOCK], _NEG_INF, tl.float32)
        ids = begin + lanes
        for start in range(begin, end, BLOCK):
            x = tl.load(logits_row + start + lanes, mask=start + lanes < end, other=_NEG_INF).to(tl.float32)
            ids = tl.where(x > values, start + lanes, ids)
            values = tl.maximum(x, values)
        best = tl.max(values, axis=0)
        best_id = tl.min(tl.where(values == best, ids, V), axis=0)
    else:
        key_0, key_1 = _keys(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
        values = tl.full([BLOCK], _NEG_INF, tl.float32)
        for start in range(begin, end, BLOCK):
            ids = start + lanes
            x = tl.load(logits_row + ids, mask=ids < end, other=_NEG_INF).to(tl.float32)
            if NEED_MAX:
                values = tl.maximum(x, values)
            best, best_id = _race_tile(x, ids, start, temperature, key_0, key_1, best, best_id)
        if NEED_MAX:
            tl.store(max_ptr + at, tl.max(values, axis=0))
    tl.store(score_ptr + at, best)
    tl.store(id_ptr + at, best_id)


@triton.jit  # type: ignore[untyped-decorator]
def _winner_of_splits(score_ptr, id_ptr, row, num_splits, V, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The best score's token id, of equal scores the lowest."""
    lanes = tl.arange(0, SPLITS)
    mask = lanes < num_splits
    scores = tl.load(score_ptr + row * num_splits + lanes, mask=mask, other=_NEG_INF)
    ids = tl.load(id_ptr + row * num_splits + lanes, mask=mask, other=V)
    return tl.min(tl.where(scores == tl.max(scores, axis=0), ids, V), axis=0)


@fast_launch
@triton.jit(do_not_specialize=["num_splits"])  # type: ignore[untyped-decorator]
def _pick_kernel(  # type: ignore[no-untyped-def]
    score_ptr, id_ptr, out_ptr, num_splits, V, SPLITS: tl.constexpr, PDL: tl.constexpr
):
    """Row `program_id(0)`'s winner."""
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    winner = _winner_of_splits(score_ptr, id_ptr, row, num_splits, V, SPLITS)
    tl.store(out_ptr + row, winner.to(tl.int64))


@triton.jit
def _order_key(x):  # type: ignore[no-untyped-def]
    """float32 -> int32 in the same order; its own inverse on the bits."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_order_key(key):  # type: ignore[no-untyped-def]
    """The float32 of an order key (int64 scalar)."""
    bits = key.to(tl.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _kth_of_tile(x, k):  # type: ignore[no-untyped-def]
    """The k-th largest of a tile: its order key found bit by bit, from the highest."""
    keys = _order_key(x).to(tl.int64)
    low = tl.full([], -2147483648, tl.int64)
    step = tl.full([], 2147483648, tl.int64)
    for _ in range(32):
        if tl.sum((keys >= low + step).to(tl.int32), axis=0) >= k:
            low += step
        step = step // 2
    return _from_order_key(low)


@triton.jit  # type: ignore[untyped-decorator]
def _kth_of_row(logits_row, k, V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A logit that exactly the top k (and equals of the k-th) reach, for long lists: three bits a pass.

    Eight slices of the keys from `low` on are counted at a time, in eight 8-bit counters of one integer a lane.
    """
    lanes = tl.arange(0, BLOCK)
    low = tl.full([], -2147483648, tl.int64)
    shift = tl.full([], 29, tl.int64)
    while shift >= 0:
        counters = tl.zeros([BLOCK], tl.int64)
        above = tl.zeros([BLOCK], tl.int32)
        for start in range(0, V, BLOCK):
            mask = start + lanes < V
            x = tl.load(logits_row + start + lanes, mask=mask, other=_NEG_INF).to(tl.float32)
            piece = (_order_key(x).to(tl.int64) - low) >> shift
            above += (mask & (piece >= 8)).to(tl.int32)
            inside = mask & (piece >= 0) & (piece < 8)
            counters += tl.where(inside, tl.full([], 1, tl.int64) << (8 * (piece & 7)), 0)
        reached = tl.sum(above, axis=0)
        chosen = tl.full([], -1, tl.int32)
        exact = False
        for i in tl.static_range(8):
            if chosen < 0:
                reached += tl.sum((counters >> (8 * (7 - i))) & 255, axis=0).to(tl.int32)
                if reached >= k:
                    chosen = 7 - i
                    exact = reached == k
        low += chosen.to(tl.int64) << shift
        shift = tl.where(exact | (shift == 0), -1, tl.maximum(shift - 3, 0))
    return _from_order_key(low)


@triton.jit  # type: ignore[untyped-decorator]
def _list_candidates(logits_row, x_ptr, id_ptr, k, V, BLOCK: tl.constexpr, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write down, by rising id, tokens among which the top k are; return how many (above CAP: too many, list cut)."""
    lanes = tl.arange(0, BLOCK)
    best_of_lane = tl.full([BLOCK], _NEG_INF, tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits_row + start + lanes, mask=start + lanes < V, other=_NEG_INF).to(tl.float32)
        best_of_lane = tl.maximum(best_of_lane, x)
    low = _kth_of_tile(best_of_lane, k)
    count = 0
    for start in range(0, V, BLOCK):
        mask = start + lanes < V
        x = tl.load(logits_row + start + lanes, mask=mask, other=_NEG_INF).to(tl.float32)
        hit = (mask & (x >= low)).to(tl.int32)
        found = tl.sum(hit, axis=0)
        if found > 0:
            to = count + tl.cumsum(hit, axis=0) - 1
            keep = (hit > 0) & (to < CAP)
            tl.store(x_ptr + to, x, mask=keep)
            tl.store(id_ptr + to, start + lanes, mask=keep)
            count += found
    return count


@triton.jit  # type: ignore[untyped-decorator]
def _draw_from_list(  # type: ignore[no-untyped-def]
    x_ptr, id_ptr, count, k, p, top, temperature, key_0, key_1, V, CAP: tl.constexpr
):
    """Top-k, top-p and the race among `count` candidates, all in registers."""
    lanes = tl.arange(0, CAP)
    live = lanes < count
    x = tl.load(x_ptr + lanes, mask=live, other=_NEG_INF)
    ids = tl.load(id_ptr + lanes, mask=live, other=V)
    live &= x >= _kth_of_tile(x, k)
    mass = tl.where(live, tl.exp2((x - top) * (_LOG2_E / temperature)), 0.0)
    allowed = p * tl.sum(mass, axis=0)
    scores = tl.where(live, _score(x, temperature, _random_bits(ids, key_0, key_1)), _NEG_INF)
    winner = V
    racing = True
    while racing:
        winner = tl.min(tl.where(scores == tl.max(scores, axis=0), ids, V), axis=0)
        x_winner = tl.max(tl.where(ids == winner, x, _NEG_INF), axis=0)
        better = live & ((x > x_winner) | ((x == x_winner) & (ids < winner)))
        before = tl.sum(tl.where(better, mass, 0.0), axis=0)
        racing = (p < 1.0) & (before > 0.0) & (before >= allowed)
        scores = tl.where(better, scores, _NEG_INF)
    return winner


@triton.jit  # type: ignore[untyped-decorator]
def _draw_from_row(  # type: ignore[no-untyped-def]
    logits_row, winner, floor, p, top, temperature, key_0, key_1, V, BLOCK: tl.constexpr
):
    """Top-p and the race among the logits >= floor of a whole row, of which `winner` won the unrestricted race."""
    lanes = tl.arange(0, BLOCK)
    racing = True
    while racing:
        x_winner = tl.load(logits_row + winner).to(tl.float32)
        racing = x_winner < floor
        if (p < 1.0) & (x_winner >= floor):
            total = tl.zeros([BLOCK], tl.float32)
            before = tl.zeros([BLOCK], tl.float32)
            for start in range(0, V, BLOCK):
                ids = start + lanes
                x = tl.load(logits_row + ids, mask=ids < V, other=_NEG_INF).to(tl.float32)
                mass = tl.where(x >= floor, tl.exp2((x - top) * (_LOG2_E / temperature)), 0.0)
                better = (x > x_winner) | ((x == x_winner) & (ids < winner))
                total += mass
                before += tl.where(better, mass, 0.0)
            mass_before = tl.sum(before, axis=0)
            racing = (mass_before > 0.0) & (mass_before >= p * tl.sum(total, axis=0))
        if racing:
            best = tl.full([], _NEG_INF, tl.float32)
            best_id = winner
            for start in range(0, V, BLOCK):
                ids = start + lanes
                x = tl.load(logits_row + ids, mask=ids < V, other=_NEG_INF).to(tl.float32)
                better = (x >= floor) & ((x > x_winner) | ((x == x_winner) & (ids < winner)))
                x = tl.where(better, x, _NEG_INF)
                if tl.max(x, axis=0) > _NEG_INF:
                    best, best_id = _race_tile(x, ids, start, temperature, key_0, key_1, best, best_id)
            winner = best_id
    return winner


@fast_launch
@triton.jit(do_not_specialize=["num_splits"])  # type: ignore[untyped-decorator]
def _restrict_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    logits_stride,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    top_k_ptr,
    top_p_ptr,
    score_ptr,  # [B, S]: what _race_kernel left
    id_ptr,
    max_ptr,
    x_ptr,  # [B, CAP]: room for the list
    candidate_ptr,
    out_ptr,
    num_splits,
    V,
    max_listed_k,
    HAS_K: tl.constexpr,
    HAS_P: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Row `program_id(0)`'s winner among what its top-k, then its top-p, leave."""
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    winner = _winner_of_splits(score_ptr, id_ptr, row, num_splits, V, SPLITS)
    temperature = tl.load(temperature_ptr + row)
    k = V
    p = 1.0
    if HAS_K:
        k = tl.minimum(tl.load(top_k_ptr + row), V).to(tl.int32)
    if HAS_P:
        p = tl.load(top_p_ptr + row)
    if (temperature >= _EPS) & ((k < V) | (p < 1.0)):
        lanes = tl.arange(0, SPLITS)
        tops = tl.load(max_ptr + row * num_splits + lanes, mask=lanes < num_splits, other=_NEG_INF)
        top = tl.max(tops, axis=0)
        if top > _NEG_INF:
            logits_row = logits_ptr + row * logits_stride
            key_0, key_1 = _keys(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
            floor = tl.full([], _NEG_INF, tl.float32)
            count = CAP + 1
            if HAS_K:
                if k <= max_listed_k:
                    count = _list_candidates(logits_row, x_ptr + row * CAP, candidate_ptr + row * CAP, k, V, BLOCK, CAP)
                    tl.debug_barrier()  # other threads read the list
                if (count > CAP) & (k < V):
                    floor = _kth_of_row(logits_row, k, V, BLOCK)
            if count <= CAP:
                winner = _draw_from_list(
                    x_ptr + row * CAP,
                    candidate_ptr + row * CAP,
                    count,
                    k,
                    p,
                    top,
                    temperature,
                    key_0,
                    key_1,
                    V,
                    CAP,
                )
            else:
                winner = _draw_from_row(logits_row, winner, floor, p, top, temperature, key_0, key_1, V, BLOCK)
    tl.store(out_ptr + row, winner.to(tl.int64))


@triton.jit  # type: ignore[untyped-decorator]
def _bits_kernel(seeds_ptr, positions_ptr, out_ptr, V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The integers of the noise, for tests."""
    row = tl.program_id(0)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key_0, key_1 = _keys(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    tl.store(out_ptr + row * V + ids, _random_bits(ids, key_0, key_1), mask=ids < V)


def random_bits(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return the noise's integers [B, V] int32 as the kernels make them: those of `rng.random_bits`."""
    out = torch.empty((seeds.shape[0], vocab_size), dtype=torch.int32, device=seeds.device)
    _bits_kernel[(seeds.shape[0], cdiv(vocab_size, 1024))](seeds, positions, out, vocab_size, BLOCK=1024)
    return out


def sample_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    block: int = 2048,
    num_warps: int = 4,
    num_splits: int | None = None,
    row_block: int = 4096,
    row_warps: int = 16,
    cap: int = 1024,
    pdl: bool = False,
) -> torch.Tensor:
    """See `fused_sampler.sample_tokens`.

    `block` and `num_warps` are a race program's, `row_block` and `row_warps` those of a row that is restricted, `cap`
    the room for candidates of top-k. None of them changes a token, but for rounding at the very edge of top-p.
    """
    batch_size, vocab_size = logits.shape
    if out is None:
        out = torch.empty(batch_size, dtype=torch.int64, device=logits.device)
    if batch_size == 0:
        return out
    assert logits.stride(1) == 1 and vocab_size <= 255 * row_block
    tiles = cdiv(vocab_size, block)
    splits = min(_MAX_SPLITS, tiles, num_splits or max(1, _PROGRAMS // batch_size))
    tiles_per_split = cdiv(tiles, splits)
    splits = cdiv(tiles, tiles_per_split)
    restricted = temperature is not None and (top_k is not None or top_p is not None)
    # Apart, so that both addresses are aligned: else some batch sizes would have kernels of their own.
    scores, maxima = (torch.empty((batch_size, splits), dtype=torch.float32, device=logits.device) for _ in range(2))
    ids = torch.empty((batch_size, splits), dtype=torch.int32, device=logits.device)
    options = {"launch_pdl": True} if pdl else {}
    _race_kernel[(batch_size, splits)](
        logits,
        logits.stride(0),
        temperature,
        seeds,
        positions,
        scores,
        ids,
        maxima,
        vocab_size,
        tiles_per_split * block,
        HAS_TEMPERATURE=temperature is not None,
        NEED_MAX=restricted,
        BLOCK=block,
        PDL=pdl,
        num_warps=num_warps,
        **options,
    )
    if not restricted:
        _pick_kernel[(batch_size,)](
            scores, ids, out, splits, vocab_size, SPLITS=_MAX_SPLITS, PDL=pdl, num_warps=1, **options
        )
        return out
    candidates = torch.empty((2, batch_size, cap), dtype=torch.float32, device=logits.device)
    _restrict_kernel[(batch_size,)](
        logits,
        logits.stride(0),
        temperature,
        seeds,
        positions,
        top_k,
        top_p,
        scores,
        ids,
        maxima,
        candidates[0],
        candidates[1].view(torch.int32),
        out,
        splits,
        vocab_size,
        min(cap, row_block) // 2,
        HAS_K=top_k is not None,
        HAS_P=top_p is not None,
        SPLITS=_MAX_SPLITS,
        BLOCK=row_block,
        CAP=cap,
        PDL=pdl,
        num_warps=row_warps,
        **options,
    )
    return out
