"""Figures, a table and a picture from the records of `folovllm bench serve`; nothing is measured here.

TTFT   sent to first event with text
TPOT   first to last event, divided by the tokens after the first; one value per request
ITL    between two events of a request; all gaps of all requests together, so a single stall shows
E2E    sent to the end of the answer

Goodput: requests per second that met every objective. A failed request met none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from folovllm.benchmarks.metrics import percentile
from folovllm.benchmarks.serve_client import ServeRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OBJECTIVES = ("ttft", "tpot", "e2el")
"""What --goodput may bound, in milliseconds; vLLM's names."""
LATENCIES = {"ttft": "Time to first token", "tpot": "Time per output token", "itl": "Inter-token latency", "e2e": "E2E"}
"""Name in the figures -> heading in the table."""
PLOT_FORMATS = (".png", ".svg", ".pdf")
"""Endings that --plot takes."""


@dataclass(frozen=True)
class ServeFigures:
    """What a run says."""

    figures: dict[str, float]
    """Metric -> value; latencies as in `ttft_p99_ms`, `itl_mean_ms`."""
    failures: dict[str, int] = field(default_factory=dict)
    """Error text -> requests that failed with it."""


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """Return objective -> milliseconds from words like "ttft:500".

    Raises:
        ValueError: not such a word.
    """
    objectives = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if name not in OBJECTIVES or not limit > 0:
            raise ValueError(f"--goodput {pair!r}: expected NAME:MILLISECONDS with a name of {', '.join(OBJECTIVES)}.")
        objectives[name] = limit
    return objectives


def meets(record: ServeRecord, objectives: dict[str, float]) -> bool:
    """Whether a request met every objective; one without a second token has no TPOT to miss."""
    if record.error is not None:
        return False
    values = {"ttft": record.ttft_s, "tpot": record.tpot_s, "e2el": record.e2e_s}
    return all((value := values[name]) is None or value * 1e3 <= limit for name, limit in objectives.items())


def make_figures(
    records: Sequence[ServeRecord], percents: Sequence[float], objectives: dict[str, float]
) -> ServeFigures:
    """Return the figures of a run. Latencies without a sample are left out."""
    done = [record for record in records if record.error is None]
    duration = max(r.ended for r in records) - min(r.sent for r in records) if records else 0.0
    output_tokens = sum(record.num_tokens for record in done)
    prompt_tokens = sum(record.num_prompt_tokens or 0 for record in done)
    figures: dict[str, float] = {
        "completed": len(done),
        "failed": len(records) - len(done),
        "duration_s": duration,
        "prompt_tokens": prompt_tokens,
        "cached_tokens": sum(record.num_cached_tokens for record in done),
        "output_tokens": output_tokens,
        "peak_concurrency": peak_concurrency(records),
    }
    if duration > 0:
        figures["requests_s"] = len(done) / duration
        figures["output_tok_s"] = output_tokens / duration
        figures["total_tok_s"] = (output_tokens + prompt_tokens) / duration
        if objectives:
            figures["goodput_requests_s"] = sum(meets(record, objectives) for record in records) / duration
    for name, values in latencies(done).items():
        if values:
            figures[f"{name}_mean_ms"] = sum(values) / len(values) * 1e3
            figures.update({f"{name}_p{p:g}_ms": percentile(values, p) * 1e3 for p in percents})
    return ServeFigures(figures, dict(Counter(record.error for record in records if record.error).most_common()))


def latencies(done: Sequence[ServeRecord]) -> dict[str, list[float]]:
    """Return the samples of each of LATENCIES, in seconds."""
    return {
        "ttft": [value for record in done if (value := record.ttft_s) is not None],
        "tpot": [value for record in done if (value := record.tpot_s) is not None],
        "itl": [value for record in done for value in record.itls_s],
        "e2e": [record.e2e_s for record in done],
    }


def concurrency(records: Sequence[ServeRecord]) -> list[tuple[float, int]]:
    """Return (time, requests under way from then on), in the order of time."""
    changes = sorted([(record.sent, 1) for record in records] + [(record.ended, -1) for record in records])
    running, states = 0, []
    for time_s, change in changes:
        running += change
        states.append((time_s, running))
    return states


def peak_concurrency(records: Sequence[ServeRecord]) -> int:
    """Return the most requests that were under way at once."""
    return max((running for _, running in concurrency(records)), default=0)


def format_table(result: ServeFigures, percents: Sequence[float], objectives: dict[str, float]) -> str:
    """Return what the command prints: one figure a line, as `vllm bench serve` does."""
    figures = result.figures
    lines = ["{s:{c}^{n}}".format(s=" Serving benchmark ", n=58, c="=")]

    def add(label: str, name: str, digits: int = 0) -> None:
        if name in figures:
            lines.append(f"{label + ':':<42}{figures[name]:>16.{digits}f}")

    add("Successful requests", "completed")
    add("Failed requests", "failed")
    lines += [f"  {count} x {error}" for error, count in result.failures.items()]
    add("Duration (s)", "duration_s", 2)
    add("Peak concurrent requests", "peak_concurrency")
    add("Prompt tokens", "prompt_tokens")
    add("  of them cached by the server", "cached_tokens")
    add("Output tokens", "output_tokens")
    add("Request throughput (req/s)", "requests_s", 2)
    if objectives:
        bounds = " ".join(f"{name}:{limit:g}" for name, limit in objectives.items())
        add(f"Goodput (req/s), {bounds}", "goodput_requests_s", 2)
    add("Output token throughput (tok/s)", "output_tok_s", 2)
    add("Total token throughput (tok/s)", "total_tok_s", 2)
    for name, title in LATENCIES.items():
        if f"{name}_mean_ms" in figures:
            lines.append(f"{f' {title} (ms) ':-^58}")
            add(f"Mean {name.upper()}", f"{name}_mean_ms", 2)
            for percent in percents:
                add(f"P{percent:g} {name.upper()}", f"{name}_p{percent:g}_ms", 2)
    return "\n".join([*lines, "=" * 58])


def plot(path: str, records: Sequence[ServeRecord], title: str) -> None:
    """Draw latencies, throughput and concurrency into a file whose ending is one of PLOT_FORMATS."""
    from matplotlib.figure import Figure

    done = [record for record in records if record.error is None]
    start = min(record.sent for record in records)
    samples = latencies(done)
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 2)
    _draw_cdf(axes[0, 0], samples["ttft"], "time to first token (ms)")
    _draw_cdf(axes[0, 1], samples["itl"], "inter-token latency (ms)")
    states = concurrency(records)
    axes[1, 0].step([time_s - start for time_s, _ in states], [running for _, running in states], where="post")
    axes[1, 0].set(xlabel="seconds", ylabel="requests under way", ylim=(0, None))
    events = [time_s - start for record in done for time_s in record.event_times]
    if events:
        num_bins = 60
        axes[1, 1].hist(events, bins=num_bins, weights=[num_bins / (max(events) or 1.0)] * len(events))
    axes[1, 1].set(xlabel="seconds", ylabel="events with text per second")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(Path(path), dpi=120)


def _draw_cdf(axis: Axes, seconds: Sequence[float], label: str) -> None:
    """Draw the share of samples that are no longer than x; the longest ones set no scale."""
    ordered = sorted(value * 1e3 for value in seconds)
    axis.step(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], where="post")
    for percent in (50, 99):
        if ordered:
            value = percentile(ordered, percent)
            axis.axvline(value, color="tab:gray", linestyle=":")
            axis.annotate(f"p{percent} {value:.1f}", (value, 0.02), rotation=90, ha="right", fontsize=8)
    axis.set(xlabel=label, ylabel="share of samples", ylim=(0, 1.01), xlim=(0, None))
