"""The table and the figure of :mod:`benchmarks.finetune.swap`."""

from __future__ import annotations

import statistics
from typing import Any

OPTIONS = ("num_landmarks", "window", "pinned")
COLUMNS = {
    "cosine": "cosine",
    "least_cosine": "least",
    "neighbour": "same neighbour",
    "neighbour_in_exact_index": "in the exact index",
    "same_label": "same label",
    "accuracy": "accuracy",
    "paraphrase_auc": "MRPC AUC",
}
PERCENT = ("neighbour", "neighbour_in_exact_index", "same_label", "accuracy")
COLOURS = {32: "#5aa469", 64: "#1f6fb4", 128: "#b0413e"}
MARKERS = {0: "o", 1: "s", 4: "^"}


def table(found: dict[str, Any]) -> str:
    """Markdown. Milliseconds: attention alone, per layer and text."""
    lengths = sorted({case["tokens"] for case in found["cost"]})
    head = ["layers", "m", "window", "pinned", *COLUMNS.values(), *(f"ms, {n:,} tokens" for n in lengths)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    exact = {"layers": "none", **dict.fromkeys(OPTIONS, 0), **found["exact"]}
    for case in (exact, *found["cases"]):
        options = [str(case[name]) if case is not exact else "" for name in OPTIONS]
        times = [f"{_milliseconds(found, case, n):.2f}" for n in lengths]
        lines.append("| " + " | ".join([case["layers"], *options, *map(_cell, COLUMNS, _values(case)), *times]) + " |")
    tokens = found["exact"]["tokens"]
    counted = f"{found['setting']['reviews']} reviews of {min(tokens)} to {max(tokens)} tokens"
    return "\n".join(lines) + f"\n\n{counted}, mean {statistics.mean(tokens):.0f}.\n"


def draw(found: dict[str, Any]) -> Any:
    """Cosine and retrieval against the cost of the attention, a panel per choice of layers."""
    from matplotlib.figure import Figure

    choices = list(dict.fromkeys(case["layers"] for case in found["cases"]))
    lengths = sorted({case["tokens"] for case in found["cost"]})
    figure = Figure(figsize=(5.2 * len(choices), 6.4), layout="constrained")
    axes = figure.subplots(2, len(choices), squeeze=False, sharex=True, sharey="row")
    n = lengths[-1]
    exact = _milliseconds(found, dict.fromkeys(OPTIONS, 0), n)
    for column, layers in enumerate(choices):
        for row, measure in enumerate(("cosine", "neighbour_in_exact_index")):
            ax = axes[row][column]
            for m in sorted({case["num_landmarks"] for case in found["cases"]}):
                for p in sorted({case["pinned"] for case in found["cases"]}):
                    line = [
                        (_milliseconds(found, case, n) / exact, case[measure], case["window"])
                        for case in sorted(found["cases"], key=lambda case: case["window"])
                        if (case["layers"], case["num_landmarks"], case["pinned"]) == (layers, m, p)
                    ]
                    label = f"m = {m}, {p} pinned" if row == column == 0 else None
                    style = {"color": COLOURS.get(m), "marker": MARKERS.get(p, "x"), "alpha": 0.8, "label": label}
                    ax.plot([x for x, _, _ in line], [y for _, y, _ in line], linewidth=0.8, markersize=4, **style)
                    if row == 0:
                        for x, y, w in line:
                            ax.annotate(str(w), (x, y), fontsize=5, xytext=(2, 2), textcoords="offset points")
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_ylabel(COLUMNS[measure] if row == 0 else "same neighbour in the exact index")
        axes[0][column].set_title(f"converted: {layers}", fontsize=10)
        axes[1][column].set_xlabel(f"time of converted attention / exact, {n:,} tokens")
    axes[0][0].legend(frameon=False, fontsize=6, loc="lower right")
    name = {"minilm": "all-MiniLM-L6-v2"}.get(found["setting"]["model"], found["setting"]["model"])
    figure.suptitle(f"{name} on IMDB reviews, no retraining; numbers are windows", fontsize=11)
    return figure


def _milliseconds(found: dict[str, Any], case: dict[str, Any], tokens: int) -> float:
    wanted = {"tokens": tokens, **{name: case[name] for name in OPTIONS}}
    return next(cost["milliseconds"] for cost in found["cost"] if wanted.items() <= cost.items())


def _values(case: dict[str, Any]) -> list[float]:
    return [case[name] for name in COLUMNS]


def _cell(name: str, value: float) -> str:
    return f"{100 * value:.0f} %" if name in PERCENT else f"{value:.3f}"
