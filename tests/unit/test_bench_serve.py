"""`folovllm bench serve` against a server whose times, failures and counts are known."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path

import pytest

from folovllm.benchmarks import serve
from folovllm.benchmarks.schema import read_result
from folovllm.benchmarks.serve_client import ServeClient, ServeRecord, ServeRequest
from folovllm.benchmarks.serve_report import (
    ServeFigures,
    concurrency,
    format_table,
    make_figures,
    parse_goodput,
    peak_concurrency,
    plot,
)
from folovllm.benchmarks.serve_workload import RandomRequests, arrival_times, read_requests
from tests.stub_openai_server import Stub, serving

pytest.importorskip("aiohttp")
TIMEOUT_S = 30


def run_command(stub: Stub, argv: Sequence[str]) -> int:
    """Run the command against `stub`, in another thread; return its exit code."""
    parser = argparse.ArgumentParser()
    serve.add_args(parser)

    async def main() -> int:
        async with serving(stub) as url:
            args = parser.parse_args(["--base-url", url, *argv])
            return await asyncio.wait_for(asyncio.to_thread(serve.run, args), TIMEOUT_S)

    return asyncio.run(main())


def send(stub: Stub, requests: Sequence[ServeRequest], chat: bool = False, **options: object) -> list[ServeRecord]:
    """Send `requests` one after the other."""

    async def main() -> list[ServeRecord]:
        async with serving(stub) as url:
            endpoint = serve.CHAT_ENDPOINT if chat else serve.COMPLETIONS_ENDPOINT
            async with ServeClient(url, endpoint, "stub", timeout_s=5.0, **options) as client:  # type: ignore[arg-type]
                return [await client.send(request) for request in requests]

    return asyncio.run(asyncio.wait_for(main(), TIMEOUT_S))


@pytest.mark.parametrize("chat", [False, True])
def test_a_record_is_what_happened(chat: bool) -> None:
    stub = Stub(delay_s=0.02, first_delay_s=0.1)
    (record,) = send(stub, [ServeRequest("hello", 5)], chat)
    assert record.error is None
    assert (record.num_prompt_tokens, record.num_output_tokens, record.num_tokens) == (7, 5, 5)
    assert len(record.event_times) == 5 and record.event_times == sorted(record.event_times)
    assert record.ttft_s is not None and 0.11 < record.ttft_s < 2
    assert record.tpot_s is not None and 0.018 < record.tpot_s < 0.5
    assert len(record.itls_s) == 4
    assert record.e2e_s >= 0.1 + 5 * 0.02
    body = stub.requests[0]
    assert body["max_tokens"] == 5 and body["stream"] is True and body["model"] == "stub"
    assert body["messages"] == [{"role": "user", "content": "hello"}] if chat else body["prompt"] == "hello"


def test_tokens_are_the_servers_count() -> None:
    """An event may have several tokens; only where no usage comes are events counted."""
    (record,) = send(Stub(tokens_per_chunk=4, delay_s=0.02), [ServeRequest([1, 2], 8)])
    assert len(record.event_times) == 2 and record.num_tokens == 8
    assert record.tpot_s == pytest.approx(record.itls_s[0] / 7)
    (record,) = send(Stub(tokens_per_chunk=4, send_usage=False), [ServeRequest([1, 2], 8)])
    assert record.num_output_tokens is None and record.num_tokens == 2


def test_failures_are_named() -> None:
    records = send(Stub(fail_every=2), [ServeRequest([1], 8)] * 4)
    assert [record.error for record in records] == [
        None,
        "status 500: scripted failure",
        records[2].error,
        "status 500: scripted failure",
    ]
    assert records[2].error is not None and "Payload" in records[2].error
    figures = make_figures(records, [50], {})
    assert figures.figures["completed"] == 1 and figures.figures["failed"] == 3
    assert figures.failures["status 500: scripted failure"] == 2
    assert "2 x status 500: scripted failure" in format_table(figures, [50], {})


def test_an_answer_without_its_end_has_failed() -> None:
    (record,) = send(Stub(send_done=False), [ServeRequest([1], 8)])
    assert record.error == "the answer broke off: no [DONE]" and len(record.event_times) == 8


def test_a_request_that_takes_too_long_fails() -> None:
    async def main() -> ServeRecord:
        async with serving(Stub(delay_s=10)) as url, ServeClient(url, "/v1/completions", "m", timeout_s=0.2) as client:
            return await client.send(ServeRequest("x", 2))

    record = asyncio.run(asyncio.wait_for(main(), TIMEOUT_S))
    assert record.error is not None and "Timeout" in record.error and record.e2e_s < 5


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stub = Stub(delay_s=0.005)
    files = {name: tmp_path / f"out.{name}" for name in ("json", "jsonl", "png")}
    argv = ["--num-prompts", "12", "--max-concurrency", "3", "--output-len", "6", "--input-len", "9", "--ignore-eos"]
    argv += ["--goodput", "ttft:5000", "--num-warmups", "2", "--extra-body", '{"top_k": 3}', "--api-key", "secret-1"]
    argv += ["--save-result", str(files["json"]), "--save-detailed", str(files["jsonl"]), "--plot", str(files["png"])]
    code = run_command(stub, argv)
    assert code == 0
    assert len(stub.requests) == 14 and stub.max_running == 3
    body = stub.requests[-1]
    assert len(body["prompt"]) == 9 and body["max_tokens"] == 6 and body["ignore_eos"] is True and body["top_k"] == 3
    assert len({str(request["prompt"]) for request in stub.requests}) == 14
    result = read_result(files["json"])
    figures = {name: figure.median for name, figure in result.entries[0].workloads["random"].items()}
    assert result.kind == "serve" and figures["completed"] == 12 and figures["peak_concurrency"] == 3
    assert figures["goodput_requests_s"] == pytest.approx(figures["requests_s"])
    assert figures["itl_p50_ms"] >= 5
    assert "secret-1" not in files["json"].read_text()
    records = [json.loads(line) for line in files["jsonl"].read_text().splitlines()]
    assert len(records) == 12 and all(len(record["event_times"]) == 6 for record in records)
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for words in ("Successful requests:", "P99 TTFT", "P50 TPOT", "P90 ITL", "Goodput (req/s), ttft:5000"):
        assert words in printed


def test_the_exit_code_says_that_requests_failed(capsys: pytest.CaptureFixture[str]) -> None:
    code = run_command(Stub(fail_every=4), ["--num-prompts", "4", "--output-len", "3", "--max-concurrency", "1"])
    assert code == 1
    assert "1 x status 500: scripted failure" in capsys.readouterr().out


def test_chat_prompts_are_words() -> None:
    stub = Stub()
    argv = ["--num-prompts", "2", "--output-len", "2", "--input-len", "5", "--endpoint", "/v1/chat/completions"]
    code = run_command(stub, argv)
    assert code == 0
    assert all(len(request["messages"][0]["content"].split()) == 5 for request in stub.requests)


def test_rates_are_kept() -> None:
    stub = Stub()
    args = ["--num-prompts", "40", "--output-len", "1", "--request-rate", "80", "--burstiness", "1000"]
    parser = argparse.ArgumentParser()
    serve.add_args(parser)

    async def main() -> list[ServeRecord]:
        async with serving(stub) as url:
            records, _, _ = await serve._measure(parser.parse_args(["--base-url", url, *args]))
            return records

    records = asyncio.run(asyncio.wait_for(main(), TIMEOUT_S))
    assert records[-1].sent - records[0].sent == pytest.approx(39 / 80, rel=0.3)


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (4.0, 0.5)])
def test_arrivals(burstiness: float, spread: float) -> None:
    times = list(islice(arrival_times(50.0, burstiness, 3), 20_000))
    gaps = [later - sooner for sooner, later in pairwise(times)]
    assert times[0] == 0 and statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(spread, rel=0.05)
    assert list(islice(arrival_times(50.0, burstiness, 3), 9)) == times[:9]
    assert list(islice(arrival_times(50.0, burstiness, 4), 9)) != times[:9]
    assert list(islice(arrival_times(float("inf"), burstiness, 3), 3)) == [0, 0, 0]


def test_random_requests() -> None:
    options = {"input_len": 20, "output_len": 10, "range_ratio": 0.5, "prefix_len": 6, "num_prefixes": 2}
    requests = RandomRequests(1, **options).take(200)  # type: ignore[arg-type]
    assert requests == RandomRequests(1, **options).take(200) != RandomRequests(2, **options).take(200)  # type: ignore
    assert len({tuple(request.prompt[:6]) for request in requests}) == 2
    assert {len(request.prompt) - 6 for request in requests} == set(range(10, 31))
    assert {request.max_tokens for request in requests} == set(range(5, 16))


def test_requests_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b", "output_tokens": 3}\n', encoding="utf-8")
    expected = [ServeRequest("a", 7), ServeRequest("b", 3), ServeRequest("a", 7)]
    assert read_requests(str(path), 3, 7) == expected
    for text in ("", "x\n", "[1]\n", '{"text": "a"}\n', '{"prompt": 1}\n', '{"prompt": "a", "output_tokens": 0}\n'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="--dataset-path"):
            read_requests(str(path), 1, 7)


def record(sent: float, events: Sequence[float], error: str | None = None) -> ServeRecord:
    return ServeRecord(
        sent=sent, max_tokens=9, event_times=list(events), ended=events[-1], num_prompt_tokens=10, error=error
    )


def test_figures() -> None:
    records = [record(0.0, [1.0, 1.5, 2.0]), record(1.0, [1.25, 3.25]), record(2.0, [4.0], error="broken")]
    figures = make_figures(records, [50], {"ttft": 500.0}).figures
    assert figures["duration_s"] == 4 and figures["output_tokens"] == 5 and figures["prompt_tokens"] == 20
    assert (
        figures["output_tok_s"] == 5 / 4 and figures["requests_s"] == 2 / 4 and figures["goodput_requests_s"] == 1 / 4
    )
    assert figures["ttft_mean_ms"] == 625 and figures["tpot_mean_ms"] == 1250
    assert figures["itl_mean_ms"] == 1000 and figures["itl_p50_ms"] == 500 and figures["e2e_p50_ms"] == 2125
    assert concurrency(records) == [(0.0, 1), (1.0, 2), (2.0, 1), (2.0, 2), (3.25, 1), (4.0, 0)]
    assert peak_concurrency(records) == 2
    only_failures = make_figures([record(0.0, [1.0], error="x")], [50], {})
    assert only_failures == ServeFigures(only_failures.figures, {"x": 1})
    assert not [name for name in only_failures.figures if name.endswith("_ms")]


def test_goodput() -> None:
    assert parse_goodput(["ttft:500", "tpot:50.5"]) == {"ttft": 500.0, "tpot": 50.5}
    for word in ("ttft", "ttft:", "ttft:0", "ttft:nan", "itl:5", "ttft:-1"):
        with pytest.raises(ValueError, match="--goodput"):
            parse_goodput([word])
    records = [record(0.0, [0.1, 0.2]), record(0.0, [0.1, 0.9]), record(0.0, [0.1])]
    assert make_figures(records, [], {"tpot": 200.0}).figures["goodput_requests_s"] == pytest.approx(2 / 0.9)


def test_a_plot_of_failures_only(tmp_path: Path) -> None:
    plot(str(tmp_path / "a.svg"), [record(0.0, [1.0], error="x")], "title")
    assert (tmp_path / "a.svg").stat().st_size > 1000


@pytest.mark.badinput
@pytest.mark.parametrize(
    "argv",
    [
        ["--num-prompts", "0"],
        ["--max-concurrency", "0"],
        ["--request-rate", "0"],
        ["--request-rate", "nan"],
        ["--burstiness", "-1"],
        ["--random-range-ratio", "2"],
        ["--dataset-name", "custom"],
        ["--dataset-name", "random", "--dataset-path", "x"],
        ["--plot", "x.gif"],
        ["--metric-percentiles", "50,x"],
        ["--metric-percentiles", "101"],
        ["--goodput", "x:1"],
        ["--extra-body", "{"],
        ["--extra-body", "[]"],
        ["--base-url", "http://127.0.0.1:9"],
    ],
)
def test_bad_flags(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    serve.add_args(parser)
    with pytest.raises(ValueError, match=f"^{argv[0]}"):
        serve.run(parser.parse_args(argv))
