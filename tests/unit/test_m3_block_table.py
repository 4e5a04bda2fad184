"""BlockTable: rows of blocks, slot mapping, and what the device sees."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from folovllm.worker.block_table import PADDING_SLOT, BlockTable


def make_table(block_size: int = 4, device: str = "cpu") -> BlockTable:
    return BlockTable(
        max_num_reqs=6, max_num_blocks_per_req=5, max_num_batched_tokens=40, device=device, block_size=block_size
    )


def rows_of(table: BlockTable) -> list[list[int]]:
    return [row[:count].tolist() for row, count in zip(table.block_table_np, table.num_blocks_per_row, strict=True)]


def test_append_add_clear() -> None:
    table = make_table()
    table.append_row([3, 4], 1)
    table.append_row([], 1)
    table.append_row([9], 1)
    table.append_row([7], 0)
    assert rows_of(table)[:2] == [[7], [3, 4, 9]]
    table.add_row([5], 1)
    assert rows_of(table)[1] == [5]
    assert table.block_table_np[1].tolist() == [5, 0, 0, 0, 0]
    table.clear_row(1)
    assert not table.block_table_np[1].any() and rows_of(table)[1] == []


def test_move_and_swap() -> None:
    table = make_table()
    table.add_row([1, 2, 3], 0)
    table.add_row([4], 2)
    table.swap_row(0, 2)
    assert rows_of(table)[:3] == [[4], [], [1, 2, 3]]
    table.add_row([8, 8], 0)
    table.move_row(2, 0)
    assert rows_of(table)[:3] == [[1, 2, 3], [], []]
    assert not table.block_table_np[1:].any()
    table.move_row(0, 0)
    assert rows_of(table)[0] == [1, 2, 3]


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_slot_mapping_against_the_naive_reference(block_size: int) -> None:
    r = random.Random(block_size)
    table = make_table(block_size)
    blocks = [[r.randrange(1, 2**31 // block_size) for _ in range(5)] for _ in range(6)]
    for row, ids in enumerate(blocks):
        table.add_row(ids, row)
    indices = np.array([r.randrange(6) for _ in range(40)], dtype=np.int32)
    positions = np.array([r.randrange(5 * block_size) for _ in range(40)], dtype=np.int64)
    table.compute_slot_mapping(indices, positions)
    expected = [
        blocks[i][p // block_size] * block_size + p % block_size
        for i, p in zip(indices.tolist(), positions.tolist(), strict=True)
    ]
    assert table.slot_mapping_np.tolist() == expected
    assert table.slot_mapping_np.dtype == np.int64


def test_slots_beyond_32_bits() -> None:
    table = make_table(block_size=16)
    table.add_row([2**31 - 1], 0)
    table.compute_slot_mapping(np.array([0]), np.array([15]))
    assert table.slot_mapping_np[0] == (2**31 - 1) * 16 + 15


def test_what_follows_the_step_is_padding() -> None:
    table = make_table()
    table.add_row([1, 2], 0)
    assert (table.slot_mapping_np == PADDING_SLOT).all()
    table.compute_slot_mapping(np.zeros(8, dtype=np.int64), np.arange(8))
    assert table.slot_mapping_np[:10].tolist() == [*range(4, 12), -1, -1]
    table.compute_slot_mapping(np.zeros(2, dtype=np.int64), np.array([3, 4]))
    assert table.slot_mapping_np.tolist() == [7, 8] + [-1] * 38


def test_cpu_tensors_share_memory() -> None:
    table = make_table()
    view = table.get_device_tensor(2)
    table.add_row([3, 1], 1)
    table.commit(2)
    assert view.tolist() == [[0] * 5, [3, 1, 0, 0, 0]] and view.dtype == torch.int32
    table.compute_slot_mapping(np.array([1]), np.array([5]))
    table.commit_slot_mapping(1)
    assert table.slot_mapping[0] == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_sees_committed_rows_only() -> None:
    table = make_table(device="cuda")
    table.add_row([3], 0)
    table.add_row([4], 1)
    table.commit(1)
    assert table.get_device_tensor(2)[:, 0].tolist() == [3, 0]
    table.compute_slot_mapping(np.array([0, 1]), np.array([1, 1]))
    table.commit_slot_mapping(2)
    assert table.slot_mapping[:3].tolist() == [13, 17, -1]


def test_equality_is_that_of_the_content() -> None:
    a, b = make_table(), make_table()
    assert a == b
    a.add_row([1, 2], 0)
    assert a != b
    b.add_row([9, 9, 9], 0)
    b.add_row([1, 2], 0)
    assert a == b
    b.compute_slot_mapping(np.array([0]), np.array([0]))
    assert a != b
    assert a != make_table(8)
    assert (a == 1) is False
