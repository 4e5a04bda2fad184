"""The ladder's pictures, PNG and SVG: bars, latency distributions, KV cache over time, who ran in which step.

Drawn from the raw events of one run per rung (the round with the median throughput), bars from the figures. matplotlib
is imported when something is drawn: `pip install "folovllm[bench]"`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folovllm.benchmarks.metrics import (
    computing_steps,
    inter_token_latencies,
    kv_states,
    percentile,
    step_seconds,
    ttfts,
)
from folovllm.benchmarks.report import model_name
from folovllm.benchmarks.schema import BenchmarkResult, Entry, RequestRecord, RunRecord, WorkloadRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, PEER = "#2f6db5", "#8a939e"
DECODE, PREFILL, WAITS, WASTE = "#2f6db5", "#e08a1e", "#ececec", "#e9c9a1"
STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "folovllm",
    "svg.fonttype": "none",
}
MAX_KV_POINTS = 300
"""Steps drawn of each rung's KV cache: more is finer than a pixel, and a large SVG."""
MAX_GANTT_ROWS = 40
"""More requests than this are not told apart."""


def check_installed() -> None:
    """Raise ValueError where matplotlib, or something that it needs, is not installed."""
    try:
        importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ValueError(
            f'The pictures need matplotlib ({error}): pip install "folovllm[bench]", or give --no-plots.'
        ) from error


def draw_all(result: BenchmarkResult, records: Mapping[str, Sequence[RunRecord]], folder: Path) -> list[str]:
    """Draw what there is data for into `folder`; return the names of the PNG files.

    Raises:
        ValueError: matplotlib is not installed.
    """
    check_installed()
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")  # no window, no display
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    runs = {name: typical_run(result, name, runs) for name, runs in records.items()}
    drawings: dict[str, Callable[[], Figure | None]] = {
        "ladder": lambda: draw_ladder(result.entries, _subtitle(result)),
        "latency": lambda: draw_latencies(result.entries, runs),
        "kv_cache": lambda: draw_kv_cache(result.entries, runs),
        "gantt": lambda: draw_gantt(result.entries, runs),
    }
    names = []
    with matplotlib.rc_context(STYLE):
        for name, draw in drawings.items():
            figure = draw()
            if figure is None:
                continue
            for suffix in ("png", "svg"):
                metadata = {"Date": None} if suffix == "svg" else None
                figure.savefig(folder / f"{name}.{suffix}", dpi=130, bbox_inches="tight", metadata=metadata)
            pyplot.close(figure)
            names.append(f"{name}.png")
    return names


def _subtitle(result: BenchmarkResult) -> str:
    machine = result.machine
    assert machine is not None
    where = machine.device_name if machine.device == "cuda" else f"{machine.cores} cores of {machine.device_name}"
    return f"{model_name(result.settings)}, {machine.dtype}, {where}"


def typical_run(result: BenchmarkResult, name: str, runs: Sequence[RunRecord]) -> RunRecord:
    """Return the run whose throughput is nearest to the median of its rung."""
    for entry in result.entries:
        figure = entry.workloads.get("mixed", {}).get("output_tok_s") if entry.name == name else None
        if figure is not None:
            return runs[min(range(len(runs)), key=lambda i: abs(figure.values[i] - figure.median))]
    return runs[0]


def _workload(run: RunRecord | None, name: str) -> WorkloadRecord | None:
    if run is None:
        return None
    return next((record for record in run.workloads if record.name == name), None)


def draw_ladder(entries: Sequence[Entry], subtitle: str) -> Figure | None:
    """Bars of output tokens per second, rung by rung, peers below; whiskers from the slowest to the fastest round."""
    import matplotlib.pyplot as plt

    shown = [entry for entry in entries if "output_tok_s" in entry.workloads.get("mixed", {})]
    if not shown:
        return None
    figures = [entry.workloads["mixed"]["output_tok_s"] for entry in shown]
    medians = [figure.median for figure in figures]
    figure, axes = plt.subplots(figsize=(9, 0.46 * len(shown) + 1.3))
    ours = [entry.engine == "folovllm" for entry in shown]
    axes.barh(range(len(shown)), medians, color=[OURS if own else PEER for own in ours], height=0.68)
    if len(figures[0].values) > 1:
        spread = [[f.median - f.min for f in figures], [f.max - f.median for f in figures]]
        axes.errorbar(medians, range(len(shown)), xerr=spread, fmt="none", ecolor="#333333", capsize=3, linewidth=1)
    for row, f in enumerate(figures):
        factor = f"   {f.median / medians[0]:.1f}x" if row and shown[0].engine == "folovllm" else ""
        axes.text(f.max + 0.012 * max(medians), row, f"{f.median:.0f}{factor}", va="center")
    axes.set_yticks(range(len(shown)), [e.title if own else e.engine for e, own in zip(shown, ours, strict=True)])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * max(f.max for f in figures))
    axes.set_xlabel("output tokens per second, all requests at once")
    axes.set_title(f"What each idea buys\n{subtitle}", fontsize=11)
    return figure


LATENCY_COLORS = {
    "m1": "#7f2704",
    "m2": "#d94801",
    "m3": "#fdae6b",
    "m4": "#6a51a3",
    "m5": "#2f6db5",
    "kernels": "#41ab5d",
    "graphs": "#41ab5d",
    "m7": "#00441b",
}
"""Rungs whose latencies are drawn: the others' curves would lie on their neighbours'."""
PEER_STYLES = {"transformers": "--", "vllm": ":"}
LATENCY_PANELS: tuple[tuple[str, str, str | None, Callable[[list[RequestRecord]], list[float]]], ...] = (
    ("Time to first token", "mixed", None, ttfts),
    ("Between two tokens", "mixed", None, inter_token_latencies),
    ("Between two tokens of streams\nwhile long prompts arrive", "arrivals", "stream", inter_token_latencies),
)
"""Title, workload, group of requests (None: all), seconds of the requests."""


def draw_latencies(entries: Sequence[Entry], runs: Mapping[str, RunRecord]) -> Figure | None:
    """Cumulative distributions: TTFT and inter-token latency of "mixed", and the streams of "arrivals"."""
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    panels = [
        (title, curves)
        for title, workload, group, seconds_of in LATENCY_PANELS
        if (curves := list(_curves(entries, runs, workload, group, seconds_of)))
    ]
    if not panels:
        return None
    figure, all_axes = plt.subplots(1, len(panels), figsize=(4.9 * len(panels), 4.2), sharey=True, squeeze=False)
    for axes, (title, curves) in zip(all_axes[0], panels, strict=True):
        for label, color, seconds in curves:
            ordered = sorted(1e3 * value for value in seconds)
            share = [i / len(ordered) for i in range(len(ordered) + 1)]
            style = "-" if color != PEER else PEER_STYLES.get(label.partition(" ")[0], "-.")
            axes.step(
                [ordered[0], *ordered], share, where="post", label=label, color=color, linestyle=style, linewidth=2
            )
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        # Over many decades labels of 2 and 5 would touch.
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 100 * low else (1, 3)))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_title(title)
        axes.set_xlabel("ms (log scale)")
        axes.grid(alpha=0.25)
        if all_axes.size > 1:
            axes.set_xlim(left=max(axes.get_xlim()[0], _low(curves)))
    all_axes[0][0].set_ylabel("share at or below")
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, frameon=False)
    figure.tight_layout()
    return figure


Curve = tuple[str, str, list[float]]
"""Label, color, seconds."""


def _curves(
    entries: Sequence[Entry],
    runs: Mapping[str, RunRecord],
    workload: str,
    group: str | None,
    seconds_of: Callable[[list[RequestRecord]], list[float]],
) -> Iterator[Curve]:
    for entry in entries:
        record = _workload(runs.get(entry.name), workload)
        ours = entry.engine == "folovllm"
        if record is None or (ours and entry.name not in LATENCY_COLORS):
            continue
        seconds = seconds_of([request for request in record.requests if group in (None, request.group)])
        if seconds:
            yield entry.title if ours else entry.engine, LATENCY_COLORS.get(entry.name, PEER), seconds


def _low(curves: Sequence[Curve]) -> float:
    """Where the axis begins, in ms: two outputs that come together when an engine runs dry would stretch it."""
    return 0.7e3 * min(percentile(seconds, 2) for _, _, seconds in curves)


def draw_kv_cache(entries: Sequence[Entry], runs: Mapping[str, RunRecord]) -> Figure | None:
    """Reserved and stored tokens over time, for the rungs with a contiguous and with a paged cache."""
    import matplotlib.pyplot as plt

    panels = []
    for entry in entries:
        record = _workload(runs.get(entry.name), "mixed")
        if entry.name in ("m1", "m2", "m3") and record is not None and record.steps:
            panels.append((entry, record))
    if not panels:
        return None
    figure, all_axes = plt.subplots(1, len(panels), figsize=(4.9 * len(panels), 3.4), sharey=True, squeeze=False)
    for axes, (entry, record) in zip(all_axes[0], panels, strict=True):
        states = kv_states(record)
        states = [*states[:: 1 + len(states) // MAX_KV_POINTS], states[-1]]
        start = states[0].time
        times = [state.time - start for state in states] + [states[-1].time + states[-1].seconds - start]
        stored = [100 * state.stored / state.pool for state in states]
        reserved = [100 * state.reserved / state.pool for state in states]
        axes.fill_between(times, [*reserved, reserved[-1]], step="post", color=WASTE, label="reserved, holds nothing")
        axes.fill_between(times, [*stored, stored[-1]], step="post", color=OURS, label="holds keys and values")
        waste = entry.workloads["mixed"]["kv_waste"].median
        axes.set_title(f"{entry.title}\n{waste:.0%} of what is reserved is wasted", fontsize=11)
        axes.set_xlabel("seconds")
        axes.set_ylim(0, 100)
        axes.margins(x=0)
    all_axes[0][0].set_ylabel("% of the KV cache")
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False)
    return figure


GANTT_RUNGS = ("m1", "m2", "m3", "m5")
"""Rungs whose steps are drawn: those that change who runs when."""


def draw_gantt(entries: Sequence[Entry], runs: Mapping[str, RunRecord]) -> Figure | None:
    """Requests over time: prompt chunks and decodes of each step, from the step trace."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    panels = []
    for entry in entries:
        record = _workload(runs.get(entry.name), "mixed")
        if entry.name in GANTT_RUNGS and record is not None and record.steps:
            panels.append((entry, record))
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(6.3 * columns, 3.3 * rows), squeeze=False)
    for axes, (entry, record) in zip(grid.flat, panels, strict=False):
        _draw_requests(axes, record)
        axes.set_title(f"{entry.title}: {record.steps[-1]['time'] - record.steps[0]['time']:.1f} s")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("request")
    patches = [
        Patch(color=PREFILL, label="step computes prompt tokens"),
        Patch(color=DECODE, label="step computes an output token"),
        Patch(color=WAITS, label="waits"),
    ]
    figure.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, frameon=False)
    figure.tight_layout()
    return figure


@dataclass
class _Span:
    """A bar: consecutive steps of one kind."""

    row: int
    color: str
    begin: float
    end: float


def _draw_requests(axes: Axes, record: WorkloadRecord) -> None:
    steps = computing_steps(record)
    start = steps[0]["time"]
    ends = [*(step["time"] for step in steps[1:]), steps[-1]["time"] + step_seconds(steps)[-1]]
    rows = {request.id: i for i, request in enumerate(record.requests[:MAX_GANTT_ROWS])}
    first_seen: dict[str, float] = {}
    spans: list[_Span] = []
    open_spans: dict[str, _Span] = {}
    for step, end in zip(steps, ends, strict=True):
        for request in step["requests"]:
            if request["id"] not in rows:
                continue
            color = DECODE if request["kind"] == "decode" else PREFILL
            first_seen.setdefault(request["id"], step["time"])
            span = open_spans.get(request["id"])
            if span is not None and span.end < step["time"]:
                spans.append(_Span(span.row, WAITS, span.end, step["time"]))  # preempted, or without a share
            if span is None or span.color != color or span.end < step["time"]:
                span = open_spans[request["id"]] = _Span(rows[request["id"]], color, step["time"], end)
                spans.append(span)
            span.end = end  # neighbours of one kind are one bar: a picture of 1,000 steps stays small
    waits = [(rows[i], seen - start) for i, seen in first_seen.items()]
    axes.barh([row for row, _ in waits], [wait for _, wait in waits], color=WAITS, height=0.8)
    axes.barh(
        [span.row for span in spans],
        [span.end - span.begin for span in spans],
        left=[span.begin - start for span in spans],
        color=[span.color for span in spans],
        height=0.8,
        linewidth=0,
    )
    axes.set_xlim(0, ends[-1] - start)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("seconds")
    hidden = len(record.requests) - len(rows)
    if hidden > 0:
        axes.text(
            1, 1.01, f"first {len(rows)} requests, {hidden} more", ha="right", transform=axes.transAxes, fontsize=9
        )
