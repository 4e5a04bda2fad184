"""PagedAttention for one new token a request, in Triton: split-KV decode (Flash-Decoding over pages).

Decoding is bound by memory: every key and value of a context is read once, each for a handful of multiplications. So
the kernel does two things and no more: it keeps many reads in flight, and it reads nothing twice.

    GQA packing     The query heads that share a KV head sit in one tile, so their keys and values are read once. Tensor
                    cores want 16 rows, and rows are free here, so the tile is padded:

                        q tile [16, D]     heads 4, 5 of KV head 2, then 14 rows of zeros

    pages           Token t of a request lies in block block_table[t // Bs], row t % Bs. A tile of N tokens is N row
                    addresses, whatever pages they come from.

    online softmax  Scores of a tile are exponentiated against the largest score seen so far; when a larger one turns
                    up, what was summed before is scaled down. exp2 is what the hardware has, so log2(e) is folded
                    into the softmax scale once.

    splits          One request has too few KV heads to fill a GPU, so its context is cut, each part has a program, and
                    the last one to finish combines them:

                        context   |------- split 0 -------|------- split 1 -------|--- split 2 ---|
                        program 0   (acc0, lse0), 1st here
                        program 2                                                   (acc2, lse2), 2nd here
                        program 1                           (acc1, lse1), 3rd of 3: the parts are all there
                                                            out = sum_i 2^(lse_i - m) acc_i / sum_i 2^(lse_i - m)

                    (lse: log2 of the sum of exponentials; m: the largest lse.) How many splits follows from the
                    request's own length, read on the device, so a launch recorded in a CUDA graph serves every
                    context: short ones stay whole, and programs without work leave at once. The parts are added in
                    the order of the context, not of arrival: the same bits in every run.

vLLM's counterpart is `v1/attention/ops/triton_decode_attention.py`, which launches a second kernel to combine. Legend:
B requests, H query heads, Hkv KV heads, D head size, Nb blocks, Bs block size.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are typed by Triton, from the arguments of each launch.

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from folovllm.utils.common import power_of_2_at_least
from folovllm.utils.triton_launch import fast_launch

LOG2_E = math.log2(math.e)
DETERMINISTIC_SPLIT_TOKENS = 256
"""Least tokens of a split in deterministic mode, for contexts of up to 32 of them; longer bounds double it."""
MAX_SPLITS = 32
"""More would cost more to combine than they save: 32 x 8 KV heads already fill 132 multiprocessors twice."""
PROGRAMS = 2048
"""Programs of a launch: some four for each place on an H100, so that uneven ones even out. Contexts are cut until there
are so many and no further, because a program costs a little also if it finds nothing to do."""
SORTED_PROGRAMS = 768
"""Programs from which on requests should come longest first: see `wants_longest_first`."""
COMBINE_NUMBERS_PER_WARP = 4096
"""Numbers of parts that a program which combines loads at once: 128 a thread."""


@dataclass(frozen=True)
class DecodeConfig:
    """How a decode is cut into programs. Every field is fixed when a CUDA graph is recorded."""

    block_n: int
    """Tokens of a tile, a power of two >= 16."""
    num_warps: int
    """Warps of a program."""
    num_stages: int
    """Tiles in flight."""
    num_splits: int = 1
    """Most parts of a context; 1 keeps every context whole."""
    split_tokens: int = 256
    """A context of n tokens is cut into ceil(n / split_tokens) parts, at most num_splits, of equally many tiles."""
    programs: int = 0
    """Programs that share the parts of one context, each taking every programs-th; 0 means num_splits."""
    table_ahead: bool = False
    """Read the block ids of a tile while the tile before it is computed."""
    pdl: bool = False
    """Programmatic dependent launch: the next kernel of the stream may start while this one drains (Hopper)."""

    @property
    def kernel(self) -> tuple[int, ...]:
        """What configs of the same compiled kernel have in common: whether a context is cut, not how."""
        return self.block_n, self.num_warps, self.num_stages, self.num_splits > 1, self.table_ahead, self.pdl


@dataclass(frozen=True)
class DecodeWorkspace:
    """Where the parts of cut contexts meet. Launches that follow one another share it, concurrent ones must not."""

    partials: torch.Tensor
    """[n] float32: outputs and lse of parts, from their programs to the one that combines them; garbage otherwise."""
    arrivals: torch.Tensor
    """[n] int32, per request and KV head: programs that have stored their parts. All 0 between launches."""

    @classmethod
    def allocate(cls, num_partials: int, num_arrivals: int, device: torch.device) -> "DecodeWorkspace":
        """Return a workspace of decode_workspace_size's numbers."""
        return cls(
            torch.empty(num_partials, dtype=torch.float32, device=device),
            torch.zeros(num_arrivals, dtype=torch.int32, device=device),
        )

    def holds(self, num_partials: int, num_arrivals: int) -> bool:
        """Return whether a launch that needs so many numbers can use this workspace."""
        return self.partials.numel() >= num_partials and self.arrivals.numel() >= num_arrivals


_workspaces: dict[torch.device, list[DecodeWorkspace]] = {}


def shared_workspace(num_partials: int, num_arrivals: int, device: torch.device) -> DecodeWorkspace:
    """Return the workspace that all launches on `device` share, grown if it is too small.

    Never freed: recorded CUDA graphs hold its address, also that of one that has since been outgrown. So it must not
    be allocated while a graph is recorded (the memory would be the graph's, and zeroed only when it is replayed): a
    launch of the same shape comes first, as it must anyway to compile the kernel.
    """
    held = _workspaces.setdefault(device, [])
    if not held or not held[-1].holds(num_partials, num_arrivals):
        recording = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        assert not recording, "launch once before recording, so that the workspace exists"
        rounded = power_of_2_at_least(num_partials), power_of_2_at_least(num_arrivals)
        held.append(DecodeWorkspace.allocate(*rounded, device))
    return held[-1]


@triton.jit
def _attend_tokens(
    q,
    key_base,
    value_base,
    table,
    begin,
    end,
    qk_scale,
    stride_block,
    stride_token,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TABLE_AHEAD: tl.constexpr,
):
    """Attend with tile q [ROWS, D_PAD] to tokens begin..end of one KV head: (sum of p v, max, sum of p), unscaled."""
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    dims = tl.arange(0, D_PAD)
    tokens = begin + tl.arange(0, BLOCK_N)
    block = tl.load(table + tokens // BLOCK_SIZE, mask=tokens < end, other=0)
    for start in range(begin, end, BLOCK_N):
        # 1. Where the tile's tokens lie. Past the end the block id is not read, and what it would point to neither.
        tokens = start + tl.arange(0, BLOCK_N)
        live = tokens < end
        if not TABLE_AHEAD:
            block = tl.load(table + tokens // BLOCK_SIZE, mask=live, other=0)
        at = block.to(tl.int64) * stride_block + (tokens % BLOCK_SIZE) * stride_token  # a pool may exceed 2^31 numbers
        if TABLE_AHEAD:  # the next tile's blocks now, so that its keys need not wait for them
            ahead = tokens + BLOCK_N
            block = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < end, other=0)
        offsets = at[:, None] + dims[None, :]
        wanted = live[:, None]
        if D != D_PAD:
            wanted = wanted & (dims < D)[None, :]
        # 2. Scores, in units of log2.
        keys = tl.load(key_base + offsets, mask=wanted, other=0.0)
        values = tl.load(value_base + offsets, mask=wanted, other=0.0)
        scores = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee") * qk_scale
        scores = tl.where(live[None, :], scores, float("-inf"))
        # 3. Online softmax: a tile holds at least one live token, so the maximum is finite.
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - new_highest)
        p = tl.exp2(scores - new_highest[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), values.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
        highest = new_highest
    return acc, highest, total


@triton.jit
def _combine_parts(
    partial_out,
    partial_lse,
    num_parts,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Weighted mean [GROUP_PAD, D_PAD] of parts [num_parts, GROUP, D], CHUNK at a time, in the context's order."""
    group, dims = tl.arange(0, GROUP_PAD), tl.arange(0, D_PAD)
    highest = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
    for start in range(0, num_parts, CHUNK):
        parts = start + tl.arange(0, CHUNK)
        at = parts[:, None] * GROUP + group[None, :]
        live = (parts < num_parts)[:, None] & (group < GROUP)[None, :]
        wanted = live[:, :, None] & (dims < D)[None, None, :]
        # Others wrote these numbers a moment ago: .cg reads them where they meet, in L2.
        lse = tl.load(partial_lse + at, mask=live, other=float("-inf"), cache_modifier=".cg")
        offsets = at[:, :, None] * D + dims[None, None, :]
        outs = tl.load(partial_out + offsets, mask=wanted, other=0.0, cache_modifier=".cg")
        # The online softmax once more. A chunk holds a live part; the padded heads get NaN, but are not stored.
        new_highest = tl.maximum(highest, tl.max(lse, 0))
        shrink = tl.exp2(highest - new_highest)
        weights = tl.exp2(lse - new_highest[None, :])
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink[:, None] + tl.sum(outs * weights[:, :, None], 0)
        highest = new_highest
    return acc / total[:, None]


# fmt: off
@fast_launch
@triton.jit(
    do_not_specialize=["num_splits", "split_tokens", "stride_table"], do_not_specialize_on_alignment=["rows", "reqs"]
)
def _decode_kernel(
    query, key_cache, value_cache, block_table, seq_lens, out, partial_out, partial_lse, arrivals, rows, reqs,
    qk_scale, v_scale, num_splits, split_tokens,
    stride_query_row, stride_out_row, stride_block, stride_token, stride_table,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, CUT: tl.constexpr, CHUNK: tl.constexpr,
    TABLE_AHEAD: tl.constexpr, PDL: tl.constexpr,
):
    """One program: a KV head, a decode, and every num_programs(2)-th split of its context from program_id(2) on."""
    kv_head, b, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:  # the kernel before may still be using the workspace: nothing is written earlier than this
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = (tl.load(rows + b) if rows is not None else b).to(tl.int64)
    req = (tl.load(reqs + b) if reqs is not None else b).to(tl.int64)
    seq_len = tl.load(seq_lens + req)
    group, dims = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    used = (group < GROUP)[:, None] & (dims < D)[None, :]
    q_offsets = (kv_head * GROUP + group)[:, None] * D + dims[None, :]
    out_row = out + row * stride_out_row
    # 1. Which part of the context is this program's?
    if seq_len <= 0:  # a padding row of a recorded batch: its output is zero, nothing of it is read
        if program == 0:
            tl.store(out_row + q_offsets, tl.zeros([ROWS, D_PAD], out.dtype.element_ty), mask=used)
        return
    tokens, num_live = seq_len, 1
    if CUT:
        wanted = tl.minimum(tl.cdiv(seq_len, split_tokens), num_splits)
        tokens = tl.cdiv(tl.cdiv(seq_len, wanted), BLOCK_N) * BLOCK_N
        num_live = tl.cdiv(seq_len, tokens)
    if program >= num_live:
        return
    # 2. Attend to it. The only part is the output; others are kept, with their lse.
    q = tl.load(query + row * stride_query_row + q_offsets, mask=used, other=0.0)
    table = block_table + req * stride_table
    key_base, value_base = key_cache + kv_head * D, value_cache + kv_head * D
    place = b * tl.num_programs(0) + kv_head
    partial_out += place.to(tl.int64) * num_splits * GROUP * D
    partial_lse += place.to(tl.int64) * num_splits * GROUP
    for split in range(program, num_live, tl.num_programs(2)):
        begin = split * tokens
        end = tl.minimum(begin + tokens, seq_len)
        acc, highest, total = _attend_tokens(
            q, key_base, value_base, table, begin, end, qk_scale, stride_block, stride_token,
            BLOCK_SIZE, BLOCK_N, D, D_PAD, ROWS, TABLE_AHEAD,
        )  # fmt: skip
        attended = acc / total[:, None]
        if num_live == 1:
            tl.store(out_row + q_offsets, (attended * v_scale).to(out.dtype.element_ty), mask=used)
        elif CUT:
            part = split * GROUP + group  # [ROWS]
            tl.store(partial_out + part[:, None] * D + dims[None, :], attended, mask=used)
            tl.store(partial_lse + part, highest + tl.log2(total), mask=group < GROUP)
    # 3. Say so; the last to arrive combines. All threads have stored before one of them counts (the barrier), and what
    #    was stored before a count is seen by whoever counts after it (acq_rel).
    if CUT and num_live > 1:
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + place, 1, sem="acq_rel", scope="gpu")
        if arrived == tl.minimum(num_live, tl.num_programs(2)) - 1:
            tl.store(arrivals + place, 0)  # for the next launch
            mean = _combine_parts(partial_out, partial_lse, num_live, GROUP, GROUP_PAD, D, D_PAD, CHUNK)
            head = tl.arange(0, GROUP_PAD)
            offsets = (kv_head * GROUP + head)[:, None] * D + dims[None, :]
            exists = (head < GROUP)[:, None] & (dims < D)[None, :]
            tl.store(out_row + offsets, (mean * v_scale).to(out.dtype.element_ty), mask=exists)
# fmt: on


def choose_decode_config(
    num_reqs: int,
    num_kv_heads: int,
    max_seq_len: int,
    *,
    deterministic: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    head_size: int = 128,
    pdl: bool = False,
    shared_memory_bytes: int = 227 * 1024,
) -> DecodeConfig:
    """Return the tiles and splits for `num_reqs` decodes whose contexts are at most `max_seq_len` tokens.

    The numbers are those that measured best on an H100. Nothing depends on the contexts at hand, so the choice holds
    for a recorded graph. With `deterministic`, neither tile nor split depends on the batch: `max_seq_len` must then be
    the engine's bound, not the step's, because a bound above 32 splits makes splits longer.
    """
    itemsize = dtype.itemsize
    whole = num_reqs * num_kv_heads  # programs if no context is cut
    if deterministic:
        tokens = DETERMINISTIC_SPLIT_TOKENS
        while tokens * MAX_SPLITS < max_seq_len:
            tokens *= 2
        splits = max(1, -(-max_seq_len // tokens))
        programs = max(1, min(splits, 1024 // whole))
        config = DecodeConfig(64, 4, 3, splits, tokens, programs, pdl=pdl)
    else:
        # The fewer the requests, the shorter the splits. With 256 programs or more there is enough to read at once, and
        # only contexts that would outlast all others are cut.
        tokens = 64 if whole <= 16 else 256 if whole < 256 else 4096
        splits = min(MAX_SPLITS, -(-PROGRAMS // whole), max(1, -(-max_seq_len // tokens)))
        config = DecodeConfig(64, 2 if head_size <= 128 else 4, 3, splits, tokens, pdl=pdl)
        if whole < 1024 and head_size <= 128:
            config = replace(config, block_n=32, num_stages=4 if whole < 256 else 3, table_ahead=True)
    if itemsize == 4:  # float32 runs without tensor cores: small tiles, or registers spill
        config = replace(config, block_n=32, num_warps=4, num_stages=2)
    return _fit(config, head_size, itemsize, shared_memory_bytes)


def wants_longest_first(num_reqs: int, num_kv_heads: int) -> bool:
    """Return whether `num_reqs` decodes are faster with the longest contexts first (`rows` and `reqs` name the order).

    A GPU starts programs in order, as others end. Where there are several for each place, the last to start had better
    be short: a long one would read alone at the end. It is worth 2 to 8% on an H100 (docs/dev/milestone_4.md).
    """
    return num_reqs * num_kv_heads >= SORTED_PROGRAMS


def _fit(config: DecodeConfig, head_size: int, itemsize: int, limit_bytes: int) -> DecodeConfig:
    """Shorten the pipeline, then the tile, until keys and values of all stages fit shared memory."""
    tile_bytes = 2 * power_of_2_at_least(head_size) * itemsize
    while config.block_n * tile_bytes * config.num_stages > limit_bytes and config.num_stages > 2:
        config = replace(config, num_stages=config.num_stages - 1)
    while config.block_n * tile_bytes * config.num_stages > limit_bytes and config.block_n > 16:
        config = replace(config, block_n=config.block_n // 2)
    return config


def decode_workspace_size(
    num_reqs: int, num_heads: int, num_kv_heads: int, head_size: int, config: DecodeConfig
) -> tuple[int, int]:
    """Return the numbers of DecodeWorkspace's two tensors that a launch needs; (0, 0) if it cuts no context."""
    if config.num_splits == 1:
        return 0, 0
    return num_reqs * num_heads * config.num_splits * (head_size + 1), num_reqs * num_kv_heads


def paged_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    config: DecodeConfig,
    *,
    workspace: DecodeWorkspace | None = None,
    rows: torch.Tensor | None = None,
    reqs: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Attend with one token of each request to its whole context; mutates `out` and the workspace only.

    query, out [T, H, D] of the model's dtype, rows contiguous; kv_cache [2, Nb, Bs, Hkv, D] of that dtype or
    float8_e4m3fn, where a stored number times k_scale (v_scale) is the key (value); block_table [B, blocks] int32;
    seq_lens [B] int32, the new token included, 0 for a padding row, whose output becomes zero.
    rows, reqs [n] int32: decode i is row rows[i] of query and out, and row reqs[i] of block_table and seq_lens;
    without them decode i is row i of each, for all rows of query. `workspace`: at least decode_workspace_size; None is
    the device's shared one, for launches that follow one another. No device value is read on the host.
    """
    num_decodes = query.shape[0] if rows is None else rows.shape[0]
    if num_decodes == 0:
        return
    _, num_heads, head_size = query.shape
    block_size, num_kv_heads = kv_cache.shape[2], kv_cache.shape[3]
    group = num_heads // num_kv_heads
    head_pad, group_pad = max(16, power_of_2_at_least(head_size)), power_of_2_at_least(group)
    partial_out = partial_lse = arrivals = out  # not touched when no context is cut
    if config.num_splits > 1:
        size = decode_workspace_size(num_decodes, num_heads, num_kv_heads, head_size, config)
        workspace = workspace or shared_workspace(*size, query.device)
        assert workspace.holds(*size)
        num_outs = size[0] // (head_size + 1) * head_size
        partial_out, partial_lse = workspace.partials[:num_outs], workspace.partials[num_outs : size[0]]
        arrivals = workspace.arrivals
    # As many parts at a time as registers hold; so many numbers that all loads of up to 32 parts are in flight at once.
    chunk = max(1, min(MAX_SPLITS, COMBINE_NUMBERS_PER_WARP * config.num_warps // (group_pad * head_pad)))
    _decode_kernel[(num_kv_heads, num_decodes, config.programs or config.num_splits)](
        query, kv_cache[0], kv_cache[1], block_table, seq_lens, out, partial_out, partial_lse, arrivals, rows, reqs,
        scale * k_scale * LOG2_E, v_scale, config.num_splits, config.split_tokens,
        query.stride(0), out.stride(0), kv_cache.stride(1), kv_cache.stride(2), block_table.stride(0),
        GROUP=group, GROUP_PAD=group_pad, ROWS=max(16, group_pad), D=head_size, D_PAD=head_pad,
        BLOCK_SIZE=block_size, BLOCK_N=config.block_n, CUT=config.num_splits > 1, CHUNK=chunk,
        TABLE_AHEAD=config.table_ahead, PDL=config.pdl, num_warps=config.num_warps, num_stages=config.num_stages,
        **({"launch_pdl": True} if config.pdl else {}),
    )  # fmt: skip
