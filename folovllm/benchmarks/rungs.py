"""The rungs of the ladder: each milestone as a configuration of the one engine, and how large the workloads are.

Every rung adds one thing to the rung before it. All have the same room for keys and values: `contiguous_slots` times
max_model_len tokens, cut into blocks in different ways. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from folovllm.benchmarks import workload
from folovllm.benchmarks.workload import Workload

KERNELS_SWITCH = "FOLOVLLM_CPU_KERNELS"
"""Environment variable: "0" runs on torch's operators alone."""
PAGED_BLOCK_SIZE = 16


@dataclass(frozen=True)
class Sizes:
    """How large the workloads are, and the engine's limits that go with them."""

    max_model_len: int
    """Most tokens of a request; a contiguous slot reserves all of them."""
    contiguous_slots: int
    """Requests that the cache holds where each reserves max_model_len tokens."""
    max_num_seqs: int
    """Most requests of a step, from M2 on."""
    chunk_budget: int
    """Tokens of a step from M5 on (max_num_batched_tokens)."""
    num_prompts: int
    """Requests of "mixed"."""
    input_lens: tuple[int, int]
    """Shortest and longest prompt of "mixed"."""
    output_lens: tuple[int, int]
    """Fewest and most output tokens of "mixed"."""
    single: tuple[int, int]
    """Prompt and output tokens of "single"."""
    arrivals: tuple[int, int, int]
    """"arrivals": streams, long prompts, tokens of each."""
    shared: tuple[int, int, int, int]
    """"shared": requests, common tokens, own tokens, output tokens."""
    chat: tuple[int, int, int, int, int]
    """"chat": conversations, turns, tokens of the first message, of later ones, output tokens."""
    perplexity_tokens: int
    """Of the text that perplexity is measured on."""
    calibration: tuple[int, int]
    """GPTQ: sequences, tokens of each."""

    def build(self, name: str, vocab_size: int, seed: int) -> Workload:
        """Return the workload called `name`, with token ids drawn from `seed`."""
        if name == "mixed":
            return workload.mixed(vocab_size, seed, self.num_prompts, self.input_lens, self.output_lens)
        if name == "single":
            return workload.single(vocab_size, seed, *self.single)
        if name == "arrivals":
            return workload.arrivals(vocab_size, seed, *self.arrivals)
        if name == "shared":
            return workload.shared_prefix(vocab_size, seed, *self.shared)
        if name == "chat":
            return workload.conversations(vocab_size, seed, *self.chat)
        raise ValueError(f"workload={name!r} must be one of {', '.join(WORKLOADS)}.")

    def check(self) -> None:
        """Raise ValueError where a workload has requests that the engine would refuse."""
        for name in WORKLOADS:
            longest = self.build(name, 1000, 0).longest()
            if longest > self.max_model_len:
                raise ValueError(
                    f"workload {name!r} has a request of {longest} tokens, max_model_len={self.max_model_len}. "
                    "Raise --max-model-len, or shorten --input-len and --output-len."
                )


WORKLOADS = ("mixed", "single", "arrivals", "shared", "chat")

QUICK = Sizes(
    max_model_len=512,
    contiguous_slots=3,
    max_num_seqs=32,
    chunk_budget=128,
    num_prompts=12,
    input_lens=(16, 128),
    output_lens=(8, 40),
    single=(32, 24),
    arrivals=(3, 2, 440),
    shared=(6, 256, 16, 4),
    chat=(3, 3, 96, 16, 12),
    perplexity_tokens=1024,
    calibration=(8, 256),
)
"""A few minutes on two cores."""

CPU = Sizes(
    max_model_len=1024,
    contiguous_slots=4,
    max_num_seqs=64,
    chunk_budget=256,
    num_prompts=24,
    input_lens=(32, 256),
    output_lens=(16, 64),
    single=(64, 64),
    arrivals=(4, 3, 900),
    shared=(12, 512, 32, 8),
    chat=(4, 4, 128, 32, 32),
    perplexity_tokens=8192,
    calibration=(32, 512),
)

CUDA = Sizes(
    max_model_len=8192,
    contiguous_slots=8,
    max_num_seqs=256,
    chunk_budget=1024,
    num_prompts=48,
    input_lens=(100, 1024),
    output_lens=(16, 96),
    single=(128, 128),
    arrivals=(32, 4, 8000),
    shared=(64, 2048, 32, 16),
    chat=(32, 4, 512, 64, 64),
    perplexity_tokens=32768,
    calibration=(128, 512),
)


@dataclass(frozen=True)
class Rung:
    """One configuration of the engine."""

    name: str
    """"m1", ..."""
    title: str
    """For tables and pictures."""
    idea: str
    """What is new, in a sentence."""
    device: str
    """"cpu" or "cuda"."""
    engine_args: dict[str, Any]
    """Fields of EngineArgs; the model is not among them."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables."""
    workloads: tuple[str, ...] = ("mixed",)
    """What is measured on it."""
    quantized: bool = False
    """Runs the GPTQ checkpoint."""
    perplexity: bool = False
    """Perplexity is measured, too."""

    @property
    def whole_warm_up(self) -> bool:
        """Whether each workload runs to its end untimed: where a new shape may still have to be compiled.

        That is Triton's kernels, from M4 on; before them there are none, and a whole warm-up would take long.
        """
        return self.device == "cuda" and self.engine_args["attention_backend"] != "torch_naive"


PEERS = ("transformers", "vllm", "llama.cpp")
"""Other engines, in the order in which they run: see peers.py."""
RUNG_NAMES = ("m1", "m2", "m3", "m4", "m5", "m6", "kernels", "graphs", "overlap", "m7")
"""All rungs, from the ground up; "kernels" is for CPUs, "graphs" for CUDA."""


def make_rungs(device: str, sizes: Sizes) -> list[Rung]:
    """Return the rungs that exist on "cpu" or "cuda", from the ground up."""
    rungs = [_first_rung(device, sizes)]
    for step in (*_milestones(device, sizes), *_beyond(device)):
        before = rungs[-1]
        engine_args = before.engine_args | step.engine_args
        env = before.env if step.env is None else step.env
        made = (step.name, step.title, step.idea, device, engine_args, env)
        rungs.append(Rung(*made, step.workloads, step.quantized, step.perplexity))
    return rungs


@dataclass(frozen=True)
class _Step:
    """From one rung to the next."""

    name: str
    title: str
    idea: str
    engine_args: dict[str, Any] = field(default_factory=dict)
    workloads: tuple[str, ...] = ("mixed",)
    env: dict[str, str] | None = None
    quantized: bool = False
    perplexity: bool = False


def _first_rung(device: str, sizes: Sizes) -> Rung:
    slots, length = sizes.contiguous_slots, sizes.max_model_len
    engine_args = {
        "max_model_len": length,
        "block_size": length,
        "num_gpu_blocks_override": slots + 1,  # block 0 is the null block
        "max_num_seqs": 1,
        # One step takes every waiting prompt that fits the cache, whole.
        "max_num_batched_tokens": max(length, min(slots * length, sizes.num_prompts * sizes.input_lens[1])),
        "attention_backend": "torch_naive",
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "async_scheduling": False,
    }
    idea = "one request at a time; the cache is a row of max_model_len tokens per request; attention by definition"
    env = {KERNELS_SWITCH: "0"} if device == "cpu" else {}
    return Rung("m1", "M1 one request at a time", idea, device, engine_args, env)


def _milestones(device: str, sizes: Sizes) -> tuple[_Step, ...]:
    """M2 to M6."""
    blocks = sizes.contiguous_slots * -(-sizes.max_model_len // PAGED_BLOCK_SIZE) + 1
    tiles = "attention in tiles that never writes the scores down"
    return (
        _Step(
            "m2",
            "M2 continuous batching",
            "requests share steps, join when there is room and leave when done",
            {"max_num_seqs": sizes.max_num_seqs},
        ),
        _Step(
            "m3",
            "M3 paged KV cache",
            f"the same memory in blocks of {PAGED_BLOCK_SIZE} tokens, handed out as they are needed",
            {"block_size": PAGED_BLOCK_SIZE, "num_gpu_blocks_override": blocks},
        ),
        _Step(
            "m4",
            "M4 flash attention",
            tiles + (", with its fused layers" if device == "cuda" else " (torch's, over gathered pages)"),
            {"attention_backend": "auto"},
            ("mixed", "arrivals"),
        ),
        _Step(
            "m5",
            "M5 chunked prefill",
            "long prompts are cut into pieces that share steps with decodes",
            {"enable_chunked_prefill": True, "max_num_batched_tokens": sizes.chunk_budget},
            ("mixed", "arrivals", "shared", "chat"),
        ),
        _Step(
            "m6",
            "M6 prefix caching",
            "blocks of equal prefixes are shared and kept",
            {"enable_prefix_caching": True},
            ("mixed", "shared", "chat"),
        ),
    )


def _beyond(device: str) -> tuple[_Step, ...]:
    """What the device makes possible, overlap, and M7, which alone changes the model and so stands last."""
    if device == "cpu":
        idea = "layers and attention in C, over the pages where they lie, instead of torch's operators"
        fused = _Step("kernels", "+ C kernels", idea, env={})
    else:
        idea = "decode steps and prompts are recorded once and replayed: one launch a step"
        fused = _Step("graphs", "+ CUDA graphs", idea, {"enforce_eager": False})
    overlap = "the next step is scheduled while the device runs this one"
    both = ("mixed", "single")
    return (
        fused,
        _Step("overlap", "+ overlap", overlap, {"async_scheduling": True}, both, perplexity=True),
        _Step("m7", "M7 GPTQ", "the layers' weights in 4 bits", {}, both, quantized=True, perplexity=True),
    )


def select_rungs(rungs: Sequence[Rung], names: Sequence[str] | None) -> list[Rung]:
    """Return the rungs called `names`, in the ladder's order; None means all.

    Raises:
        ValueError: there is no such rung on this device.
    """
    known = [rung.name for rung in rungs]
    for name in names or ():
        if name not in known:
            raise ValueError(f"rungs={name!r} does not exist on this device; there are {', '.join(known)}.")
    return [rung for rung in rungs if names is None or rung.name in names]


def default_sizes(device: str, quick: bool) -> Sizes:
    """Return the sizes for a device."""
    return QUICK if quick else CUDA if device == "cuda" else CPU


def sizes_as_json(sizes: Sizes) -> dict[str, Any]:
    """Return the sizes for the result's settings."""
    return asdict(sizes)


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
SHAPES["qwen3-8b"] = SHAPES["qwen3-0.6b"] | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
"""Configs by name, for `--load-format dummy`: a model's shape with random weights."""
