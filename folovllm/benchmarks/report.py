"""A ladder's result as Markdown: one table of all rungs, then what each idea is for. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from folovllm.benchmarks.machine import machine_line
from folovllm.benchmarks.metrics import DESCRIPTIONS
from folovllm.benchmarks.schema import BenchmarkResult, Entry, Figure

MAIN_COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("TTFT p50 / p99, ms", ("ttft_p50_ms", "ttft_p99_ms")),
    ("TPOT, ms", ("tpot_p50_ms",)),
    ("ITL p99, ms", ("itl_p99_ms",)),
    ("batch mean / peak", ("mean_batch", "peak_batch")),
    ("KV use", ("kv_use",)),
    ("KV waste", ("kv_waste",)),
    ("host, ms a step", ("host_ms",)),
    ("device, ms a step", ("device_ms",)),
    ("roofline", ("roofline",)),
)
"""Columns of the main table, of the workload "mixed": heading, metrics."""
PERCENTAGES = {"kv_use", "kv_use_peak", "kv_waste", "hit_rate", "roofline"}

QUESTIONS: tuple[tuple[str, str, tuple[str, str], tuple[tuple[str, str, str], ...]], ...] = (
    (
        "Paged KV cache",
        "The same memory for keys and values, all requests at once.",
        ("m2", "m3"),
        (
            ("mixed", "peak_batch", "most requests that ran at once"),
            ("mixed", "kv_waste", "reserved bytes that held nothing"),
            ("mixed", "output_tok_s", "output tokens/s"),
        ),
    ),
    (
        "Chunked prefill",
        "Streams are running when long prompts arrive.",
        ("m4", "m5"),
        (
            ("arrivals", "stream.itl_p99_ms", "inter-token latency of the streams, p99, ms"),
            ("arrivals", "stream.itl_p50_ms", "the same, p50, ms"),
            ("arrivals", "long.ttft_p50_ms", "TTFT of the long prompts, p50, ms"),
        ),
    ),
    (
        "Prefix caching",
        "Prompts that begin alike (`shared`), and conversations (`chat`).",
        ("m5", "m6"),
        (
            ("shared", "warm.ttft_p50_ms", "shared: TTFT of all but the first, p50, ms"),
            ("shared", "warm.hit_rate", "shared: their prompt tokens found"),
            ("chat", "later.ttft_p50_ms", "chat: TTFT of later turns, p50, ms"),
            ("chat", "later.hit_rate", "chat: their prompt tokens found"),
        ),
    ),
    (
        "Overlap",
        "Time between steps that the device does not wait for.",
        ("before overlap", "overlap"),
        (
            ("mixed", "step_ms", "a step, ms"),
            ("mixed", "output_tok_s", "output tokens/s"),
        ),
    ),
    (
        "GPTQ",
        "One request alone (`single`) reads all weights for each token.",
        ("overlap", "m7"),
        (
            ("", "weights_gib", "weights, GiB"),
            ("single", "tpot_p50_ms", "time per output token, ms"),
            ("mixed", "output_tok_s", "output tokens/s, all requests"),
            ("", "perplexity", "perplexity"),
        ),
    ),
)
"""Title, situation, rungs without and with the idea, (workload or "" for the process, metric, wording)."""


def show(value: float, metric: str = "") -> str:
    """Return a number with about three digits, as a percentage where the metric is a share."""
    if metric.rpartition(".")[2] in PERCENTAGES:
        return f"{value * 100:.1f}%"
    size = abs(value)
    if size >= 10 and float(value).is_integer():
        return f"{value:.0f}"
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3g}"


def spread(figure: Figure, metric: str = "") -> str:
    """Return "median (min to max)", the median alone where all are the same."""
    median, low, high = (show(value, metric) for value in (figure.median, figure.min, figure.max))
    return median if low == high else f"{median} ({low} to {high})"


def main_table(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield the lines of the table of all rungs, on "mixed"."""
    headings = ["", "output tokens/s", "times the first", *(h for h, _ in MAIN_COLUMNS), "peak memory, GiB"]
    yield "| " + " | ".join(headings) + " |"
    yield "|---" + "|---:" * (len(headings) - 1) + "|"
    base = None
    for entry in entries:
        figures = entry.workloads.get("mixed", {})
        if "output_tok_s" not in figures:
            continue
        rate = figures["output_tok_s"]
        base = base or rate.median
        name = entry.title if entry.engine == "folovllm" else f"*{entry.engine}*"
        cells = [name, spread(rate), f"{rate.median / base:.2f}"]
        for _, metrics in MAIN_COLUMNS:
            cells.append(" / ".join(show(figures[m].median, m) for m in metrics if m in figures))
        yield "| " + " | ".join([*cells, _peak_memory(entry)]) + " |"


PEAKS = ("peak_host_gib", "peak_device_gib")
"""Metrics of the last column, the second on CUDA alone."""


def _peak_memory(entry: Entry) -> str:
    found = [entry.process.get(metric) for metric in PEAKS]
    return " + ".join(show(figure.median) for figure in found if figure is not None)


def question_tables(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield, idea by idea, what it changes between two rungs; ideas of which a rung is missing are left out."""
    by_name = {entry.name: entry for entry in entries}
    order = [entry.name for entry in entries]
    for title, situation, (before, after), rows in QUESTIONS:
        if before == "before overlap":
            before = order[order.index(after) - 1] if after in order and order.index(after) else ""
        if before not in by_name or after not in by_name:
            continue
        lines = []
        for workload, metric, wording in rows:
            pair = [_find(by_name[name], workload, metric) for name in (before, after)]
            if pair[0] is not None and pair[1] is not None:
                lines.append(f"| {wording} | {spread(pair[0], metric)} | {spread(pair[1], metric)} |")
        if lines:
            yield from ("", f"### {title}", "", situation, "")
            yield f"| | {by_name[before].title} | {by_name[after].title} |"
            yield "|---|---:|---:|"
            yield from lines


def _find(entry: Entry, workload: str, metric: str) -> Figure | None:
    figures = entry.workloads.get(workload, {}) if workload else entry.process
    return figures.get(metric)


def _notes(result: BenchmarkResult, rounds: int) -> Iterator[str]:
    """Yield a line for every entry, and for all that is missing."""
    for entry in result.entries:
        done = max(
            (len(figure.values) for figures in entry.workloads.values() for figure in figures.values()), default=0
        )
        notes = [*entry.notes, *([f"{done} of {rounds} rounds."] if done < rounds else [])]
        if entry.idea:
            yield f"- **{entry.title}**: {entry.idea}." + "".join(f" {note}" for note in notes)
    measured = {entry.name for entry in result.entries}
    for name, reason in result.skipped.items():
        yield f"- *{name}* was left out{' of later rounds' if name in measured else ''}: {reason}."


def model_name(settings: dict[str, Any]) -> str:
    """Return the model's name, with a word on random weights."""
    return f"{settings['model']}" + (", random weights" if settings.get("load_format") == "dummy" else "")


def markdown(result: BenchmarkResult, pictures: Sequence[str] = ()) -> str:
    """Return the whole report; `pictures` are file names beside it."""
    settings = result.settings
    rounds = settings.get("rounds", 1)
    lines = [f"# The ladder: {model_name(settings)} on {result.machine.device if result.machine else '?'}", ""]
    if result.machine is not None:
        lines += [machine_line(result.machine) + ".", ""]
    lines += [
        f"Made by `{' '.join(result.command)}`. "
        + (f"Medians of {rounds} rounds (minimum to maximum), rungs taking turns" if rounds > 1 else "One round")
        + "; each run in a process of its own, after untimed requests.",
        "",
    ]
    if result.interrupted:
        lines += ["**Interrupted**: what is here was finished before.", ""]
    if pictures:
        lines += [f"![{_stem(name)}]({name})" for name in pictures[:1]] + [""]
    lines += [*main_table(result.entries), ""]
    lines += _notes(result, rounds)
    lines += [*question_tables(result.entries), ""]
    lines += [f"![{_stem(name)}]({name})" for name in pictures[1:]]
    lines += ["", "Pictures of what happened over time show the round with the median throughput."] if pictures else []
    used = {metric for _, metrics in MAIN_COLUMNS for metric in metrics} | {"output_tok_s"}
    used |= {metric for metric in PEAKS for entry in result.entries if metric in entry.process}
    lines += ["", "## What the columns mean", ""]
    lines += [f"- `{name}`: {meaning}" for name, (_, meaning, _) in DESCRIPTIONS.items() if name in used]
    return "\n".join(lines) + "\n"


def _stem(name: str) -> str:
    return name.rpartition(".")[0]
