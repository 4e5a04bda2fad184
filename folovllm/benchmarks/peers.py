"""Other engines on the ladder's workload "mixed", where they are installed: transformers, vLLM, llama.cpp.

Each is run as its own documentation says one would, in a process of its own, and leaves the same records: the times of
outputs per request. What none of them has is a step trace.

    transformers   one batch of all prompts, padded on the left, until the longest answer is done (`generate`)
    vllm           its LLMEngine, add_request and step, as here; the CPU build or the GPU build, whichever is installed
    llama.cpp      llama-cpp-python, on a GGUF file, one request after the other: its Python interface has no batches
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folovllm.benchmarks.child import STARTED, ChildSpec, warm_up_workload
from folovllm.benchmarks.machine import peak_device_bytes, peak_host_bytes
from folovllm.benchmarks.rungs import PEERS
from folovllm.benchmarks.runner import WorkloadRun
from folovllm.benchmarks.schema import MemoryRecord, RequestRecord, RunRecord, WorkloadRecord
from folovllm.benchmarks.workload import WARM_UP_SEED, Workload

if TYPE_CHECKING:
    from folovllm.engine.arg_utils import EngineArgs


class Unavailable(Exception):
    """A peer cannot run here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """How to run a peer."""

    model: str
    """Folder or file that it loads."""
    note: str
    """For the result: how it was run."""
    python: str | None = None
    """Interpreter; None: this one."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables."""


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is not in PEERS."""
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peers={name!r} must be one of {', '.join(PEERS)}, or none.")


def prepare(name: str, model: str, engine_args: EngineArgs, device: str, vllm_python: str | None) -> Peer:
    """Return how to run the peer `name`; may convert the model into a form that it reads.

    Raises:
        Unavailable: it cannot run.
    """
    from folovllm.benchmarks.checkpoints import hugging_face_folder
    from folovllm.benchmarks.ladder import child_env

    if name == "llama.cpp":
        return _prepare_llama_cpp(model, engine_args)
    python = vllm_python if name == "vllm" else None
    if not _has_module(name, python):
        hint = "; name the Python of an environment that has it with --vllm-python" if name == "vllm" else ""
        raise Unavailable(f"{name} is not installed{hint}")
    try:
        folder = hugging_face_folder(engine_args, model, child_env({}))
    except ValueError as error:
        raise Unavailable(str(error)) from error
    if name == "transformers":
        return Peer(folder, "generate() on one padded batch of all requests")
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    if device == "cpu":
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        env |= {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "VLLM_CPU_KVCACHE_SPACE": "1"}
    return Peer(folder, "its defaults, with a KV cache as large as it likes", vllm_python, env)


def _prepare_llama_cpp(model: str, engine_args: EngineArgs) -> Peer:
    if importlib.util.find_spec("llama_cpp") is None:
        raise Unavailable("llama-cpp-python is not installed")
    from folovllm.model_executor.model_loader.named import fetch_named_model, is_named_model

    path = str(fetch_named_model(model, engine_args.download_dir)) if is_named_model(model) else model
    if not path.endswith(".gguf"):
        raise Unavailable(f"it reads GGUF files, and model={model!r} is none")
    return Peer(path, "the GGUF file as it is (its weights may have fewer bits), one request after the other")


def _has_module(name: str, python: str | None) -> bool:
    if python is None:
        return importlib.util.find_spec(name) is not None
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    try:
        return subprocess.run([python, "-c", code], check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def foreign_env(folder: str, env: dict[str, str]) -> dict[str, str]:
    """Return the environment for another Python: it finds this package, through a link, and nothing else of ours."""
    packages = Path(folder) / "packages"
    packages.mkdir()
    (packages / "folovllm").symlink_to(Path(__file__).parents[1])
    return os.environ | {"PYTHONPATH": str(packages)} | env


# ---- In the child process ----

Generate = Callable[[Workload], list[RequestRecord]]
"""Runs a workload whose requests all arrive at the start."""


def run_peer(spec: ChildSpec) -> RunRecord:
    """Load the peer, run the workloads and return what happened."""
    import torch

    device = "cuda" if spec.engine_args["device"] != "cpu" and torch.cuda.is_available() else "cpu"
    load = {"transformers": _load_transformers, "vllm": _load_vllm, "llama.cpp": _load_llama_cpp}[spec.engine]
    generate, package, vocab_size, num_weight_bytes = load(spec, device)
    startup_s = time.perf_counter() - STARTED
    records = []
    for name in spec.workloads:
        generate(warm_up_workload(spec.sizes.build(name, vocab_size, WARM_UP_SEED)))
        records.append(WorkloadRecord(name, generate(spec.sizes.build(name, vocab_size, spec.round))))
    return RunRecord(
        rung=spec.rung,
        round=spec.round,
        engine=f"{spec.engine} {version(package)}",
        engine_args=spec.engine_args,
        env={name: os.environ.get(name, "") for name in spec.env},
        memory=MemoryRecord(peak_host_bytes(), num_weight_bytes, 0, peak_device_bytes()),
        workloads=records,
        startup_s=startup_s,
    )


def _load_transformers(spec: ChildSpec, device: str) -> tuple[Generate, str, int, int]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(spec.model, trust_remote_code=False)
    dtype: Any = spec.engine_args["dtype"]
    if dtype == "auto":
        from folovllm.worker.worker_base import resolve_dtype

        dtype = resolve_dtype("auto", {"dtype": str(config.dtype).removeprefix("torch.")}, torch.device(device))[0]
    else:
        dtype = getattr(torch, dtype)
    model: Any
    if spec.engine_args["load_format"] == "dummy":
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:  # left to itself it would unpickle what has no safetensors
        model = AutoModelForCausalLM.from_pretrained(spec.model, config=config, dtype=dtype, use_safetensors=True)
    model = model.to(device).eval()

    def generate(workload: Workload) -> list[RequestRecord]:
        start = time.perf_counter()
        times = _padded_batch(model, [request.token_ids for request in workload.requests], _longest(workload), device)
        return [
            RequestRecord(
                id=request.id,
                group=request.group,
                arrival=start,
                num_prompt_tokens=len(request.token_ids),
                # Tokens beyond the request's own are computed for nothing.
                outputs=[(moment, 1) for moment in times[: request.max_tokens]],
                finish_reason="length",
            )
            for request in workload.requests
        ]

    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    return generate, "transformers", int(model.config.vocab_size), num_bytes


def _longest(workload: Workload) -> int:
    return max(request.max_tokens for request in workload.requests)


class _TokenClock:
    """A streamer of transformers: put() is called with the prompt, then with each step's tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def _padded_batch(model: Any, prompts: list[list[int]], num_tokens: int, device: str) -> list[float]:
    """Generate `num_tokens` for each prompt, in one batch; return when each step's tokens were there."""
    import torch

    longest = max(map(len, prompts))
    pad = [longest - len(prompt) for prompt in prompts]
    clock = _TokenClock()
    with torch.inference_mode():
        model.generate(
            torch.tensor([[0] * n + prompt for n, prompt in zip(pad, prompts, strict=True)], device=device),
            attention_mask=torch.tensor([[0] * n + [1] * (longest - n) for n in pad], device=device),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
    return clock.times[1:]


def _load_vllm(spec: ChildSpec, device: str) -> tuple[Generate, str, int, int]:
    vllm = importlib.import_module("vllm")
    delta = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
    llm = vllm.LLM(
        spec.model,
        dtype=spec.engine_args["dtype"],
        load_format="dummy" if spec.engine_args["load_format"] == "dummy" else "safetensors",  # "auto" also unpickles
        max_model_len=spec.engine_args["max_model_len"],
        max_num_seqs=spec.engine_args["max_num_seqs"],
        skip_tokenizer_init=True,
    )

    def make_params(max_tokens: int) -> Any:
        return vllm.SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=delta,
        )

    def generate(workload: Workload) -> list[RequestRecord]:
        return WorkloadRun(llm.llm_engine, workload, make_params).run()

    package = "vllm"
    if device == "cpu":
        try:
            version("vllm-cpu")
            package = "vllm-cpu"
        except ImportError:
            pass
    return generate, package, int(llm.llm_engine.model_config.get_vocab_size()), 0


def _load_llama_cpp(spec: ChildSpec, device: str) -> tuple[Generate, str, int, int]:
    llama_cpp = importlib.import_module("llama_cpp")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    llm = llama_cpp.Llama(
        spec.model,
        n_ctx=spec.engine_args["max_model_len"],
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=-1 if device == "cuda" else 0,
        verbose=False,
    )

    def generate(workload: Workload) -> list[RequestRecord]:
        start = time.perf_counter()
        records = []
        for request in workload.requests:
            record = RequestRecord(request.id, request.group, start, len(request.token_ids), finish_reason="length")
            llm.reset()
            for _ in llm.generate(request.token_ids, temp=0.0, reset=True):
                record.outputs.append((time.perf_counter(), 1))
                if len(record.outputs) == request.max_tokens:
                    break
            records.append(record)
        return records

    return generate, "llama-cpp-python", int(llm.n_vocab()), Path(spec.model).stat().st_size
