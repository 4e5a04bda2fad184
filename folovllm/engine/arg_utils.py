"""EngineArgs: the one place that turns keywords or command-line flags into a VllmConfig (vLLM: `engine/arg_utils.py`).

Torch-free, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from folovllm import config as cfg
from folovllm.config import (
    AttentionConfig,
    CacheConfig,
    CompilationConfig,
    DeviceConfig,
    ModelConfig,
    ObservabilityConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)

if TYPE_CHECKING:
    from folovllm.model_executor.model_loader.source import ModelSource

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass
class EngineArgs:
    """Everything that can be set about an engine, flat; fields are explained in folovllm/config.py.

    An unknown keyword is a TypeError; values are checked by create_engine_config.
    """

    model: str = DEFAULT_MODEL
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    revision: str | None = None
    download_dir: str | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    quantization: str | None = None
    enforce_eager: bool = False
    cuda_graph_sizes: list[int] | None = None
    deterministic: bool = False
    max_logprobs: int = 20
    generation_config: str = "auto"
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    num_gpu_blocks_override: int | None = None
    enable_prefix_caching: bool = True
    prefix_caching_hash_algo: str = "sha256"
    max_num_seqs: int = cfg.DEFAULT_MAX_NUM_SEQS
    max_num_batched_tokens: int | None = None
    long_prefill_token_threshold: int = 0
    enable_chunked_prefill: bool = True
    scheduling_policy: str = "fcfs"
    async_scheduling: bool | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    device: str = "auto"
    attention_backend: str = "auto"
    disable_log_stats: bool = True
    step_trace_path: str | None = None
    use_tqdm_on_load: bool = True

    def resolve_model_source(self) -> ModelSource:
        """Return where config, tokenizer and weights come from; may download (hub ids and built-in names)."""
        from folovllm.model_executor.model_loader.source import resolve_model_source

        if self.load_format not in cfg.LOAD_FORMATS:
            raise ValueError(f"load_format={self.load_format!r} must be one of {', '.join(cfg.LOAD_FORMATS)}.")
        ObservabilityConfig(self.step_trace_path)  # a bad path is refused before a download, not after it
        return resolve_model_source(
            self.model,
            revision=self.revision,
            load_format=self.load_format,
            tokenizer=self.tokenizer,
            download_dir=self.download_dir,
        )

    def create_engine_config(self, source: ModelSource | None = None) -> VllmConfig:
        """Return the checked configuration; `source` spares resolving the model again.

        Raises:
            ValueError: a value is outside its range, or values contradict each other.
        """
        source = source or self.resolve_model_source()
        model_config = ModelConfig(
            model=self.model,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            tokenizer=self.tokenizer,
            skip_tokenizer_init=self.skip_tokenizer_init,
            revision=self.revision,
            seed=self.seed,
            load_format=self.load_format,
            quantization=self.quantization,
            enforce_eager=self.enforce_eager,
            deterministic=self.deterministic,
            max_logprobs=self.max_logprobs,
            generation_config=self.generation_config,
            hf_config=source.hf_config(),
        )
        assert model_config.max_model_len is not None
        return VllmConfig(
            model_config=model_config,
            cache_config=CacheConfig(
                block_size=self.block_size,
                gpu_memory_utilization=self.gpu_memory_utilization,
                kv_cache_memory_bytes=self.kv_cache_memory_bytes,
                enable_prefix_caching=self.enable_prefix_caching,
                prefix_caching_hash_algo=self.prefix_caching_hash_algo,
                cache_dtype=self.kv_cache_dtype,
                num_gpu_blocks_override=self.num_gpu_blocks_override,
            ),
            scheduler_config=SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self._max_num_batched_tokens(model_config.max_model_len),
                max_model_len=model_config.max_model_len,
                long_prefill_token_threshold=self.long_prefill_token_threshold,
                enable_chunked_prefill=self.enable_chunked_prefill,
                policy=self.scheduling_policy,
                async_scheduling=self.async_scheduling,
            ),
            parallel_config=ParallelConfig(self.tensor_parallel_size, self.pipeline_parallel_size),
            device_config=DeviceConfig(self.device),
            attention_config=AttentionConfig(self.attention_backend),
            compilation_config=CompilationConfig(self.cuda_graph_sizes),
            observability_config=ObservabilityConfig(self.step_trace_path),
        )

    def _max_num_batched_tokens(self, max_model_len: int) -> int:
        """Return the user's budget, or a default that every other setting can work with."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        budget = max(cfg.DEFAULT_MAX_NUM_BATCHED_TOKENS, self.max_num_seqs)
        return budget if self.enable_chunked_prefill else max(budget, max_model_len)

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add one flag per field, in vLLM's spelling (`--max-model-len`; `--no-...` for switches that are on)."""
        group = parser.add_argument_group("engine")
        for field in dataclasses.fields(EngineArgs):
            flag = _FLAGS.get(field.name) or "--" + field.name.replace("_", "-")
            kwargs: dict[str, Any] = {"dest": field.name, "default": field.default, "help": _HELP[field.name]}
            if str(field.type).startswith("bool"):
                kwargs["action"] = argparse.BooleanOptionalAction
            elif str(field.type).startswith("list[int]"):
                kwargs.update(type=int, nargs="+", metavar="INT")
            else:
                kwargs["type"] = _cli_type(str(field.type))
                kwargs["metavar"] = str(field.type).removesuffix(" | None").upper()
                kwargs["choices"] = _CHOICES.get(field.name)
                if kwargs["choices"]:
                    kwargs["metavar"] = None
            group.add_argument(flag, **kwargs)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> EngineArgs:
        """Return the EngineArgs that `args`, parsed with add_cli_args' flags, describe."""
        return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})


def _cli_type(annotation: str) -> type:
    return {"int": int, "float": float, "str": str}[annotation.removesuffix(" | None")]


_FLAGS: dict[str, str] = {"step_trace_path": "--step-trace"}
"""Flags that are not their field's name."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "load_format": cfg.LOAD_FORMATS,
    "dtype": cfg.DTYPES,
    "device": cfg.DEVICES,
    "attention_backend": cfg.ATTENTION_BACKENDS,
    "kv_cache_dtype": cfg.KV_CACHE_DTYPES,
    "scheduling_policy": cfg.SCHEDULER_POLICIES,
    "generation_config": ("auto", "vllm"),
}

_HELP: dict[str, str] = {
    "model": f"folder, .gguf file, Hugging Face id or built-in name (default: {DEFAULT_MODEL})",
    "tokenizer": "folder, id or file of the tokenizer (default: the model's)",
    "skip_tokenizer_init": "run without a tokenizer: token ids in, token ids out",
    "revision": "branch, tag or commit on the hub",
    "download_dir": "where hub downloads are kept (default: the hub's cache)",
    "load_format": "where weights come from; dummy: random ones",
    "dtype": "number format of weights and activations",
    "seed": "seeds the draws of requests that name no seed",
    "max_model_len": "most tokens of a request, prompt and output (default: the model's)",
    "quantization": "auto: what the checkpoint says; gptq: an error unless it says that",
    "enforce_eager": "never capture CUDA graphs",
    "cuda_graph_sizes": "decode batch sizes to record into CUDA graphs (default: chosen by max_num_seqs)",
    "deterministic": "on CUDA: the same bits for a request alone and in any batch",
    "max_logprobs": "largest logprobs a request may ask for; -1: no limit",
    "generation_config": "auto: sampling defaults from the model; vllm: none",
    "block_size": "tokens per KV cache block",
    "gpu_memory_utilization": "share of GPU memory to use",
    "kv_cache_memory_bytes": "bytes for the KV cache (default: measured on GPU, 1 GiB on CPU)",
    "kv_cache_dtype": "auto: the model's; fp8: half the bytes, on CUDA",
    "num_gpu_blocks_override": "exactly this many KV cache blocks",
    "enable_prefix_caching": "share the KV cache of equal prefixes",
    "prefix_caching_hash_algo": "hash of cached blocks",
    "max_num_seqs": "most requests that run at once",
    "max_num_batched_tokens": f"most tokens of a step (default: {cfg.DEFAULT_MAX_NUM_BATCHED_TOKENS})",
    "long_prefill_token_threshold": "most tokens of a step that one prompt may take; 0: no limit",
    "enable_chunked_prefill": "split long prompts over steps",
    "scheduling_policy": "order of waiting requests",
    "async_scheduling": "launch a step before the last one's tokens are known (default: on CUDA)",
    "tensor_parallel_size": "devices per layer; 1 for now",
    "pipeline_parallel_size": "devices along the layers; 1 for now",
    "device": "where to run",
    "attention_backend": "attention kernels",
    "disable_log_stats": "no statistics in outputs and log",
    "step_trace_path": "write one JSON line per engine step into this file (docs/step_trace.md)",
    "use_tqdm_on_load": "progress bar while loading weights",
}
