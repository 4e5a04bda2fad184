"""Causal attention of prompt chunks over pages, in Triton: FlashAttention whose keys and values are gathered by page.

A chunk is the last q_len tokens of a context of seq_len tokens; the earlier ones are in the cache already, and so are
the chunk's own keys and values, written just before. One program takes a tile of queries and walks the keys:

    keys ->      0          BLOCK_N       2 BLOCK_N      3 BLOCK_N
    query tile   |  all seen   |   all seen   |  diagonal   |  never read
    positions    |             |              |  x          |
    p .. p + n   |  no mask    |   no mask    |  x x  mask  |
                 |             |              |  x x x      |

Only tiles on the diagonal pay for a mask; those above it are not read. Nothing of size q_len x seq_len is ever stored:
a running maximum, a running sum and the output tile are all that online softmax needs (see triton_decode.py).

The query heads of one KV head are packed into the rows of a tile, token after token, so that keys and values are read
once for all of them: row r is token r // G, head r % G. Programs are listed with the most keys first: a long one that
starts last would leave the other multiprocessors waiting.

The walk starts at key 0 whatever the chunk, so a row's bits do not depend on where a prompt was cut.
vLLM's counterpart is `v1/attention/ops/triton_unified_attention.py`. Legend: T tokens in the step, B requests,
H query heads, Hkv KV heads, G = H / Hkv, D head size, Nb blocks, Bs block size.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are typed by Triton, from the arguments of each launch.

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
import triton.language as tl

from folovllm.attention.triton_decode import LOG2_E
from folovllm.utils.common import power_of_2_at_least
from folovllm.utils.triton_launch import fast_launch


@dataclass(frozen=True)
class PrefillConfig:
    """The tiles of the kernel."""

    block_m: int
    """Rows of a query tile (tokens x heads of a group), a power of two >= 16 and >= G."""
    block_n: int
    """Keys of a tile, a power of two >= 16."""
    num_warps: int
    """Warps of a program."""
    num_stages: int
    """Tiles in flight."""
    table_ahead: bool = True
    """Read the block ids of a tile while the tile before it is computed."""

    def tile_tokens(self, group: int) -> int:
        """Return how many tokens a query tile holds when `group` heads share a KV head."""
        return self.block_m // group


@triton.jit
def _attend_tiles(
    acc,
    highest,
    total,
    q,
    key_base,
    value_base,
    table,
    begin,
    end,
    positions,
    qk_scale,
    stride_block,
    stride_token,
    MASKED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TABLE_AHEAD: tl.constexpr,
):
    """Walk keys begin..end, `end` exclusive. MASKED: some rows must not see all of them; the last tile may be short."""
    dims = tl.arange(0, D_PAD)
    tokens = begin + tl.arange(0, BLOCK_N)
    block = tl.load(table + tokens // BLOCK_SIZE, mask=tokens < end, other=0)
    for start in range(begin, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        if not TABLE_AHEAD:
            block = tl.load(table + tokens // BLOCK_SIZE, mask=tokens < end, other=0)
        at = block.to(tl.int64) * stride_block + (tokens % BLOCK_SIZE) * stride_token  # a pool may exceed 2^31 numbers
        offsets = at[:, None] + dims[None, :]
        if TABLE_AHEAD:
            ahead = tokens + BLOCK_N
            block = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < end, other=0)
        if MASKED or D != D_PAD:
            wanted = (tokens < end)[:, None] & (dims < D)[None, :]
            keys = tl.load(key_base + offsets, mask=wanted, other=0.0)
            values = tl.load(value_base + offsets, mask=wanted, other=0.0)
        else:
            keys = tl.load(key_base + offsets)
            values = tl.load(value_base + offsets)
        scores = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee")
        if MASKED:
            scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        # Every row sees key 0, so from the first tile on the maximum is finite.
        new_highest = tl.maximum(highest, tl.max(scores, 1) * qk_scale)
        shrink = tl.exp2(highest - new_highest)
        p = tl.exp2(scores * qk_scale - new_highest[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), values.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
        highest = new_highest
    return acc, highest, total


@fast_launch
@triton.jit(do_not_specialize=["stride_table"])
def _prefill_kernel(
    query,
    key_cache,
    value_cache,
    block_table,
    tiles,
    out,
    qk_scale,
    v_scale,
    stride_query_row,
    stride_out_row,
    stride_block,
    stride_token,
    stride_table,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TABLE_AHEAD: tl.constexpr,
):
    """One program: KV head program_id(0) of query tile program_id(1)."""
    kv_head, tile = tl.program_id(0), tl.program_id(1)
    # 1. The tile: request, first row of query, position of that row's token, tokens.
    req = tl.load(tiles + tile * 4).to(tl.int64)
    first_row = tl.load(tiles + tile * 4 + 1).to(tl.int64)
    first_position = tl.load(tiles + tile * 4 + 2)
    num_tokens = tl.load(tiles + tile * 4 + 3)
    packed, dims = tl.arange(0, BLOCK_M), tl.arange(0, D_PAD)
    token, head = packed // GROUP, kv_head * GROUP + packed % GROUP
    used = (token < num_tokens)[:, None]
    if D != D_PAD:
        used = used & (dims < D)[None, :]
    q_offsets = (first_row + token) * stride_query_row + head * D
    q = tl.load(query + q_offsets[:, None] + dims[None, :], mask=used, other=0.0)
    positions = first_position + token
    # 2. Keys up to the tile's first token are seen by all its rows, whole tiles of them without a mask.
    end = first_position + num_tokens
    unmasked_end = (first_position + 1) // BLOCK_N * BLOCK_N
    table = block_table + req * stride_table
    key_base, value_base = key_cache + kv_head * D, value_cache + kv_head * D
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    acc, highest, total = _attend_tiles(
        acc, highest, total, q, key_base, value_base, table, 0, unmasked_end, positions, qk_scale,
        stride_block, stride_token, False, BLOCK_SIZE, BLOCK_N, D, D_PAD, TABLE_AHEAD,
    )  # fmt: skip
    # 3. The diagonal.
    acc, highest, total = _attend_tiles(
        acc, highest, total, q, key_base, value_base, table, unmasked_end, end, positions, qk_scale,
        stride_block, stride_token, True, BLOCK_SIZE, BLOCK_N, D, D_PAD, TABLE_AHEAD,
    )  # fmt: skip
    attended = acc * (v_scale / total)[:, None]
    out_offsets = (first_row + token) * stride_out_row + head * D
    tl.store(out + out_offsets[:, None] + dims[None, :], attended.to(out.dtype.element_ty), mask=used)


@functools.cache
def choose_prefill_config(
    group: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_size: int = 128,
    shared_memory_bytes: int = 227 * 1024,
) -> PrefillConfig:
    """Return the tiles for `group` query heads a KV head. They depend on the model alone, never on the batch."""
    if dtype.itemsize == 4:  # float32 runs without tensor cores: small tiles, or registers spill
        config = PrefillConfig(max(32, power_of_2_at_least(group)), 32, 8, 1)
    elif head_size > 128:
        config = PrefillConfig(max(64, power_of_2_at_least(group)), 64, 8, 2)
    else:
        config = PrefillConfig(max(64, power_of_2_at_least(group)), 64, 4, 3)
    row_bytes: int = power_of_2_at_least(head_size) * dtype.itemsize

    def fits(config: PrefillConfig) -> bool:
        rows = config.block_m + 2 * config.block_n * max(1, config.num_stages - 1)
        return rows * row_bytes <= shared_memory_bytes

    while not fits(config) and config.num_stages > 1:
        config = replace(config, num_stages=config.num_stages - 1)
    while not fits(config) and config.block_n > 16:
        config = replace(config, block_n=config.block_n // 2)
    return config


def build_tiles(
    starts: Sequence[int] | np.ndarray, seq_lens: Sequence[int] | np.ndarray, requests: Sequence[int], tile_tokens: int
) -> np.ndarray:
    """Return the query tiles of `requests`, most keys first: [tiles, 4] int32 of request, row, position, tokens.

    starts [B + 1], seq_lens [B]: query_start_loc and seq_lens of the step; a tile holds at most `tile_tokens` tokens.
    """
    reqs = np.asarray(requests, dtype=np.int32)
    first_rows = np.asarray(starts, dtype=np.int32)[reqs]
    query_lens = np.asarray(starts, dtype=np.int32)[reqs + 1] - first_rows
    history = np.asarray(seq_lens, dtype=np.int32)[reqs] - query_lens
    num_tiles = -(-query_lens // tile_tokens)
    owner = np.repeat(np.arange(len(reqs)), num_tiles)
    done = (np.arange(len(owner)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)) * tile_tokens
    tokens = np.minimum(query_lens[owner] - done, tile_tokens)
    tiles = np.stack([reqs[owner], first_rows[owner] + done, history[owner] + done, tokens], axis=1)
    return np.ascontiguousarray(tiles[np.argsort(-(tiles[:, 2] + tiles[:, 3]), kind="stable")], dtype=np.int32)


def paged_prefill(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    config: PrefillConfig,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Attend with the tokens of `tiles`, causally, to their requests' pages; mutates those rows of `out` only.

    query, out [T, H, D], rows contiguous; kv_cache [2, Nb, Bs, Hkv, D] of the same dtype or float8_e4m3fn (scales as in
    paged_decode), the chunks' own keys and values included; block_table [B, blocks] int32; tiles [tiles, 4] int32 on
    the device, from build_tiles with config.tile_tokens(H / Hkv) tokens a tile.
    """
    _, num_heads, head_size = query.shape
    block_size, num_kv_heads = kv_cache.shape[2], kv_cache.shape[3]
    group = num_heads // num_kv_heads
    assert group <= config.block_m
    if tiles.shape[0] == 0:
        return
    keys, values = kv_cache.unbind()
    _prefill_kernel[(num_kv_heads, tiles.shape[0])](
        query, keys, values, block_table, tiles, out, scale * k_scale * LOG2_E, v_scale,
        query.stride(0), out.stride(0), kv_cache.stride(1), kv_cache.stride(2), block_table.stride(0),
        GROUP=group, D=head_size, D_PAD=max(16, power_of_2_at_least(head_size)), BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, TABLE_AHEAD=config.table_ahead,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
