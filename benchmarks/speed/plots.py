"""The figure: time, speed-up and memory over n, and the roofline."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window, no state

from .cases import PASSES, Case
from .peers import KINDS
from .report import OURS, about, rate

COLOURS = {
    "nystrom_ext": "#1f6fb4", "with window": "#7fb2de",
    "eager": "#d98c5f", "two SDPA": "#c0392b", "two SDPA compiled": "#e08283",
    "lucidrains": "#8e6bb0", "Hugging Face": "#c9a227", "exact SDPA": "#4d4d4d",
    "Linformer": "#5aa469", "Performer": "#3fa7a3", "Reformer": "#9bbf6b",
}  # fmt: skip
STYLES = {"rival": ":", "package": "--"}


def draw(results: dict[str, Any]) -> Figure:
    """Two rows: forward, forward+backward."""
    figure = Figure(figsize=(15, 9), layout="constrained")
    axes = figure.subplots(2, 3)
    for row, pass_name in zip(axes, PASSES, strict=True):
        lines = _lines(results["cells"], pass_name)
        _time(row[0], lines, pass_name)
        _speed_up(row[1], lines, pass_name)
    _memory(axes[0, 2], results["memory"])
    _roofline(axes[1, 2], results)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(about(results), fontsize=9)
    return figure


def _lines(cells: list[dict[str, Any]], pass_name: str) -> dict[str, dict[int, dict[str, Any]]]:
    """The measured cells of the length table by contestant and n."""
    lines: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in cells:
        if (cell["table"], cell["pass"]) == ("length", pass_name) and "median" in cell:
            lines.setdefault(cell["contestant"], {})[cell["case"]["n"]] = cell
    return lines


def _plot(ax: Axes, name: str, points: dict[int, float]) -> None:
    ours = name == OURS
    ax.plot(
        list(points), list(points.values()), marker="o", markersize=3, label=name, color=COLOURS[name],
        linestyle=STYLES.get(KINDS[name], "-"), linewidth=2.4 if ours else 1.2, zorder=3 if ours else 2,
    )  # fmt: skip


def _over_n(ax: Axes, title: str) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("n")


def _time(ax: Axes, lines: dict[str, dict[int, dict[str, Any]]], pass_name: str) -> None:
    for name, cells in lines.items():
        _plot(ax, name, {n: cell["median"] * 1e3 for n, cell in cells.items()})
        if len(cells) > 0:
            bounds = ([cell[key] * 1e3 for cell in cells.values()] for key in ("lower_quartile", "upper_quartile"))
            ax.fill_between(list(cells), *bounds, color=COLOURS[name], alpha=0.15, linewidth=0)
    _over_n(ax, f"{pass_name}: median ms, quartiles shaded")


def _speed_up(ax: Axes, lines: dict[str, dict[int, dict[str, Any]]], pass_name: str) -> None:
    ours = lines.get(OURS, {})
    for name, cells in lines.items():
        _plot(ax, name, {n: cell["median"] / ours[n]["median"] for n, cell in cells.items() if n in ours})
    _over_n(ax, f"{pass_name}: times as long as nystrom_ext")


def _memory(ax: Axes, records: list[dict[str, Any]]) -> None:
    points: dict[str, dict[int, float]] = {}
    for record in records:
        if record["pass"] == "forward+backward" and record.get("bytes") and record["column"].isdigit():
            points.setdefault(record["contestant"], {})[record["case"]["n"]] = record["bytes"] / 2**20
    for name, values in points.items():
        _plot(ax, name, values)
    _over_n(ax, "forward+backward: peak MiB beyond inputs, result, gradients")


def _roofline(ax: Axes, results: dict[str, Any]) -> None:
    """The products that the method needs over the bytes of its sweeps, for ours in several tables."""
    peak, copy = results["peaks"]["gflops"], results["peaks"]["copy_gb_per_s"]
    ridge = peak / copy
    ax.plot([1, ridge, max(1000, 2 * ridge)], [copy, peak, peak], color="#4d4d4d", linewidth=1.5)
    ax.axhline(results["peaks"]["matmul_gflops"], color="#4d4d4d", linewidth=0.8, linestyle="--")
    ax.text(1.1, results["peaks"]["matmul_gflops"], "best torch.mm", fontsize=8, va="bottom")
    for pass_name, marker in zip(PASSES, "o^", strict=True):
        chosen = [c for c in results["cells"] if c["contestant"] == OURS and c["pass"] == pass_name and "median" in c]
        cells = [cell for cell in chosen if cell["table"] in ("length", "landmarks", "head_dim", "heads", "million")]
        cases = [Case(**cell["case"]) for cell in cells]
        backward = PASSES[pass_name]
        ax.scatter(
            [case.flops(backward) / case.traffic(backward) for case in cases], [rate(cell) for cell in cells],
            s=18, marker=marker, color=COLOURS[OURS], label=pass_name, alpha=0.7, zorder=3,
        )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="FLOP per byte")
    ax.set_title("roofline of nystrom_ext, GFLOP/s", fontsize=10)
    ax.legend(frameon=False, fontsize=8)
