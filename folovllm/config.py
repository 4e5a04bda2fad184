"""Engine configuration: plain dataclasses, one per concern, validated once (vLLM: `vllm/config/`).

Users may assign to them before the engine starts; FoloVLLM itself never changes one afterwards. Nothing here
imports torch, so a scheduler can be configured and simulated without it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from folovllm.utils.common import check_bool, check_choice, check_range

DTYPES = ("auto", "float32", "float16", "half", "bfloat16", "float")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
DEVICES = ("auto", "cpu", "cuda")
ATTENTION_BACKENDS = ("auto", "paged_flash", "paged", "flash_attn", "torch_naive")
SCHEDULER_POLICIES = ("fcfs", "priority")
KV_CACHE_DTYPES = ("auto", "fp8")
HASH_ALGORITHMS = ("sha256",)
QUANTIZATION_METHODS: tuple[str | None, ...] = (None, "auto", "gptq")

DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
DEFAULT_MAX_NUM_SEQS = 128
DEFAULT_CPU_KV_CACHE_BYTES = 1 << 30


def read_hf_config(model: str) -> dict[str, Any]:
    """Return the content of `config.json` of the local folder `model`.

    Raises:
        ValueError: `model` is not a folder with a readable `config.json`.
    """
    path = Path(model) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model={model!r}: no file {path}. Give a local folder that holds config.json "
            "(other kinds of model are resolved by EngineArgs.create_engine_config)."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"model={model!r}: {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"model={model!r}: {path} must hold a JSON object, got {type(content).__name__}.")
    return content


@dataclass
class ModelConfig:
    """What model to run, in which number format, and how long its sequences may be."""

    model: str
    """Local folder, Hugging Face id, `.gguf` file or built-in name."""
    dtype: str = "auto"
    """One of DTYPES; "auto" is the checkpoint's own 16-bit type where the device is fast at it (see worker)."""
    max_model_len: int | None = None
    """Prompt plus output tokens of one request; None means the model's `max_position_embeddings`."""
    tokenizer: str | None = None
    """Folder, id or file to take the tokenizer from; None means the model itself."""
    skip_tokenizer_init: bool = False
    """Run without a tokenizer: prompts are token ids, outputs have no text."""
    revision: str | None = None
    """Branch, tag or commit on the hub; ignored by no source: a local model with a revision is an error."""
    seed: int = 0
    """Seeds the draw of per-request seeds (for requests that name none) and dummy weights."""
    load_format: str = "auto"
    """One of LOAD_FORMATS; "dummy" makes random weights from the config alone."""
    quantization: str | None = None
    """None or "auto": what the checkpoint says; "gptq": the same, and an error if that is not GPTQ."""
    enforce_eager: bool = False
    """Never capture CUDA graphs."""
    deterministic: bool = False
    """On CUDA: a request gets the same bits alone and in any batch, at some cost; CPUs are not covered."""
    max_logprobs: int = 20
    """Largest `logprobs` / `prompt_logprobs` that a request may ask for; -1 means the whole vocabulary."""
    generation_config: str = "auto"
    """"auto": sampling defaults from the model's generation_config.json; "vllm": SamplingParams' own. Its
    end-of-sequence ids count either way."""
    hf_config: dict[str, Any] | None = None
    """The model's config.json as a dict; None means: read it from the folder `model`."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model='' is empty. Give a folder, a .gguf file, a hub id or a built-in name.")
        check_choice("dtype", self.dtype, DTYPES)
        check_bool("skip_tokenizer_init", self.skip_tokenizer_init)
        check_bool("enforce_eager", self.enforce_eager)
        check_bool("deterministic", self.deterministic)
        check_choice("load_format", self.load_format, LOAD_FORMATS)
        check_choice("quantization", self.quantization, QUANTIZATION_METHODS)
        check_choice("generation_config", self.generation_config, ("auto", "vllm"))
        check_range("max_logprobs", self.max_logprobs, low=-1)
        check_range("seed", self.seed, low=0, high=2**63 - 1)
        if self.hf_config is None:
            self.hf_config = read_hf_config(self.model)
        self._check_quantization()
        limit = self.hf_config.get("max_position_embeddings")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 2):
            raise ValueError(f"max_position_embeddings={limit!r} in config.json must be an int of at least 2.")
        if self.max_model_len is None:
            if limit is None:
                raise ValueError("The model's config has no max_position_embeddings: set max_model_len.")
            self.max_model_len = limit
        check_range("max_model_len", self.max_model_len, low=2, high=limit, remedy="The model has no longer context.")

    @property
    def architecture(self) -> str:
        """First of the config's `architectures`, e.g. "LlamaForCausalLM"."""
        names = self._config().get("architectures") or []
        if not names:
            raise ValueError(f"model={self.model!r}: its config names no architectures.")
        return str(names[0])

    def get_vocab_size(self) -> int:
        """V, the number of rows of the embedding table."""
        return self._int("vocab_size")

    def get_hidden_size(self) -> int:
        """E."""
        return self._int("hidden_size")

    def get_num_layers(self) -> int:
        """Number of decoder layers."""
        return self._int("num_hidden_layers")

    def get_num_attention_heads(self) -> int:
        """H."""
        return self._int("num_attention_heads")

    def get_num_kv_heads(self) -> int:
        """Hkv; a config without the field has as many as attention heads."""
        return int(self._config().get("num_key_value_heads") or self.get_num_attention_heads())

    def get_head_size(self) -> int:
        """D; a config without `head_dim` means hidden_size / num_attention_heads."""
        return int(self._config().get("head_dim") or self.get_hidden_size() // self.get_num_attention_heads())

    def _check_quantization(self) -> None:
        """Refuse a named method that is not the checkpoint's."""
        if self.quantization in (None, "auto"):
            return
        stored = self._config().get("quantization_config")
        method = stored.get("quant_method") if isinstance(stored, dict) else stored
        if method != self.quantization:
            what = "not quantized" if stored is None else f"quantized with quant_method={method!r}"
            raise ValueError(
                f"quantization={self.quantization!r}: model={self.model!r} is {what}. Leave quantization out (or "
                "'auto') to run the checkpoint as it is."
            )

    def _config(self) -> dict[str, Any]:
        assert self.hf_config is not None
        return self.hf_config

    def _int(self, name: str) -> int:
        value = self._config().get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"model={self.model!r}: {name}={value!r} in its config must be a positive int.")
        return value


@dataclass
class CacheConfig:
    """The KV cache: its block size, how much memory it takes, and whether prefixes are shared."""

    block_size: int = 16
    """Tokens per block; block_size = max_model_len is the contiguous cache of M1."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory for weights, activations and KV cache together."""
    kv_cache_memory_bytes: int | None = None
    """Bytes for the KV cache; None means: on CUDA what is left under gpu_memory_utilization, on CPU 1 GiB
    (DEFAULT_CPU_KV_CACHE_BYTES)."""
    enable_prefix_caching: bool = True
    """Keep full blocks after use and share them between requests with the same prefix."""
    prefix_caching_hash_algo: str = "sha256"
    """One of HASH_ALGORITHMS."""
    cache_dtype: str = "auto"
    """"auto": the model's dtype; "fp8": float8_e4m3fn, half of bfloat16's bytes (CUDA only)."""
    num_gpu_blocks_override: int | None = None
    """Exactly this many blocks, whatever the memory would allow (tests of preemption use it)."""
    num_gpu_blocks: int | None = None
    """For callers that build a scheduler by hand; the engine keeps its number in KVCacheConfig."""

    def __post_init__(self) -> None:
        check_range("block_size", self.block_size, low=1)
        check_bool("enable_prefix_caching", self.enable_prefix_caching)
        check_range("gpu_memory_utilization", self.gpu_memory_utilization, low=0.0, high=1.0, open_low=True)
        check_range("kv_cache_memory_bytes", self.kv_cache_memory_bytes, low=1)
        check_range(
            "num_gpu_blocks_override",
            self.num_gpu_blocks_override,
            low=2,
            remedy="Block 0 is the null block.",
        )
        check_choice("prefix_caching_hash_algo", self.prefix_caching_hash_algo, HASH_ALGORITHMS)
        check_choice("kv_cache_dtype", self.cache_dtype, KV_CACHE_DTYPES)


@dataclass
class SchedulerConfig:
    """How much work a step may hold and in what order requests get it."""

    max_num_seqs: int = DEFAULT_MAX_NUM_SEQS
    """Requests that run at once; 1 is the single-request engine of M1."""
    max_num_batched_tokens: int = DEFAULT_MAX_NUM_BATCHED_TOKENS
    """Token budget of a step."""
    max_model_len: int = 8192
    """Prompt plus output tokens of one request."""
    long_prefill_token_threshold: int = 0
    """Most tokens of a step that one prompt may take; 0 means no such limit."""
    enable_chunked_prefill: bool = True
    """Split a prompt that exceeds what is left of the budget over several steps."""
    policy: str = "fcfs"
    """One of SCHEDULER_POLICIES."""
    async_scheduling: bool | None = None
    """Decide and launch a step before the tokens of the one before are known; None: on CUDA only."""

    def __post_init__(self) -> None:
        check_range("max_num_seqs", self.max_num_seqs, low=1)
        check_range("max_num_batched_tokens", self.max_num_batched_tokens, low=1)
        check_range("max_model_len", self.max_model_len, low=1)
        check_range("long_prefill_token_threshold", self.long_prefill_token_threshold, low=0)
        check_choice("policy", self.policy, SCHEDULER_POLICIES)
        check_bool("enable_chunked_prefill", self.enable_chunked_prefill)
        if self.async_scheduling is not None:
            check_bool("async_scheduling", self.async_scheduling)
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_model_len={self.max_model_len} "
                "with enable_chunked_prefill=False: a longest prompt would never be scheduled. Raise "
                "max_num_batched_tokens, lower max_model_len or enable chunked prefill."
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}: "
                "each running request needs one token a step. Raise the first or lower the second."
            )


@dataclass
class ParallelConfig:
    """How many devices share the model. One, for now: other values are refused, not ignored."""

    tensor_parallel_size: int = 1
    """Ranks that split each layer."""
    pipeline_parallel_size: int = 1
    """Ranks that split the list of layers."""

    def __post_init__(self) -> None:
        check_range(
            "tensor_parallel_size",
            self.tensor_parallel_size,
            low=1,
            high=1,
            remedy="One device is supported.",
        )
        check_range(
            "pipeline_parallel_size",
            self.pipeline_parallel_size,
            low=1,
            high=1,
            remedy="One device is supported.",
        )


@dataclass
class DeviceConfig:
    """Where the model runs."""

    device: str = "auto"
    """One of DEVICES; "auto" is CUDA where torch sees a GPU, else the CPU."""

    def __post_init__(self) -> None:
        check_choice("device", self.device, DEVICES)


@dataclass
class AttentionConfig:
    """Which attention backend runs."""

    backend: str = "auto"
    """One of ATTENTION_BACKENDS; "auto" lets the selector choose."""

    def __post_init__(self) -> None:
        check_choice("attention_backend", self.backend, ATTENTION_BACKENDS)


@dataclass
class CompilationConfig:
    """What is recorded into CUDA graphs (vLLM: `CompilationConfig`; nothing is compiled here)."""

    cuda_graph_sizes: list[int] | None = None
    """Decode batch sizes to record; a batch runs in the next larger graph, one above all sizes without. None:
    default_graph_sizes."""

    def __post_init__(self) -> None:
        sizes = self.cuda_graph_sizes
        if sizes is None:
            return
        if not isinstance(sizes, list) or not sizes:
            raise ValueError(f"cuda_graph_sizes={sizes!r} must be a list of batch sizes, or None for the default.")
        for size in sizes:
            check_range("cuda_graph_sizes", size, low=1)

    def graph_sizes(self, max_num_seqs: int) -> list[int]:
        """Return the batch sizes to record, ascending; VllmConfig sees to it that none is above `max_num_seqs`."""
        return sorted(set(self.cuda_graph_sizes or default_graph_sizes(max_num_seqs)))


def default_graph_sizes(max_num_seqs: int) -> list[int]:
    """Return 1, 2, 4, 8, then steps of 8 up to 256, of 16 up to 512, of 64 beyond: padding costs at most some 12%."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16), *range(576, max_num_seqs + 64, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


@dataclass
class ObservabilityConfig:
    """What the engine writes down about itself beside its log."""

    step_trace_path: str | None = None
    """File for the step trace (docs/step_trace.md), replaced if it exists; None means no trace."""

    def __post_init__(self) -> None:
        if self.step_trace_path is not None:
            _check_writable("step_trace_path", self.step_trace_path)


def _check_writable(field_name: str, path: str) -> None:
    """Raise ValueError unless a regular file `path` can be written; leaves what is there as it is.

    By opening it: permission bits say little about full, read-only or remote file systems.
    """
    existed = os.path.lexists(path)
    try:
        if existed and not os.path.isfile(path):
            raise OSError("it exists and is no regular file")
        with open(path, "ab"):
            pass
        if not existed:
            os.remove(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise ValueError(
            f"{field_name}={path!r} cannot be written: {error}. Name a file in a folder that exists and is writable."
        ) from error


@dataclass
class VllmConfig:
    """The whole configuration; the one object that travels through the engine."""

    model_config: ModelConfig
    """The model; everything else has defaults that follow from it."""
    cache_config: CacheConfig = field(default_factory=CacheConfig)
    """KV cache."""
    scheduler_config: SchedulerConfig = None  # type: ignore[assignment]
    """Scheduler; None means the defaults with the model's max_model_len."""
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    """Devices that share the model."""
    device_config: DeviceConfig = field(default_factory=DeviceConfig)
    """Device kind."""
    attention_config: AttentionConfig = field(default_factory=AttentionConfig)
    """Attention backend."""
    compilation_config: CompilationConfig = field(default_factory=CompilationConfig)
    """CUDA graphs."""
    observability_config: ObservabilityConfig = field(default_factory=ObservabilityConfig)
    """Step trace."""

    def __post_init__(self) -> None:
        if self.scheduler_config is None:
            assert self.model_config.max_model_len is not None
            self.scheduler_config = SchedulerConfig(max_model_len=self.model_config.max_model_len)
        sizes = self.compilation_config.cuda_graph_sizes
        if sizes is not None and self.model_config.enforce_eager:
            raise ValueError(f"cuda_graph_sizes={sizes!r} contradicts enforce_eager=True: leave one of them out.")
        if sizes is not None and max(sizes) > self.scheduler_config.max_num_seqs:
            raise ValueError(
                f"cuda_graph_sizes={sizes!r}: {max(sizes)} is above max_num_seqs={self.scheduler_config.max_num_seqs}, "
                "so no batch is ever that large. Raise max_num_seqs, or leave that size out."
            )
