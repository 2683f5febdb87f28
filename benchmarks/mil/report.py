"""The results as a table, as JSON and Markdown, and the heat map."""

from __future__ import annotations

import statistics
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.finetune import memory
from benchmarks.finetune.checkpoint import write_atomically
from benchmarks.finetune.report import write_json

from .bags import Bag
from .model import with_rows
from .training import Arm, auc

COLUMNS = ("attention", "test AUC ¹", "ms a step ²", "peak memory ³", "AUC of the heat map ⁴")


def notes(results: dict[str, Any]) -> list[str]:
    """What the columns are, and where they were measured."""
    config, machine = results["config"], results["machine"]
    sizes = " to ".join(f"{n:,}" for n in config["instances"])
    return [
        f"¹ of {config['test_bags']} bags, half of them positive, with {config['share']:.0%} of their instances",
        f"² median of {config['steps']} steps of one bag each, {sizes} instances, in turn on the same bags: forward, "
        "backward and optimizer of the whole model",
        f"³ on the largest bag: {memory.LABEL.replace('on a full batch at full length, ', '')}",
        "⁴ how well the class token's attention tells positive instances from others, in the bag of the figure",
        f"{machine['processor']}, {results['threads']} threads, load {machine['load_average_before']} before the run; "
        f"torch {machine['versions']['torch']}; {config['dim']} features, {config['heads']} heads, "
        f"{config['num_landmarks']} landmarks, seed {config['seed']}",
    ]


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            f"{arm['auc']:.3f}",
            f"{arm['median_seconds_per_step'] * 1e3:.0f}",
            "not measured" if arm["peak_memory_bytes"] is None else f"{arm['peak_memory_bytes'] / 2**20:.0f} MiB",
            f"{arm['heat_map_auc']:.3f}",
        )
        for name, arm in results["arms"].items()
    ]


def show(results: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table(title=f"bags of digits, positive with a {results['config']['digit']}")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "attention" else "right", no_wrap=column == "attention")
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    console.print("\n".join(notes(results)), style="dim")


def markdown(results: dict[str, Any]) -> str:
    lines = [f"`{results['command']}`", "", "| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * 4 + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(results)]
    return "\n".join([*lines, "", *(note + "  " for note in notes(results))]).rstrip() + "\n"


def arm_results(arm: Arm, bag: Bag, heat: np.ndarray, peak: int | None) -> dict[str, Any]:
    from sklearn.metrics import roc_auc_score

    return {
        "auc": auc(arm.scores),
        "median_seconds_per_step": statistics.median(arm.seconds),
        "peak_memory_bytes": peak,
        "heat_map_auc": float(roc_auc_score(bag.positive.numpy(), heat)),
        "parameters": sum(p.numel() for p in arm.model.parameters()),
        "scores": arm.scores,
        "losses": arm.losses,
        "seconds": arm.seconds,
    }


@torch.no_grad()
def heat_map(arm: Arm, bag: Bag, device: str) -> np.ndarray:
    """(n,): the class token's row."""
    attention: np.ndarray = (
        with_rows(arm.model).attention_of_class_token(bag.instances.to(device))[0].float().cpu().numpy()
    )
    return attention


def write(folder: Path, results: dict[str, Any], bag: Bag, heats: dict[str, np.ndarray]) -> list[Path]:
    """results.json, results.md and heatmap.png; returns their paths."""
    document, page, figure = (folder / name for name in ("results.json", "results.md", "heatmap.png"))
    write_json(document, results)
    text = markdown(results)
    write_atomically(page, lambda file: file.write(text.encode()))
    drawing = draw(bag, heats, results["config"]["digit"])
    write_atomically(figure, lambda file: drawing.savefig(file, format="png", dpi=75))
    return [document, page, figure]


def draw(bag: Bag, heats: dict[str, np.ndarray], digit: int) -> Any:
    """The instances of a bag on their grid: what each is, and what the class token of each model attends to."""
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    n = len(bag.positive)
    side = ceil(n**0.5)
    figure = Figure(figsize=(3.6 * (1 + len(heats)), 4.1), layout="constrained")
    axes = figure.subplots(1, 1 + len(heats))
    shown = {f"instances with a {digit}": bag.positive.numpy().astype(float), **heats}
    row, column = np.divmod(np.flatnonzero(bag.positive.numpy()), side)
    for ax, (title, values) in zip(axes, shown.items(), strict=True):
        grid = np.full(side * side, np.nan)
        grid[:n] = values
        if title in heats:
            low, high = np.percentile(values, [1, 99])  # single instances would take the whole range
            ax.imshow(grid.reshape(side, side), cmap="viridis", vmin=low, vmax=high)
            ax.scatter(column, row, s=9, facecolors="none", edgecolors="#ff5a36", linewidths=0.5)
        else:
            ax.imshow(grid.reshape(side, side), cmap="Greys", vmin=0, vmax=1)
        ax.set_title(title, fontsize=11)
        ax.set(xticks=[], yticks=[])
    figure.suptitle(f"class token's attention to {n:,} instances, mean of the heads; circles: a {digit}", fontsize=11)
    return figure
