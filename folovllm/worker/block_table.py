"""BlockTable: which KV-cache blocks each slot owns, where new tokens go (vLLM: `v1/worker/block_table.py`).

    block_table_np [slots, max blocks]     slot 0: 7 3 9 0 0 ...      num_blocks_per_row: 3 ...

A token at position t of the request in slot r is kept in block `block_table_np[r, t // Bs]` at offset t % Bs;
its slot mapping is that place counted over the whole cache: block * Bs + offset.

The host side is numpy. On the CPU the tensors share its memory, so a commit copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

PADDING_SLOT = -1
"""Slot mapping of a token that is not to be written."""


class BlockTable:
    """The blocks of every slot and the slot mapping of the step; rows of unused slots are all zeros."""

    def __init__(
        self,
        max_num_reqs: int,
        max_num_blocks_per_req: int,
        max_num_batched_tokens: int,
        device: torch.device | str,
        block_size: int,
    ) -> None:
        """Reserve max_num_reqs rows of block ids and max_num_batched_tokens slot mappings."""
        self.max_num_reqs = max_num_reqs
        self.max_num_blocks_per_req = max_num_blocks_per_req
        self.max_num_batched_tokens = max_num_batched_tokens
        self.device = torch.device(device)
        self.block_size = block_size
        self.block_table_np: npt.NDArray[np.int32] = np.zeros((max_num_reqs, max_num_blocks_per_req), dtype=np.int32)
        self.num_blocks_per_row: npt.NDArray[np.int32] = np.zeros(max_num_reqs, dtype=np.int32)
        self.slot_mapping_np: npt.NDArray[np.int64] = np.full(max_num_batched_tokens, PADDING_SLOT, dtype=np.int64)
        self._num_mapped = 0
        self._changed_rows: set[int] = set()
        self._block_table_host, self.block_table = _mirror(self.block_table_np, self.device)
        self._slot_mapping_host, self.slot_mapping = _mirror(self.slot_mapping_np, self.device)

    def append_row(self, block_ids: Sequence[int], row: int) -> None:
        """Add `block_ids` behind the blocks that slot `row` has."""
        if not block_ids:
            return
        start = int(self.num_blocks_per_row[row])
        end = start + len(block_ids)
        self.block_table_np[row, start:end] = block_ids
        self.num_blocks_per_row[row] = end
        self._changed_rows.add(row)

    def add_row(self, block_ids: Sequence[int], row: int) -> None:
        """Replace the blocks of slot `row` by `block_ids`."""
        self.clear_row(row)
        self.append_row(block_ids, row)

    def clear_row(self, row: int) -> None:
        """Take all blocks from slot `row`."""
        self.block_table_np[row, : self.num_blocks_per_row[row]] = 0
        self.num_blocks_per_row[row] = 0

    def move_row(self, src: int, tgt: int) -> None:
        """Give the blocks of slot `src` to slot `tgt`, whose own are dropped; `src` has none afterwards."""
        if src != tgt:
            self.clear_row(tgt)
            self.swap_row(src, tgt)

    def swap_row(self, src: int, tgt: int) -> None:
        """Exchange the blocks of two slots."""
        pair, swapped = [src, tgt], [tgt, src]
        used = int(self.num_blocks_per_row[pair].max())
        self.block_table_np[pair, :used] = self.block_table_np[swapped, :used]
        self.num_blocks_per_row[pair] = self.num_blocks_per_row[swapped]
        self._changed_rows.update(pair)

    def compute_slot_mapping(self, req_indices: npt.NDArray[np.integer], positions: npt.NDArray[np.integer]) -> None:
        """Write the slot mapping of the step's T tokens to slot_mapping_np[:T]; the rest is padding, -1.

        Args:
            req_indices: [T], slot of each token's request.
            positions: [T], index of each token in its request; its block must have been added.
        """
        num_tokens = len(req_indices)
        blocks = self.block_table_np[req_indices, positions // self.block_size]
        mapping = self.slot_mapping_np[:num_tokens]
        np.multiply(blocks, self.block_size, out=mapping, dtype=np.int64)
        mapping += positions % self.block_size
        self.slot_mapping_np[num_tokens : self._num_mapped] = PADDING_SLOT
        self._num_mapped = num_tokens

    def take_changed_rows(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return the rows that have blocks and changed since the last call, [R], and their blocks, [R, W].

        W is the largest number of blocks that any of them has.
        """
        rows = np.fromiter(self._changed_rows, dtype=np.int32, count=len(self._changed_rows))
        self._changed_rows.clear()
        rows = rows[self.num_blocks_per_row[rows] > 0]
        width = int(self.num_blocks_per_row[rows].max(initial=0))
        return rows, self.block_table_np[rows, :width]

    def commit(self, num_reqs: int) -> None:
        """Make the first `num_reqs` rows visible in get_device_tensor; on the CPU they already are."""
        if self.device.type != "cpu":
            self.block_table[:num_reqs].copy_(self._block_table_host[:num_reqs], non_blocking=True)

    def commit_slot_mapping(self, num_tokens: int) -> None:
        """Make the first `num_tokens` entries visible in `slot_mapping`; on the CPU they already are."""
        if self.device.type != "cpu":
            self.slot_mapping[:num_tokens].copy_(self._slot_mapping_host[:num_tokens], non_blocking=True)

    def get_device_tensor(self, num_reqs: int) -> torch.Tensor:
        """Return a view of the committed block ids of the first slots, [num_reqs, max blocks] int32."""
        return self.block_table[:num_reqs]

    def __eq__(self, other: object) -> bool:
        """Compare the host side: equal blocks in equal slots and equal slot mappings."""
        if not isinstance(other, BlockTable):
            return NotImplemented
        return (
            self.block_size == other.block_size
            and np.array_equal(self.block_table_np, other.block_table_np)
            and np.array_equal(self.num_blocks_per_row, other.num_blocks_per_row)
            and np.array_equal(self.slot_mapping_np, other.slot_mapping_np)
        )

    __hash__ = None  # type: ignore[assignment]


def _mirror(array: npt.NDArray[np.generic], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (host tensor that shares the memory of `array`, tensor on `device`): the same one on the CPU."""
    host = torch.from_numpy(array)
    return host, host if device.type == "cpu" else host.to(device)
