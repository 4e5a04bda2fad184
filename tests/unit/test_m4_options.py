"""Options of milestone 4: what is refused, with what words, and which batch sizes are recorded."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM
from folovllm.config import CompilationConfig, ModelConfig, default_graph_sizes
from folovllm.engine.arg_utils import EngineArgs
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_tiny_model(path, "llama")
    return path


@pytest.mark.badinput
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, r"kv_cache_dtype='fp8' needs an attention backend on CUDA.* not paged on cpu"),
        ({"kv_cache_dtype": "fp8", "attention_backend": "torch_naive"}, "not torch_naive on cpu"),
        ({"kv_cache_dtype": "int8"}, r"kv_cache_dtype='int8' is not supported; choose one of 'auto', 'fp8'"),
        ({"deterministic": True}, r"deterministic=True is for CUDA; this engine runs on cpu"),
        ({"deterministic": "yes"}, r"deterministic='yes' must be True or False"),
        ({"cuda_graph_sizes": []}, r"cuda_graph_sizes=\[\] must be a list of batch sizes"),
        ({"cuda_graph_sizes": 8}, r"cuda_graph_sizes=8 must be a list"),
        ({"cuda_graph_sizes": [4, 0]}, r"cuda_graph_sizes=0 must be an int in \[1"),
        (
            {"cuda_graph_sizes": [2, 4]},
            r"cuda_graph_sizes=\[2, 4\]: .* on CUDA .* not with paged on cpu",
        ),
        ({"cuda_graph_sizes": [2], "enforce_eager": True}, "contradicts enforce_eager=True"),
        ({"cuda_graph_sizes": [2, 9], "max_num_seqs": 8}, "9 is above max_num_seqs=8"),
        ({"attention_backend": "flash_attn"}, "it runs on CUDA only, not on cpu"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(str(model), device="cpu", skip_tokenizer_init=True, **options)


def test_graph_sizes_end_with_the_largest_batch_unless_told_otherwise() -> None:
    assert default_graph_sizes(1) == [1]
    assert default_graph_sizes(3) == [1, 2, 3]
    assert default_graph_sizes(20) == [1, 2, 4, 8, 16, 20]
    for max_num_seqs in (128, 256, 300, 1024):
        sizes = default_graph_sizes(max_num_seqs)
        assert sizes == sorted(set(sizes)) and sizes[-1] == max_num_seqs
        assert all(b - a <= max(8, a / 8) for a, b in itertools.pairwise(sizes))
    assert CompilationConfig().graph_sizes(4) == [1, 2, 4]
    assert CompilationConfig([8, 2, 8]).graph_sizes(16) == [2, 8]
    assert CompilationConfig([2, 4]).graph_sizes(16) == [2, 4]


def test_flags_reach_the_configuration(model: Path) -> None:
    import argparse

    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    flags = ["--model", str(model), "--cuda-graph-sizes", "1", "8", "--deterministic", "--kv-cache-dtype", "fp8"]
    config = EngineArgs.from_cli_args(parser.parse_args(flags)).create_engine_config()
    assert config.compilation_config.cuda_graph_sizes == [1, 8]
    assert isinstance(config.model_config, ModelConfig) and config.model_config.deterministic
    assert config.cache_config.cache_dtype == "fp8"
