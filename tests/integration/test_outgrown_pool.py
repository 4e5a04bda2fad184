"""A request that outgrows the whole pool ends with an explanation; the others never notice.

The engine refuses a cache that cannot hold one longest request, so that this should not happen; the check is switched
off here to see that the scheduler does not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from folovllm import LLM, SamplingParams
from folovllm.core import kv_cache_utils
from folovllm.outputs import RequestOutput
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

SMALL = {"dtype": "float32", "device": "cpu", "skip_tokenizer_init": True, "use_tqdm_on_load": False}
LENGTHS = {"greedy": 20, "big": 25, "drawn": 17, "late": 30}
PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
    "big": SamplingParams(temperature=0, max_tokens=150, ignore_eos=True),
    "drawn": SamplingParams(temperature=1.0, seed=3, max_tokens=25, ignore_eos=True),
    "late": SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(llm: LLM, order: list[str]) -> dict[str, RequestOutput]:
    generator = torch.Generator().manual_seed(1)
    prompts = {name: torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for name, n in LENGTHS.items()}
    engine = llm.llm_engine
    for name in order:
        engine.add_request(name, {"prompt_token_ids": prompts[name]}, PARAMS[name])
    finished = {}
    for _ in range(1000):
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        if not engine.has_unfinished_requests():
            break
    assert not engine.has_unfinished_requests()
    return finished


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("caching", [False, True], ids=["nocache", "cache"])
@pytest.mark.parametrize("order", [["big", "greedy", "drawn", "late"], ["greedy", "drawn", "big", "late"]])
def test_it_ends_with_length_and_says_why(
    order: list[str], caching: bool, async_scheduling: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path, "llama")
    expected = run(LLM(str(tmp_path), **SMALL, enable_prefix_caching=False, async_scheduling=False), order)
    monkeypatch.setattr(kv_cache_utils, "_check_one_sequence_fits", lambda *args: None)
    llm = LLM(
        str(tmp_path),
        **SMALL,
        block_size=8,
        num_gpu_blocks_override=9,
        enable_prefix_caching=caching,
        async_scheduling=async_scheduling,
    )
    outputs = run(llm, order)
    for name, output in outputs.items():
        sample, tokens = output.outputs[0], list(expected[name].outputs[0].token_ids)
        assert sample.finish_reason == "length"
        if name == "big":
            # 64 slots: the prompt's 25 tokens, then 39, and one more that was drawn from them.
            assert list(sample.token_ids) == tokens[:40]
            assert isinstance(sample.stop_reason, str)
            assert "65 tokens need 9 KV cache blocks of 8, but only 8 exist" in sample.stop_reason
            assert "num_gpu_blocks_override" in sample.stop_reason
        else:
            assert list(sample.token_ids) == tokens and sample.stop_reason is None
    manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    manager.check_integrity()
    assert manager.usage == 0


def test_a_prompt_larger_than_the_pool_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path, "llama")
    monkeypatch.setattr(kv_cache_utils, "_check_one_sequence_fits", lambda *args: None)
    llm = LLM(str(tmp_path), **SMALL, block_size=8, num_gpu_blocks_override=4)
    with pytest.raises(
        ValueError, match=r"prompt of 24 tokens needs 4 KV cache blocks of 8 tokens, and the cache has 3"
    ):
        llm.llm_engine.add_request("a", {"prompt_token_ids": [5] * 24}, PARAMS["greedy"])
    assert not llm.llm_engine.has_unfinished_requests()
