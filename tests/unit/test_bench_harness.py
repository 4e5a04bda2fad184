"""The harness on a tiny model: what it writes down is what happened, and every number it prints follows from that."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from folovllm.benchmarks import checkpoints, metrics, peers, workload
from folovllm.benchmarks import ladder as ladder_module
from folovllm.benchmarks.child import ChildSpec, run_folovllm
from folovllm.benchmarks.ladder import Ladder, LadderOptions, child_env, run_child, summarize
from folovllm.benchmarks.metrics import kv_states, workload_figures
from folovllm.benchmarks.plots import draw_all
from folovllm.benchmarks.report import markdown
from folovllm.benchmarks.rungs import Sizes
from folovllm.benchmarks.runner import DeviceClock, EngineUnderTest
from folovllm.benchmarks.schema import (
    BenchmarkResult,
    WorkloadRecord,
    json_schema,
    read_record,
    read_result,
    write_record,
)
from folovllm.benchmarks.workload import Workload
from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.llm_engine import LLMEngine
from folovllm.entrypoints.cli.main import main
from tests.tiny_models import save_tiny_model

VOCAB_SIZE = 500
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 2,
}
SIZES = Sizes(
    max_model_len=64,
    contiguous_slots=2,
    max_num_seqs=8,
    chunk_budget=16,
    num_prompts=6,
    input_lens=(4, 20),
    output_lens=(3, 8),
    single=(8, 4),
    arrivals=(2, 2, 40),
    shared=(4, 32, 6, 3),
    chat=(2, 3, 16, 4, 4),
    perplexity_tokens=64,
    calibration=(2, 16),
)
RUNGS = ["m1", "overlap"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a config alone; weights are random."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


def engine_args(model: str, **changes: Any) -> EngineArgs:
    fields: dict[str, Any] = {
        "model": model,
        "load_format": "dummy",
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 64,
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        "num_gpu_blocks_override": 9,
    }
    return EngineArgs(**(fields | changes))


def run_workload(args: EngineArgs, work: Workload, folder: Path) -> WorkloadRecord:
    args.step_trace_path = str(folder / "trace.jsonl")
    engine = LLMEngine.from_engine_args(args)
    try:
        under_test = EngineUnderTest(engine)
        under_test.run(workload.single(VOCAB_SIZE, 99, 8, 4))  # leaves lines, which are not the next workload's
        return under_test.run(work)
    finally:
        engine.shutdown()


def slow_kv_states(record: WorkloadRecord) -> Iterator[tuple[int, int, int]]:
    """(reserved, stored, blocks held once the step's requests have ended) of each step, block by block."""
    size = record.trace_config["block_size"]
    tables: dict[str, list[int]] = {}
    computed: dict[str, int] = {}
    for step in record.steps:
        for request_id in step["aborted"] + step["preempted"]:
            tables.pop(request_id)
        for request in step["requests"]:
            if "state" in request:
                tables[request["id"]] = []
            if request["id"] in tables:
                tables[request["id"]] = tables[request["id"]] + request.get("blocks", [])
                computed[request["id"]] = request["end"]
        filled: dict[int, int] = {}
        for request_id, table in tables.items():
            for place, block in enumerate(table):
                there = min(size, max(0, computed[request_id] - place * size))
                filled[block] = max(filled.get(block, 0), there)
        if step["num_tokens"]:
            ended = {block for i, table in tables.items() if i not in step["finished"] for block in table}
            yield size * len(filled), sum(filled.values()), len(ended)
        for request_id in step["finished"]:
            tables.pop(request_id, None)


@pytest.mark.parametrize("overlap", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("name", ["mixed", "arrivals", "shared", "chat"])
def test_records_agree_with_the_engine(name: str, overlap: bool, model: str, tmp_path: Path) -> None:
    work = SIZES.build(name, VOCAB_SIZE, 0)
    # Few blocks: requests wait, and some are preempted.
    args = engine_args(model, async_scheduling=overlap, block_size=8, num_gpu_blocks_override=17)
    record = run_workload(args, work, tmp_path)
    asked = {request.id: request for request in work.requests}
    assert {request.id for request in record.requests} == set(asked)
    for request in record.requests:
        moments = [moment for moment, _ in request.outputs]
        assert sum(count for _, count in request.outputs) == asked[request.id].max_tokens
        assert request.arrival < moments[0] and moments == sorted(moments)
        assert request.finish_reason == "length"
    # Steps: these requests' and no others', on the same clock, and all their tokens.
    assert {r["id"] for step in record.steps for r in step["requests"]} == set(asked)
    begin = min(request.arrival for request in record.requests)
    end = max(request.outputs[-1][0] for request in record.requests)
    for step in record.steps:
        assert begin - 0.05 <= step["time"] - record.clock_offset <= end + 0.05
    sampled = sum(r.get("sampled", 0) for step in record.steps for r in step["requests"])
    assert sampled >= workload.total_output(work.requests)
    if not overlap:
        assert sampled == workload.total_output(work.requests)
    # The KV cache, against another way to count, and against the pool itself.
    slow = list(slow_kv_states(record))
    assert [(state.reserved, state.stored) for state in kv_states(record)] == [counts[:2] for counts in slow]
    if not overlap:
        free = [step["num_free_blocks"] for step in record.steps]
        assert [16 - held for _, _, held in slow] == free


def test_requests_arrive_when_their_condition_is_met(model: str, tmp_path: Path) -> None:
    work = SIZES.build("arrivals", VOCAB_SIZE, 0)
    record = run_workload(engine_args(model), work, tmp_path)
    stream = next(request for request in record.requests if request.id == "stream-0")
    moments = [moment for moment, count in stream.outputs for _ in range(count)]
    for request in work.requests:
        if request.after is None:
            continue
        arrival = next(r.arrival for r in record.requests if r.id == request.id)
        assert moments[request.after_tokens - 1] <= arrival <= moments[request.after_tokens]


def test_conversations_repeat_everything_and_find_it_cached(model: str, tmp_path: Path) -> None:
    work = SIZES.build("chat", VOCAB_SIZE, 0)
    args = engine_args(model, block_size=4, num_gpu_blocks_override=65)
    record = run_workload(args, work, tmp_path)
    by_id = {request.id: request for request in record.requests}
    assert [by_id[f"chat-0-{turn}"].num_prompt_tokens for turn in range(3)] == [16, 16 + 4 + 4, 16 + 2 * 8]
    # All but the last output token, which was never computed, and what does not fill a block.
    assert [by_id[f"chat-0-{turn}"].num_cached_tokens for turn in range(3)] == [0, 16, 24]
    figures = workload_figures(record)
    assert figures["later.hit_rate"] == (16 + 24) / (24 + 32)
    assert figures["hit_rate"] == 2 * (16 + 24) / (2 * (16 + 24 + 32))
    off = run_workload(engine_args(model, enable_prefix_caching=False), work, tmp_path)
    assert workload_figures(off)["hit_rate"] == 0


def test_workloads_find_nothing_of_earlier_ones(model: str, tmp_path: Path) -> None:
    work = SIZES.build("shared", VOCAB_SIZE, 0)
    engine = LLMEngine.from_engine_args(engine_args(model, step_trace_path=str(tmp_path / "trace.jsonl")))
    try:
        under_test = EngineUnderTest(engine)
        first, second = (workload_figures(under_test.run(work)) for _ in range(2))
    finally:
        engine.shutdown()
    assert first["cold.hit_rate"] == second["cold.hit_rate"] == 0
    assert first["hit_rate"] == second["hit_rate"] > 0


def test_paging_wastes_less_and_admits_more(model: str, tmp_path: Path) -> None:
    work = SIZES.build("mixed", VOCAB_SIZE, 0)
    contiguous = run_workload(engine_args(model, block_size=64, num_gpu_blocks_override=3), work, tmp_path)
    paged = run_workload(engine_args(model, block_size=8, num_gpu_blocks_override=17), work, tmp_path)
    before, after = workload_figures(contiguous), workload_figures(paged)
    assert before["peak_batch"] == 2 < after["peak_batch"]
    assert after["kv_waste"] < 0.4 < before["kv_waste"]


def test_a_request_that_ends_early_is_an_error(model: str, tmp_path: Path) -> None:
    args = engine_args(model, step_trace_path=str(tmp_path / "trace.jsonl"))
    engine = LLMEngine.from_engine_args(args)
    try:
        step = engine.step

        def short() -> Any:
            outputs = step()
            engine.abort_request(["single-0"])
            return outputs

        engine.step = short  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="instead of 4"):
            EngineUnderTest(engine).run(workload.single(VOCAB_SIZE, 0, 8, 4))
    finally:
        engine.shutdown()


def test_device_clock_times_steps_that_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's events stand around what the runner launches; here they read a clock that counts tokens."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def execute_model(output: Any, grammar: Any) -> Any:
        now[0] += 100.0  # the host prepares
        if output.total_num_scheduled_tokens:
            runner.inputs.send()
        now[0] += output.total_num_scheduled_tokens
        return output, grammar

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    inputs = types.SimpleNamespace(send=lambda: None)
    runner = types.SimpleNamespace(device=torch.device("cuda"), execute_model=execute_model, inputs=inputs)
    engine: Any = types.SimpleNamespace(
        executor=types.SimpleNamespace(worker=types.SimpleNamespace(model_runner=runner))
    )
    clock = DeviceClock(engine)
    for tokens in (3, 0, 5):
        output = types.SimpleNamespace(total_num_scheduled_tokens=tokens)
        assert runner.execute_model(output, "grammar") == (output, "grammar")
    assert clock.take() == [3.0, 5.0]
    assert clock.take() == []


# The ladder


def options(model: str, folder: Path, **changes: Any) -> LadderOptions:
    fields: dict[str, Any] = {"rounds": 1, "rungs": RUNGS, "peers": [], "use_tqdm": False}
    return LadderOptions(
        EngineArgs(model=model, load_format="dummy", device="cpu", dtype="float32"), SIZES, folder, **(fields | changes)
    )


@pytest.fixture(scope="module")
def climbed(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BenchmarkResult, Ladder]:
    """A ladder of two rungs, two rounds, as the command makes it."""
    folder = tmp_path_factory.mktemp("ladder")
    ladder = Ladder(options(model, folder, rounds=2), ["folovllm", "bench", "ladder"])
    result = ladder.run()
    assert not result.skipped, result.skipped
    return folder, result, ladder


def test_every_number_follows_from_the_recorded_events(climbed: tuple[Path, BenchmarkResult, Ladder]) -> None:
    folder, result, _ = climbed
    stored = read_result(folder / "ladder.json")
    assert stored == msgspec.json.decode(msgspec.json.encode(result), type=BenchmarkResult)
    assert [entry.name for entry in stored.entries] == RUNGS
    assert stored.machine is not None
    for entry in stored.entries:
        runs = [read_record(folder / "events" / f"{entry.name}-{round_}.json.gz") for round_ in range(2)]
        workloads, process = summarize(runs, stored.machine)
        assert (workloads, process) == (entry.workloads, entry.process)
        for figures in (*workloads.values(), process):
            for metric, figure in figures.items():
                assert metric.rpartition(".")[2] in metrics.DESCRIPTIONS
                assert figure.min <= figure.median <= figure.max and len(figure.values) in (1, 2)
    assert {"output_tok_s", "kv_waste", "host_ms", "device_ms", "roofline"} <= set(stored.entries[0].workloads["mixed"])


def test_a_falsified_file_of_events_moves_the_number(climbed: tuple[Path, BenchmarkResult, Ladder]) -> None:
    folder, result, _ = climbed
    assert result.machine is not None
    record = read_record(folder / "events" / "overlap-0.json.gz")
    true, _ = summarize([record], result.machine)
    last = max(record.workloads[0].requests, key=lambda request: request.outputs[-1][0])
    last.outputs[-1] = (last.outputs[-1][0] + 1.0, 1)
    false, _ = summarize([record], result.machine)
    gained = false["mixed"]["duration_s"].median - true["mixed"]["duration_s"].median
    assert gained == pytest.approx(1.0)
    assert false["mixed"]["output_tok_s"].median < true["mixed"]["output_tok_s"].median


def test_rungs_are_what_they_say(climbed: tuple[Path, BenchmarkResult, Ladder]) -> None:
    folder, result, _ = climbed
    first, last = result.entries
    assert first.workloads["mixed"]["peak_batch"].max == 1
    assert last.workloads["mixed"]["peak_batch"].max > 2
    assert last.workloads["mixed"]["kv_waste"].max < first.workloads["mixed"]["kv_waste"].min
    for entry in result.entries:
        record = read_record(folder / "events" / f"{entry.name}-0.json.gz")
        assert record.env == entry.env  # the record's is what the process found
        config = record.workloads[0].trace_config
        for field in ("block_size", "max_num_seqs", "enable_chunked_prefill", "enable_prefix_caching"):
            assert config[field] == entry.engine_args[field]
        assert config["async_scheduling"] == (entry.name == "overlap")
    assert first.env == {"FOLOVLLM_CPU_KERNELS": "0"} and last.env == {}
    # Rounds differ in their token ids alone.
    prompts = [
        [r.num_prompt_tokens for r in read_record(folder / "events" / f"overlap-{i}.json.gz").workloads[0].requests]
        for i in (0, 1)
    ]
    assert prompts[0] == prompts[1]


def test_the_file_has_the_published_schema(climbed: tuple[Path, BenchmarkResult, Ladder]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    folder, _, _ = climbed
    content = json.loads((folder / "ladder.json").read_text())
    jsonschema.validate(content, json_schema())
    del content["entries"][0]["workloads"]["mixed"]["output_tok_s"]["median"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, json_schema())


def test_report_and_pictures(climbed: tuple[Path, BenchmarkResult, Ladder], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, result, ladder = climbed
    pictures = draw_all(result, ladder.records(), tmp_path)
    assert pictures == ["ladder.png", "latency.png", "kv_cache.png", "gantt.png"]
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).with_suffix(".svg").read_text().lstrip().startswith("<?xml")
    report = markdown(result, pictures)
    for entry in result.entries:
        rate = entry.workloads["mixed"]["output_tok_s"]
        line = next(line for line in report.splitlines() if line.startswith(f"| {entry.title} |"))
        shown = float(line.split("|")[2].split("(")[0])  # three digits, so 1% is less than they say
        assert shown == pytest.approx(rate.median, rel=0.01)
    assert all(f"]({name})" in report for name in pictures)
    # Nobody takes a shape for a model.
    for text in (report, (tmp_path / "ladder.svg").read_text()):
        assert "random weights" in text
    assert "- `peak_host_gib`: " in report and "peak_device_gib" not in report
    result = msgspec.json.decode(msgspec.json.encode(result), type=BenchmarkResult)
    result.entries[0].process["peak_device_gib"] = result.entries[0].process["peak_host_gib"]
    assert "- `peak_device_gib`: " in markdown(result)


RunChild = Callable[[ChildSpec, Path, Path], "str | None"]


@pytest.fixture
def again(climbed: tuple[Path, BenchmarkResult, Ladder], monkeypatch: pytest.MonkeyPatch) -> RunChild:
    """A run_child that hands out m1's events, and ladders that know the machine: both spare seconds."""
    folder, _, ladder = climbed
    monkeypatch.setattr(Ladder, "_measure_machine", lambda self: ladder.machine)

    def copy(spec: ChildSpec, output: Path, log: Path) -> str | None:
        shutil.copy(folder / "events" / "m1-0.json.gz", output)
        return None

    return copy


def test_an_interrupt_keeps_what_is_done(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: RunChild
) -> None:
    calls: list[str] = []

    def interrupted(spec: ChildSpec, output: Path, log: Path) -> str | None:
        calls.append(spec.rung)
        if len(calls) == 2:
            # On disk already: even a process that is killed keeps what is done.
            assert [entry.name for entry in read_result(tmp_path / "ladder.json").entries] == ["m1"]
            os.kill(os.getpid(), signal.SIGTERM)  # as Ctrl-C
        return again(spec, output, log)

    monkeypatch.setattr(ladder_module, "run_child", interrupted)
    result = Ladder(options(model, tmp_path), ["x"]).run()
    assert calls == ["m1", "overlap"]
    assert result.interrupted
    stored = read_result(tmp_path / "ladder.json")
    assert [entry.name for entry in stored.entries] == ["m1"]
    assert stored.interrupted
    assert "Interrupted" in markdown(stored)


def test_a_rung_that_fails_is_left_out_with_its_reason(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: RunChild
) -> None:
    calls: list[str] = []

    def broken(spec: ChildSpec, output: Path, log: Path) -> str | None:
        calls.append(spec.rung)
        if spec.rung == "m3":
            return run_child(msgspec.structs.replace(spec, engine_args={"block_size": 0}), output, log)
        return again(spec, output, log)

    monkeypatch.setattr(ladder_module, "run_child", broken)
    ladder = Ladder(options(model, tmp_path, rungs=["m1", "m3"], rounds=2), ["x"])
    result = ladder.run()
    assert calls == ["m1", "m3", "m1"]  # not tried again
    assert ladder.failed
    assert [(entry.name, len(entry.workloads["mixed"]["output_tok_s"].values)) for entry in result.entries] == [
        ("m1", 2)
    ]
    assert "block_size=0" in result.skipped["m3"]
    assert "block_size=0" in markdown(result)


def test_a_whole_warm_up_runs_the_workload_twice(model: str) -> None:
    args = {"load_format": "dummy", "dtype": "float32", "device": "cpu", "max_model_len": 64, "max_num_seqs": 1}
    short = ChildSpec("m1", 0, "folovllm", model, args, {}, SIZES, ["mixed"])
    steps = {}
    for whole in (False, True):
        record = run_folovllm(msgspec.structs.replace(short, whole_warm_up=whole)).workloads[0]
        steps[whole] = record.steps[0]["step"], len(record.steps)
    assert steps[True][0] >= steps[True][1] == steps[False][1] > steps[False][0] > 0


def test_a_rung_that_fails_later_keeps_what_it_has_and_says_so(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: RunChild
) -> None:
    monkeypatch.setattr(
        ladder_module, "run_child", lambda spec, *paths: "it broke" if spec.round else again(spec, *paths)
    )
    result = Ladder(options(model, tmp_path, rungs=["m1"], rounds=2), ["x"]).run()
    report = markdown(result)
    assert "definition. 1 of 2 rounds.\n- *m1* was left out of later rounds: it broke." in report


@pytest.mark.badinput
def test_half_an_installation_of_matplotlib_is_seen_before_anything_runs(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    flags = ["--model", model, "--load-format", "dummy", "--device", "cpu", "--output-dir", str(tmp_path / "ladder")]
    assert main(["bench", "ladder", "--quick", *flags]) == 1
    assert "--no-plots" in capsys.readouterr().err
    assert not (tmp_path / "ladder").exists()


def test_a_child_ends_with_its_parent(model: str, tmp_path: Path) -> None:
    spec = ChildSpec("x", 0, "folovllm", model, {"load_format": "dummy"}, {}, SIZES, ["mixed"] * 10000)
    path = tmp_path / "spec.json"
    path.write_bytes(msgspec.json.encode(spec))
    # A parent that starts a child and is killed.
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'folovllm.benchmarks.child', *sys.argv[1:]],"
        " stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(tmp_path / "record.json")],
        stdout=subprocess.PIPE,
        text=True,
        env=child_env({}),
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.send_signal(signal.SIGKILL)
    parent.wait(timeout=10)
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and is_running(child):
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_revision_has_its_gptq_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(checkpoints, "_make", lambda output, command, env: None)
    made = {
        checkpoints.gptq_checkpoint(EngineArgs("some/model", revision=revision), CONFIG, (8, 256), tmp_path, {})
        for revision in (None, "main", "refs/pr/1")
    }
    assert len(made) == 3
    assert {Path(folder).parent for folder in made} == {tmp_path / "ladder"}


def test_peers_that_are_not_there_are_skipped_with_a_reason(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_has_module", lambda name, python: False)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    for name in peers.PEERS:
        with pytest.raises(peers.Unavailable, match="not installed"):
            peers.prepare(name, model, EngineArgs(model=model), "cpu", None)
    with pytest.raises(ValueError, match="peers='tgi'"):
        peers.check_names(["tgi"])


def test_transformers_leaves_the_same_records(model: str, tmp_path: Path) -> None:
    args = {"load_format": "dummy", "dtype": "float32", "device": "cpu", "max_model_len": 64, "max_num_seqs": 8}
    spec = ChildSpec("transformers", 0, "transformers", model, args, {}, SIZES, ["mixed"])
    error = run_child(spec, tmp_path / "record.json", tmp_path / "log")
    assert error is None, (tmp_path / "log").read_text()
    record = read_record(tmp_path / "record.json")
    asked = SIZES.build("mixed", VOCAB_SIZE, 0).requests
    assert [len(request.outputs) for request in record.workloads[0].requests] == [r.max_tokens for r in asked]
    figures = workload_figures(record.workloads[0])
    assert figures["output_tok_s"] > 0 and "kv_use" not in figures
    write_record(tmp_path / "again.json.gz", record)
    assert read_record(tmp_path / "again.json.gz") == record


def test_transformers_reads_no_pickle(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "qwen3")
    weights = tmp_path / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()
    args = {"load_format": "auto", "dtype": "float32", "device": "cpu", "max_model_len": 64, "max_num_seqs": 8}
    spec = ChildSpec("transformers", 0, "transformers", str(tmp_path), args, {}, SIZES, ["mixed"])
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        peers.run_peer(spec)


def test_llama_cpp_is_driven_token_by_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Llama:
        def __init__(self, path: str, **kwargs: Any) -> None:
            assert kwargs["n_ctx"] == 64

        def n_vocab(self) -> int:
            return VOCAB_SIZE

        def reset(self) -> None:
            pass

        def generate(self, tokens: list[int], **kwargs: Any) -> Iterator[int]:
            assert kwargs["temp"] == 0.0
            while True:
                yield tokens[0]

    module = type(sys)("llama_cpp")
    module.Llama = Llama  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setattr(peers, "version", lambda package: "1.2")
    weights = tmp_path / "model.gguf"
    weights.write_bytes(b"12345")
    spec = ChildSpec(
        "llama.cpp", 0, "llama.cpp", str(weights), {"device": "cpu", "max_model_len": 64}, {}, SIZES, ["mixed"]
    )
    record = peers.run_peer(spec)
    assert record.engine == "llama.cpp 1.2" and record.memory.weights == 5
    asked = SIZES.build("mixed", VOCAB_SIZE, 0).requests
    assert [len(request.outputs) for request in record.workloads[0].requests] == [r.max_tokens for r in asked]


@pytest.mark.network
@pytest.mark.slow
def test_perplexity_is_measured_on_a_real_model(tmp_path: Path) -> None:
    flags = ["--rungs", "overlap", "--rounds", "1", "--peers", "--no-plots", "-q", "--output-dir", str(tmp_path)]
    assert main(["bench", "ladder", "--quick", "--device", "cpu", *flags]) == 0
    entry = read_result(tmp_path / "ladder.json").entries[0]
    record = read_record(tmp_path / "events" / "overlap-0.json.gz").perplexity
    assert record is not None and record.num_scored_tokens == 1023 and record.text == "persuasion.txt"
    assert entry.process["perplexity"].values == [pytest.approx(math.exp(record.nats_per_token))]
    assert 25 < entry.process["perplexity"].median < 55
    assert entry.workloads["single"]["roofline"].median > 0


# The commands


def command(model: str, *arguments: str) -> list[str]:
    engine = ["--model", model, "--load-format", "dummy", "--device", "cpu", "--dtype", "float32"]
    return ["bench", *arguments, *engine, "--skip-tokenizer-init", "--max-model-len", "64"]


def test_throughput_prints_and_writes_the_same(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, trace = tmp_path / "out.json", tmp_path / "trace.jsonl"
    flags = ["--num-prompts", "5", "--input-len", "9", "--output-len", "4", "--num-warmups", "1"]
    where = ["--output-json", str(path), "--step-trace", str(trace)]
    assert main(command(model, "throughput", *flags, *where)) == 0
    result = read_result(path)
    figures = {name: figure.median for name, figure in result.entries[0].workloads["uniform"].items()}
    printed = capsys.readouterr().out
    assert (
        f"Throughput: {figures['requests_s']:.2f} requests/s, {figures['total_tok_s']:.2f} total tokens/s, "
        f"{figures['output_tok_s']:.2f} output tokens/s" in printed
    )
    assert "Total num output tokens: 20\n" in printed
    assert figures["total_tok_s"] == pytest.approx(figures["output_tok_s"] * 13 / 4)
    assert trace.stat().st_size > 0
    assert result.kind == "throughput"


def test_latency_has_a_value_per_iteration(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    flags = [
        "--batch-size",
        "2",
        "--input-len",
        "8",
        "--output-len",
        "3",
        "--num-iters",
        "4",
        "--num-iters-warmup",
        "1",
    ]
    assert main(command(model, "latency", *flags, "--output-json", str(path))) == 0
    values = read_result(path).entries[0].workloads["uniform"]["duration_s"].values
    assert len(values) == 4
    assert f"Avg latency: {sum(values) / 4} seconds" in capsys.readouterr().out


@pytest.mark.badinput
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput", "--num-prompts", "0"], "num_prompts=0"),
        (["throughput", "--num-warmups", "-1"], "num_warmups=-1"),
        (["throughput", "--input-len", "100"], "max_model_len=64"),
        (["throughput", "--output-json", "/nowhere/x.json"], "/nowhere/x.json"),
        (["latency", "--batch-size", "0"], "batch_size=0"),
        (["latency", "--output-len", "64"], "max_model_len=64"),
    ],
)
def test_wrong_values_are_one_line(
    arguments: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model, *arguments)) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.badinput
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--rungs", "m99"], 1, "rungs='m99'"),
        (["--rounds", "0"], 1, "rounds=0"),
        (["--input-len", "20", "10"], 2, "--input-len"),
        (["--max-model-len", "100"], 1, "max_model_len=100"),
        (["--perplexity-file", "/nowhere"], 1, "/nowhere"),
    ],
)
def test_wrong_ladders_are_one_line(
    arguments: list[str], code: int, message: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", model, "--load-format", "dummy", "--device", "cpu", "--output-dir", str(tmp_path), "--no-plots"]
    assert main(["bench", "ladder", "--quick", *flags, *arguments]) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_the_command_climbs(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", model, "--load-format", "dummy", "--device", "cpu", "--dtype", "float32", "--no-plots"]
    sizes = ["--max-model-len", "200", "--num-prompts", "3", "--input-len", "4", "8", "--output-len", "2", "3"]
    where = ["--output-dir", str(tmp_path), "--rungs", "m7", "--peers"]
    assert main(["bench", "ladder", "--quick", "--rounds", "1", *flags, *sizes, *where]) == 0
    result = read_result(tmp_path / "ladder.json")
    assert [entry.name for entry in result.entries] == ["m7"]
    assert (tmp_path / "ladder.md").read_text() in capsys.readouterr().out
    config = json.loads((tmp_path / "models" / "gptq" / "config.json").read_text())
    assert config["quantization_config"]["bits"] == 4
    assert result.settings["sizes"]["num_prompts"] == 3
