"""The step trace: the pool redrawn from the file alone is the pool, after every step, whatever happens."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import msgspec
import pytest

from folovllm.config import ModelConfig, ObservabilityConfig, VllmConfig
from folovllm.core.kv_cache_manager import KVCacheManager
from folovllm.core.sched.traced_scheduler import TracedScheduler
from folovllm.engine.arg_utils import EngineArgs
from folovllm.engine.core import EngineCore
from folovllm.metrics.step_trace import SCHEMA, VERSION, StepTraceWriter, TracedRequest, TracedStep, token_kind
from folovllm.outputs import ModelRunnerOutput
from folovllm.request import EngineCoreRequest, RequestStatus
from folovllm.sampling_params import SamplingParams
from tests.core_utils import FakeEngine, create_requests, create_scheduler, make_request, make_vllm_config
from tests.fakes import FakeExecutor


class PoolModel:
    """The block pool as docs/step_trace.md says it can be redrawn: knows the trace, nothing of the engine."""

    def __init__(self, header: dict[str, Any]) -> None:
        num_blocks = header["config"]["num_blocks"]
        self.ref_count = [0] * num_blocks
        self.cached: set[int] = set()
        self.free = OrderedDict.fromkeys(range(1, num_blocks))
        self.held: dict[str, list[int]] = {}

    def apply(self, line: dict[str, Any]) -> None:
        """Advance by one line."""
        for kind, ids in line["events"]:
            if kind == "evict":
                self.cached -= set(ids)
            elif kind == "cache":
                self.cached |= set(ids)
            elif kind == "reset":
                self.cached.clear()
            elif kind in ("allocate", "hit"):
                for block in ids:
                    self.ref_count[block] += 1
                    self.free.pop(block, None)
            elif kind in ("release", "free"):
                for block in ids:
                    self.ref_count[block] -= 1
                if kind == "free":
                    self._join_free_queue(ids)
            else:
                assert kind in ("schedule", "update")
        for request_id in [*line["aborted"], *line["preempted"]]:
            self.held.pop(request_id, None)
        for request in line["requests"]:
            if request.get("state", "running") == "running":
                # With AsyncScheduler it may have ended when this step was under way already.
                if request["id"] in self.held:
                    self.held[request["id"]] += request.get("blocks", [])
            else:
                self.held[request["id"]] = list(request["blocks"])
        for request_id in line["finished"]:
            self.held.pop(request_id, None)

    def _join_free_queue(self, ids: list[int]) -> None:
        for block in ids:
            self.free[block] = None
        for block in reversed([i for i in ids if i not in self.cached]):
            self.free.move_to_end(block, last=False)


def snapshot(manager: KVCacheManager) -> dict[str, Any]:
    """The real pool, in the model's terms."""
    pool = manager.block_pool
    return {
        "ref_count": [block.ref_cnt for block in pool.blocks],
        "cached": {block.block_id for block in pool.blocks if block.block_hash is not None},
        "free": [block.block_id for block in pool.free_block_queue.get_all_free_blocks()],
        "held": {r: [block.block_id for block in blocks] for r, blocks in manager.req_to_blocks.items() if blocks},
    }


class TracedEngine(FakeEngine):
    """A FakeEngine with a trace, that takes a picture of the real pool after every step."""

    def __init__(self, path: Path, depth: int = 0, **scheduler_args: Any) -> None:
        self.real = create_scheduler(**scheduler_args)
        super().__init__(self.real, depth)
        self.traced = TracedScheduler(self.real, str(path))
        self.scheduler = self.traced  # type: ignore[assignment]
        self.snapshots: list[dict[str, Any]] = []
        self.path = path

    def _update(self) -> None:
        super()._update()
        self.snapshots.append(snapshot(self.real.kv_cache_manager))

    def finish(self) -> list[dict[str, Any]]:
        """Run to the end; return the lines of the trace after comparing every one with the pool."""
        self.run(check=False)
        return self.check()

    def check(self) -> list[dict[str, Any]]:
        """Close the trace and compare."""
        self.traced.shutdown()
        header, *lines = read(self.path)
        model = PoolModel(header)
        assert len(lines) == len(self.snapshots) > 0
        for i, (line, real) in enumerate(zip(lines, self.snapshots, strict=True)):
            model.apply(line)
            assert line["step"] == i
            assert model.ref_count == real["ref_count"], i
            assert model.cached == real["cached"], i
            assert list(model.free) == real["free"], i
            assert line["num_free_blocks"] == len(real["free"])
            if self.depth == 0:
                assert model.held == real["held"], i
        assert model.held == {}
        return lines


def read(path: Path) -> list[dict[str, Any]]:
    """Parse a trace, header first; every line must be complete."""
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def kinds(lines: list[dict[str, Any]]) -> set[str]:
    return {kind for line in lines for kind, _ in line["events"]}


SMALL = {"block_size": 4, "enable_prefix_caching": True, "max_model_len": 64}


def test_one_request_line_by_line(tmp_path: Path) -> None:
    engine = TracedEngine(tmp_path / "t.jsonl", num_blocks=8, max_num_seqs=4, max_num_batched_tokens=6, **SMALL)
    engine.add(make_request("a", range(9), block_size=4, max_tokens=3))
    lines = engine.finish()
    assert [line["requests"] for line in lines] == [
        [{"id": "a", "start": 0, "end": 6, "kind": "prefill", "state": "new", "blocks": [1, 2]}],
        [{"id": "a", "start": 6, "end": 9, "kind": "prefill", "blocks": [3], "sampled": 1}],
        [{"id": "a", "start": 9, "end": 10, "kind": "decode", "sampled": 1}],
        [{"id": "a", "start": 10, "end": 11, "kind": "decode", "sampled": 1}],
        [],  # tells the worker that "a" has ended
    ]
    assert [line["num_tokens"] for line in lines] == [6, 3, 1, 1, 0]
    assert [line["finished"] for line in lines] == [{}, {}, {}, {"a": "length"}, {}]
    assert [line["num_running"] for line in lines] == [1, 1, 1, 0, 0]
    assert not any(line["aborted"] or line["preempted"] for line in lines)
    assert lines[0]["events"] == [["schedule", [0]], ["allocate", [1, 2]], ["cache", [1]], ["update", [0]]]
    assert lines[3]["events"] == [["schedule", [3]], ["update", [3]], ["free", [3, 2, 1]]]
    for line in lines:
        assert set(line["ms"]) == set(line["cpu_ms"]) == {"schedule", "execute", "update"}
        assert all(value >= 0 for value in line["ms"].values())


def test_header_says_what_the_pool_is(tmp_path: Path) -> None:
    engine = TracedEngine(tmp_path / "t.jsonl", num_blocks=8, max_num_batched_tokens=32, **SMALL)
    engine.traced.shutdown()
    (header,) = read(tmp_path / "t.jsonl")
    assert (header["schema"], header["version"]) == (SCHEMA, VERSION) == ("folovllm.step_trace", 1)
    assert header["config"] == {
        "model": "fake",
        "block_size": 4,
        "num_blocks": 8,
        "max_model_len": 64,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 32,
        "long_prefill_token_threshold": 0,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        "policy": "fcfs",
        "async_scheduling": False,
    }


def test_prefix_hits_and_eviction(tmp_path: Path) -> None:
    engine = TracedEngine(tmp_path / "t.jsonl", num_blocks=12, **SMALL)
    shared = list(range(12))
    engine.add(make_request("a", [*shared, 50], block_size=4, max_tokens=4))
    engine.step()
    # A hit on blocks that are held, one on blocks that are free, and strangers who evict them.
    engine.add(make_request("b", [*shared, 60], block_size=4, max_tokens=4))
    engine.run(check=False)
    engine.add(make_request("c", [*shared, 70], block_size=4, max_tokens=4))
    engine.run(check=False)
    engine.add(*create_requests(2, num_tokens=18, start=80, block_size=4))
    lines = engine.finish()
    assert kinds(lines) >= {"allocate", "hit", "release", "free", "cache", "evict"}
    b = next(r for line in lines for r in line["requests"] if r["id"] == "b")
    assert (b["start"], b["end"], b["kind"], b["state"]) == (12, 13, "prefill", "new")
    assert len(b["blocks"]) == 4


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("caching", [True, False])
def test_preemption_and_recompute(tmp_path: Path, policy: str, caching: bool) -> None:
    args = SMALL | {"enable_prefix_caching": caching, "policy": policy, "max_num_batched_tokens": 40}
    engine = TracedEngine(tmp_path / "t.jsonl", num_blocks=14, **args)
    requests = create_requests(4, num_tokens=10, block_size=4, max_tokens=18, priorities=[2, 0, 1, 1])
    engine.add(*requests[:1])
    engine.step()
    engine.add(*requests[1:])
    lines = engine.finish()
    preempted = [request_id for line in lines for request_id in line["preempted"]]
    resumed = [r for line in lines for r in line["requests"] if r.get("state") == "resumed"]
    assert preempted and {r["id"] for r in resumed} == set(preempted)
    if not caching:
        # Nothing is cached, so prompt and outputs are computed again in one go.
        assert "both" in {r["kind"] for r in resumed}
        assert not kinds(lines) & {"hit", "cache", "evict"}
    assert {i for line in lines for i in line["finished"]} == {"0", "1", "2", "3"}


def test_aborts_between_steps_are_in_the_next_line(tmp_path: Path) -> None:
    engine = TracedEngine(tmp_path / "t.jsonl", num_blocks=20, **SMALL)
    engine.add(*create_requests(3, num_tokens=9, block_size=4))
    engine.step()
    engine.scheduler.finish_requests(["1", "2"], RequestStatus.FINISHED_ABORTED)
    # An id may come back at once.
    engine.add(make_request("1", range(30, 38), block_size=4, max_tokens=2))
    lines = engine.finish()
    assert lines[0]["aborted"] == [] and lines[1]["aborted"] == ["1", "2"]
    assert [kind for kind, _ in lines[1]["events"][:3]] == ["free", "free", "schedule"]
    assert not any(line["aborted"] for line in lines[2:])
    assert {i for line in lines for i in line["finished"]} == {"0", "1"}


def test_reset_of_the_prefix_cache(tmp_path: Path) -> None:
    engine = TracedEngine(tmp_path / "t.jsonl", num_blocks=20, **SMALL)
    engine.add(*create_requests(2, num_tokens=9, block_size=4, max_tokens=4))
    engine.step()
    assert not engine.traced.reset_prefix_cache()
    assert engine.traced.reset_prefix_cache(reset_running_requests=True)
    lines = engine.finish()
    assert lines[1]["preempted"] == ["0", "1"]
    assert [r["state"] for r in lines[1]["requests"]] == ["resumed", "resumed"]
    assert [kind for kind, _ in lines[1]["events"]][:4] == ["free", "free", "reset", "schedule"]


def test_a_request_that_is_given_up_is_finished_not_aborted(tmp_path: Path) -> None:
    engine = TracedEngine(tmp_path / "t.jsonl", num_blocks=4, **SMALL)
    engine.add(make_request("big", range(40), block_size=4), make_request("a", range(5), block_size=4, max_tokens=2))
    lines = engine.finish()
    assert lines[0]["finished"] == {"big": "length"} and not any(line["aborted"] for line in lines)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_async_scheduler(tmp_path: Path, depth: int) -> None:
    engine = TracedEngine(
        tmp_path / "t.jsonl", depth, use_async=True, num_blocks=14, max_num_batched_tokens=24, **SMALL
    )
    requests = create_requests(6, num_tokens=9, block_size=4, max_tokens=14)
    for request in requests[3:]:
        request.sampling_params.stop_token_ids = list(range(0, 97, 4))
    engine.add(*requests[:4])
    for _ in range(5):
        engine.step()
    engine.scheduler.finish_requests("2", RequestStatus.FINISHED_ABORTED)
    engine.add(*requests[4:])
    lines = engine.finish()
    assert sum(line["aborted"] == ["2"] for line in lines) == 1
    assert {i for line in lines for i in line["finished"]} == {"0", "1", "3", "4", "5"}
    if depth:
        # Line k is written when step k ends, by which time step k + 1 has been scheduled.
        assert [e for e in lines[0]["events"] if e[0] in ("schedule", "update")] == [
            *[["schedule", [i]] for i in range(depth + 1)],
            ["update", [0]],
        ]


@pytest.mark.parametrize("seed", range(24))
def test_random_schedules_can_be_redrawn(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    use_async = seed % 2 == 1
    engine = TracedEngine(
        tmp_path / "t.jsonl",
        depth=rng.randint(0, 2) if use_async else 0,
        use_async=use_async,
        num_blocks=rng.randint(18, 40),
        max_num_seqs=rng.randint(2, 6),
        max_num_batched_tokens=rng.randint(8, 60),
        policy=rng.choice(["fcfs", "priority"]),
        long_prefill_token_threshold=rng.choice([0, 5]),
        **SMALL,
    )
    for now in range(80):
        if rng.random() < 0.4:
            shared = [(7 * i) % 97 for i in range(rng.randint(0, 30))]
            own = [rng.randrange(97) for _ in range(rng.randint(1, 12))]
            engine.add(
                make_request(
                    str(now),
                    shared + own,
                    block_size=4,
                    arrival_time=float(now),
                    priority=rng.randrange(3),
                    max_tokens=rng.randint(1, 20),
                )
            )
        if rng.random() < 0.1 and engine.real.requests:
            engine.scheduler.finish_requests(rng.choice(list(engine.real.requests)), RequestStatus.FINISHED_ABORTED)
        if rng.random() < 0.03:
            engine.scheduler.reset_prefix_cache(reset_running_requests=rng.random() < 0.5)
        if engine.scheduler.has_requests():
            engine.step()
    engine.finish()


@pytest.mark.badinput
def test_the_engine_refuses_a_bad_path_before_it_looks_for_the_model(tmp_path: Path) -> None:
    args = EngineArgs(model="no/such-model", step_trace_path=str(tmp_path / "none" / "t.jsonl"))
    with pytest.raises(ValueError, match=r"step_trace_path=.*cannot be written"):
        args.resolve_model_source()


def test_worker_times_are_passed_on(tmp_path: Path) -> None:
    scheduler = create_scheduler(num_blocks=8, **SMALL)
    traced = TracedScheduler(scheduler, str(tmp_path / "t.jsonl"))
    traced.add_request(make_request("a", range(5), block_size=4))
    output = traced.schedule()
    times = {"prepare_ms": 1.0, "forward_ms": 2.5, "sample_ms": 0.5}
    times |= {"prepare_cpu_ms": 0.9, "forward_cpu_ms": 2.0, "sample_cpu_ms": 0.25}
    traced.update_from_output(output, ModelRunnerOutput(["a"], {"a": 0}, [[5]], step_times=times))
    traced.shutdown()
    _, line = read(tmp_path / "t.jsonl")
    assert {part: line["ms"][part] for part in ("prepare", "forward", "sample")} == {
        "prepare": 1.0,
        "forward": 2.5,
        "sample": 0.5,
    }
    assert line["cpu_ms"]["forward"] == 2.0 and line["cpu_ms"]["sample"] == 0.25


def test_a_worker_that_keeps_the_lists_it_is_given_does_not_change_the_line(tmp_path: Path) -> None:
    traced = TracedScheduler(create_scheduler(num_blocks=8, **SMALL), str(tmp_path / "t.jsonl"))
    traced.add_request(make_request("a", range(8), block_size=4))
    for _ in range(2):
        output = traced.schedule()
        for new in output.scheduled_new_reqs:
            new.block_ids[0].append(99)
        for block_ids in output.scheduled_cached_reqs.new_block_ids:
            assert block_ids is not None
            block_ids[0].append(99)
        traced.update_from_output(output, ModelRunnerOutput(["a"], {"a": 0}, [[5]]))
    traced.shutdown()
    assert [line["requests"][0]["blocks"] for line in read(tmp_path / "t.jsonl")[1:]] == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("start", "end", "kind"),
    [(0, 5, "prefill"), (4, 5, "prefill"), (5, 6, "decode"), (5, 9, "decode"), (4, 6, "both"), (0, 9, "both")],
)
def test_kinds(start: int, end: int, kind: str) -> None:
    assert token_kind(start, end, num_prompt_tokens=5) == kind


# ---- The engine ----


def make_core(path: Path | None) -> EngineCore:
    config = make_vllm_config(max_num_batched_tokens=64, **SMALL)
    config.observability_config = ObservabilityConfig(None if path is None else str(path))
    return EngineCore(config, FakeExecutor(vocab_size=90, block_size=4))  # type: ignore[arg-type]


def test_engine_core_writes_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    core = make_core(path)
    core.add_request(EngineCoreRequest("a", list(range(9)), SamplingParams(max_tokens=3), arrival_time=0.0))
    tokens: list[int] = []
    while len(tokens) < 3:
        for output in core.step().outputs:
            tokens += output.new_token_ids
    # Idle: all lines are there already, without a shutdown.
    header, *lines = read(path)
    assert header["config"]["num_blocks"] == core.kv_cache_config.num_blocks
    assert lines[-1]["finished"] == {"a": "length"}
    core.shutdown()
    assert read(path)[1:][: len(lines)] == lines


def test_off_costs_nothing(tmp_path: Path) -> None:
    core = make_core(None)
    assert not isinstance(core.scheduler, TracedScheduler)
    assert core.scheduler.kv_cache_manager.block_pool.event_sink is None  # type: ignore[attr-defined]


def test_shutdown_takes_the_hook_off_the_pool(tmp_path: Path) -> None:
    engine = TracedEngine(tmp_path / "t.jsonl", num_blocks=8, **SMALL)
    assert engine.real.kv_cache_manager.block_pool.event_sink is not None
    engine.traced.shutdown()
    engine.traced.shutdown()
    assert engine.real.kv_cache_manager.block_pool.event_sink is None


# ---- The file ----


def test_lines_are_complete_at_exit_without_shutdown(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    program = (
        "import sys\n"
        "from folovllm.core.sched.traced_scheduler import TracedScheduler\n"
        "from tests.core_utils import create_scheduler, make_output, make_request\n"
        "traced = TracedScheduler(create_scheduler(num_blocks=8), sys.argv[1])\n"
        "traced.add_request(make_request('a', range(5), max_tokens=9))\n"
        "output = traced.schedule()\n"
        "traced.update_from_output(output, make_output(output))\n"
        "assert open(sys.argv[1]).read().count('\\n') == 1, 'not buffered'\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, timeout=60)
    assert len(read(path)) == 2


def _step(step: int) -> TracedStep:
    return TracedStep(step, 0.0, {}, {}, 0, [], [], [], {}, 0, 0, 0, [])


def test_a_full_buffer_is_written_in_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("folovllm.metrics.step_trace.FLUSH_BYTES", 1000)
    monkeypatch.setattr("folovllm.metrics.step_trace.FLUSH_SECONDS", 1e9)
    path = tmp_path / "t.jsonl"
    writer = StepTraceWriter(str(path), {})
    sizes = set()
    for step in range(30):
        writer.write(_step(step))
        sizes.add(len(read(path)))
    writer.close()
    assert len(read(path)) == 31 and 2 < len(sizes) < 15


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_trace_not_the_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = StepTraceWriter(str(tmp_path / "t.jsonl"), {})
    writer._file.close()
    writer._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    writer.write(_step(0))
    writer.flush()
    assert writer._file.closed
    writer.write(_step(1))
    writer.close()


def test_a_write_cut_short_leaves_whole_lines(tmp_path: Path) -> None:
    class Limited:
        """A file that takes `room` bytes more, then fails."""

        def __init__(self, path: Path, room: int) -> None:
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115
            self.room = room

        def write(self, data: bytes) -> int:
            if self.room == 0:
                raise OSError(28, "No space left on device")
            written = self.file.write(data[: self.room]) or 0
            self.room -= written
            return written

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    path = tmp_path / "t.jsonl"
    writer = StepTraceWriter(str(path), {})
    writer._file.close()
    writer._file = Limited(path, 250)  # type: ignore[assignment]
    for step in range(5):
        writer.write(_step(step))
    writer.flush()
    header, *lines = read(path)
    assert header["schema"] == SCHEMA and [line["step"] for line in lines] == [0]
    assert writer._file.closed


@pytest.mark.badinput
@pytest.mark.parametrize("name", ["no/such/folder/t.jsonl", "", ".", "x" * 300, "nul\0byte", "dangling"])
def test_a_bad_path_is_refused_with_the_configuration(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    with pytest.raises(ValueError, match=r"step_trace_path=.*cannot be written"):
        ObservabilityConfig(name)


@pytest.mark.badinput
def test_an_unwritable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, mode: str) -> Any:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"Permission denied.*folder that exists and is writable"):
        ObservabilityConfig(str(tmp_path / "t.jsonl"))


def test_the_check_of_the_path_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    ObservabilityConfig(str(path))
    assert not path.exists()
    path.write_text("old")
    ObservabilityConfig(str(path))
    assert path.read_text() == "old"
    StepTraceWriter(str(path), {}).close()
    assert "old" not in path.read_text()


def test_command_line_flag(tmp_path: Path) -> None:
    import argparse

    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    args = EngineArgs.from_cli_args(parser.parse_args(["--step-trace", "t.jsonl"]))
    assert args.step_trace_path == "t.jsonl"
    assert EngineArgs.from_cli_args(parser.parse_args([])).step_trace_path is None


def test_no_trace_by_default() -> None:
    config = VllmConfig(ModelConfig("fake", hf_config={"max_position_embeddings": 64}))
    assert config.observability_config.step_trace_path is None


# ---- Its document ----


def test_the_document_shows_real_lines_and_names_every_field() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "step_trace.md").read_text(encoding="utf-8")
    header, step = (json.loads(line) for line in text.splitlines() if line.startswith("{"))
    assert (header["schema"], header["version"]) == (SCHEMA, VERSION)
    assert msgspec.json.decode(json.dumps(step), type=TracedStep, strict=True).step == step["step"]
    assert list(step) == list(TracedStep.__struct_fields__)
    fields = {*TracedStep.__struct_fields__, *TracedRequest.__struct_fields__}
    kinds = {"allocate", "hit", "cache", "evict", "release", "free", "reset", "schedule", "update"}
    assert {name for name in fields | kinds if f"`{name}`" not in text} == set()
