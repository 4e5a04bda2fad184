"""EngineCore: what it does once, at its start and end. Its steps are tested with the schedulers and end to end."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from folovllm.engine.core import EngineCore
from tests.core_utils import make_vllm_config
from tests.fakes import FakeExecutor


@pytest.fixture
def unfrozen() -> Iterator[None]:
    """Start and leave with nothing frozen."""
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_garbage_collections_pass_over_what_the_engine_start_made(unfrozen: None) -> None:
    core = EngineCore(make_vllm_config(max_num_batched_tokens=64), FakeExecutor(vocab_size=90, block_size=16))  # type: ignore[arg-type]
    scheduler = core.scheduler
    assert gc.get_freeze_count() > 1000
    assert not any(entry is scheduler for entry in gc.get_objects())
    core.shutdown()
    assert gc.get_freeze_count() == 0
    assert any(entry is scheduler for entry in gc.get_objects())
