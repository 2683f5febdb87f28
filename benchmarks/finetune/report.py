"""The results as a table, as JSON and as a figure."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import nystrom_ext

from . import UsageError, memory
from .checkpoint import write_atomically

STEP = "forward, backward and optimizer of the whole model, of which attention is a part"
COLOURS = {
    "softmax": "#8c8c8c", "nystrom": "#1f6fb4", "linformer": "#5aa469", "performer": "#b0413e", "reformer": "#c98f2b",
}  # fmt: skip
NAMES = {
    "softmax": "softmax", "nystrom": "Nyström", "linformer": "Linformer", "performer": "Performer",
    "reformer": "Reformer",
}  # fmt: skip


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    found["nystrom_ext"] = nystrom_ext.__version__
    for package in ("tokenizers", "transformers", "datasets", "scikit-learn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def ratios(arms: dict[str, Any]) -> dict[str, float] | None:
    """softmax / nystrom: above 1 means that Nyström needs less."""
    if not {"softmax", "nystrom"} <= set(arms):
        return None
    found = {}
    for name in ("median_seconds_per_step", "peak_memory_bytes"):
        ours, theirs = arms["nystrom"][name], arms["softmax"][name]
        if ours and theirs:
            found[name] = theirs / ours
    return found


def show(results: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table(title=results["source"], caption_justify="left")
    metrics = list(next(iter(results["arms"].values()))["test"])
    columns = [f"{results['evaluated']} {metric}" for metric in metrics]
    for column in ("attention", "parameters", *columns, "s / training step ¹", "peak memory ²"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    for name, arm in results["arms"].items():
        table.add_row(
            NAMES[name],
            f"{arm['parameters']:,}",
            *(f"{arm['test'][metric]:.1%} of {results['sizes']['test']:,}" for metric in metrics),
            f"{arm['median_seconds_per_step']:.4f}",
            "not measured" if arm["peak_memory_bytes"] is None else f"{arm['peak_memory_bytes'] / 2**20:.0f} MiB",
        )
    console.print(table)
    turns = "run in turn" if results["config"]["model"] == "scratch" else "one arm after the other"
    console.print(f"¹ median over {results['steps']} steps, {turns}; {STEP}\n² {memory.LABEL}", style="dim")
    if results["ratios"]:
        labels = {"median_seconds_per_step": "time per step", "peak_memory_bytes": "peak memory"}
        parts = [f"{labels[name]} {value:.2f}x" for name, value in results["ratios"].items()]
        console.print("softmax / Nyström: " + ", ".join(parts), style="bold")


def write(folder: Path, results: dict[str, Any]) -> list[Path]:
    """results.json and results.png; returns their paths."""
    document, figure = folder / "results.json", folder / "results.png"
    write_json(document, results)
    drawing = _draw(results)
    write_atomically(figure, lambda file: drawing.savefig(file, format="png", dpi=150))
    return [document, figure]


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def resumed(document: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run of the same setting wrote, or the beginning of a document without cases."""
    try:
        found: dict[str, Any] = json.loads(document.read_text()) if document.exists() else {}
    except ValueError as error:
        raise UsageError(f"{document} must be JSON, it is damaged: {error}; remove it") from error
    same = found.get("setting") == setting
    return found if same else {"setting": setting, "versions": versions(), "cases": []}


def write_predictions(folder: Path, arm: str, split: str, labels: tuple[str, ...], outputs: torch.Tensor) -> Path:
    """index and prediction, as GLUE's server takes them."""
    answers = [labels[i] for i in outputs.argmax(1)] if labels else [f"{x:.3f}" for x in outputs.flatten()]
    lines = ["index\tprediction", *(f"{i}\t{answer}" for i, answer in enumerate(answers))]
    path = folder / f"{split}-{arm}.tsv"
    write_atomically(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))
    return path


def _draw(results: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[3, 1, 1, 1])
    arms = results["arms"]
    metric = next(iter(next(iter(arms.values()))["test"]))
    values = {
        "seconds": {name: arm["median_seconds_per_step"] for name, arm in arms.items()},
        "metric": {name: 100 * arm["test"][metric] for name, arm in arms.items()},
        "memory": {name: arm["peak_memory_bytes"] and arm["peak_memory_bytes"] / 2**20 for name, arm in arms.items()},
    }
    for name, arm in arms.items():
        losses, width = arm["losses"], max(1, results["steps"] // 20)
        smooth = [statistics.fmean(losses[max(0, i + 1 - width) : i + 1]) for i in range(len(losses))]
        axes[0].plot(range(1, len(losses) + 1), losses, color=COLOURS[name], alpha=0.25, linewidth=0.8)
        axes[0].plot(range(1, len(losses) + 1), smooth, color=COLOURS[name], label=NAMES[name])
    axes[0].set(xlabel="training step", ylim=(0, None))
    axes[0].set_title(f"training loss (thick: mean of {width} steps)", fontsize=10)
    axes[0].legend(frameon=False)
    bars = (
        ("seconds per step", "seconds", "{:.3f}"),
        (f"{results['evaluated']} {metric}, %", "metric", "{:.1f}"),
        ("peak memory, MiB", "memory", "{:.0f}"),
    )
    for ax, (title, key, form) in zip(axes[1:], bars, strict=True):
        found = values[key].values()
        heights, labels = [v or 0 for v in found], ["n/a" if v is None else form.format(v) for v in found]
        drawn = ax.bar([NAMES[name] for name in arms], heights, color=[COLOURS[name] for name in arms], width=0.6)
        ax.bar_label(drawn, labels)
        ax.set_title(title, fontsize=10)
        ax.set_yticks([])
        ax.tick_params(axis="x", rotation=0 if len(arms) < 3 else 60)
        ax.set(xlim=(-0.8, len(arms) - 0.2), ymargin=0.12)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{results['source']}; up to {results['sizes']['longest']} tokens", fontsize=11)
    return figure
