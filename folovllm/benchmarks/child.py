"""One run in a process of its own: python -m folovllm.benchmarks.child SPEC.json RECORD.json

The process starts an engine, runs the workloads of one rung on it, and writes a RunRecord. So memory is that of one
engine, and nothing that one configuration leaves behind (threads, caches, compiled kernels) is there for the next.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from folovllm.benchmarks.rungs import Sizes
from folovllm.benchmarks.schema import MemoryRecord, PerplexityRecord, RunRecord, write_record
from folovllm.benchmarks.workload import WARM_UP_SEED, Workload

STARTED = time.perf_counter()
WARM_UP_TOKENS = 4
"""Output tokens of most requests of a short warm-up."""
MODEL_FIELDS = (
    "architectures",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "quantization_config",
)
"""What a record keeps of the model's config."""


class ChildSpec(msgspec.Struct):
    """What to run."""

    rung: str
    round: int
    engine: str
    """"folovllm", or a name of peers.PEERS."""
    model: str
    engine_args: dict[str, Any]
    """Fields of EngineArgs but the model; a peer takes what it understands: see peers.py."""
    env: dict[str, str]
    """As the process is started with; the record tells what arrived."""
    sizes: Sizes
    workloads: list[str]
    whole_warm_up: bool = False
    """Rung.whole_warm_up."""
    text: str | None = None
    """File to measure perplexity on; None: do not."""
    tokenizer: str | None = None
    """Model whose tokenizer reads that file."""


def warm_up_workload(workload: Workload) -> Workload:
    """Return the workload with few output tokens, all at the start: the same prompts, soon done.

    Half of the requests end first, then half of the others, and so on: batches of all sizes, but for a factor of two.
    """
    opening = [request for request in workload.requests if not request.continues]
    requests = tuple(
        replace(
            request,
            max_tokens=min(request.max_tokens, WARM_UP_TOKENS - 1 + (len(opening) // (i + 1)).bit_length()),
            after=None,
            continues=False,
        )
        for i, request in enumerate(opening)
    )
    return Workload(workload.name, requests)


def run_folovllm(spec: ChildSpec) -> RunRecord:
    """Run the rung on FoloVLLM."""
    from folovllm.benchmarks.machine import memory_of, peak_device_bytes, peak_host_bytes
    from folovllm.benchmarks.runner import EngineUnderTest
    from folovllm.engine.arg_utils import EngineArgs
    from folovllm.engine.llm_engine import LLMEngine

    with tempfile.TemporaryDirectory() as folder:
        engine_args = EngineArgs(
            model=spec.model,
            skip_tokenizer_init=True,
            use_tqdm_on_load=False,
            step_trace_path=str(Path(folder) / "trace.jsonl"),
            **spec.engine_args,
        )
        engine = LLMEngine.from_engine_args(engine_args)
        try:
            startup_s = time.perf_counter() - STARTED
            vocab_size = engine.vllm_config.model_config.get_vocab_size()
            under_test = EngineUnderTest(engine)
            records = []
            for name in spec.workloads:
                warm_up = spec.sizes.build(name, vocab_size, WARM_UP_SEED)
                under_test.run(warm_up if spec.whole_warm_up else warm_up_workload(warm_up))
                records.append(under_test.run(spec.sizes.build(name, vocab_size, spec.round)))
            weights, kv_cache = memory_of(engine)
            # Perplexity comes after it: it holds the text's logits, which no workload does.
            memory = MemoryRecord(peak_host_bytes(), weights, kv_cache, peak_device_bytes())
            perplexity = _perplexity(spec, engine) if spec.text is not None else None
            hf_config = engine.vllm_config.model_config.hf_config or {}
            return RunRecord(
                rung=spec.rung,
                round=spec.round,
                engine="folovllm",
                engine_args=spec.engine_args,
                env={name: os.environ.get(name, "") for name in spec.env},
                memory=memory,
                workloads=records,
                startup_report=engine.startup_report,
                startup_s=startup_s,
                perplexity=perplexity,
                model={name: hf_config[name] for name in MODEL_FIELDS if name in hf_config},
            )
        finally:
            engine.shutdown()


def _perplexity(spec: ChildSpec, engine: Any) -> PerplexityRecord:
    from folovllm.engine.arg_utils import EngineArgs
    from folovllm.quantize.calibration import read_text_file
    from folovllm.quantize.perplexity import measure_perplexity

    assert spec.text is not None
    tokenizer = EngineArgs(model=spec.tokenizer or spec.model).resolve_model_source().tokenizer()
    token_ids = tokenizer.encode(read_text_file(spec.text, "text"))[: spec.sizes.perplexity_tokens]
    window = min(1024, spec.sizes.max_model_len - 1)
    result = measure_perplexity(engine, token_ids, window, window // 2, use_tqdm=False)
    return PerplexityRecord(result.nats_per_token, result.num_scored_tokens, window, window // 2, Path(spec.text).name)


def _end_with_parent() -> None:
    """Leave when stdin ends: whoever started this process has gone, or wants no more of it."""
    os.read(0, 1)
    os._exit(1)


def main(argv: list[str]) -> None:
    """See the module."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    spec = msgspec.json.decode(Path(argv[0]).read_bytes(), type=ChildSpec)
    if spec.engine == "folovllm":
        record = run_folovllm(spec)
    else:
        from folovllm.benchmarks.peers import run_peer

        record = run_peer(spec)
    write_record(argv[1], record)


if __name__ == "__main__":
    main(sys.argv[1:])
