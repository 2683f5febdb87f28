"""``python -m benchmarks.finetune.compare results/*.json``: one table and figure from the results of several runs.

Runs that differ in the seed only are one row, with the mean and the range over the seeds.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import UsageError
from .arguments import DEFAULTS, FREE, Parser
from .checkpoint import write_atomically
from .report import COLOURS, NAMES

# Options of one arm, with their short names. Every other makes a run another experiment, but those that decide nothing.
OWN = {
    "nystrom": {
        "num_landmarks": "m", "window": "w", "pinned": "p", "conv_kernel_size": "taps",
        "include": "in", "exclude": "not",
    },
    "linformer": {"linformer_k": "k"},
    "performer": {"performer_features": "features"},
    "reformer": {"reformer_hashes": "hashes"},
}  # fmt: skip
DECIDE_NOTHING = (*FREE, "seed", "attention", "threads", "device", "eval_steps")
SAME = ("task", "model", "max_length")
DASHES = ("-", "--", ":", "-.")


@dataclass
class Row:
    """One arm of one experiment; lists have one entry per seed."""

    setting: dict[str, Any]
    arm: str
    options: str
    source: str
    metric: str
    sizes: dict[str, int]
    steps: int
    seeds: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[int | None] = field(default_factory=list)
    curves: list[list[tuple[float, float]]] = field(default_factory=list)  # (seconds of training, dev metric)

    @property
    def name(self) -> str:
        return f"{NAMES[self.arm]} {self.options}".strip()


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.finetune.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="results.json of runs, or folders below which they are")
    parser.add_argument("--output", type=Path, default=Path("runs/comparison"), help="writes OUTPUT.md and OUTPUT.png")
    try:
        args = parser.parse_args(argv)
        rows = read(args.files)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        text = table(rows)
        print(text, end="")
        write_atomically(args.output.with_suffix(".md"), lambda file: file.write(text.encode()))
        figure = draw(rows)
        write_atomically(args.output.with_suffix(".png"), lambda file: figure.savefig(file, format="png", dpi=130))
    except UsageError as error:
        print("error:", error, file=sys.stderr)
        return 2
    return 0


def read(paths: Iterable[Path]) -> list[Row]:
    files = [file for path in paths for file in (sorted(path.glob("**/results.json")) if path.is_dir() else [path])]
    rows: dict[str, Row] = {}
    for file in files:
        try:
            results = json.loads(file.read_text())
            _add(rows, results)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{file} must be a results.json of benchmarks.finetune: {error!r}; leave it out"
            ) from error
    if not rows:
        raise UsageError("there must be a results.json, none was found; name the --output-dir of finished runs")
    return list(rows.values())


def _add(rows: dict[str, Row], results: dict[str, Any]) -> None:
    # An option that is younger than the run had its default.
    config = DEFAULTS | {"task": results["task"]} | results["config"]
    if config["max_steps"]:
        config["epochs"] = None
    apart = {*DECIDE_NOTHING, *(name for own in OWN.values() for name in own)}
    setting = {name: value for name, value in sorted(config.items()) if name not in apart}
    for arm, found in results["arms"].items():
        options = _options(config, OWN.get(arm, {}))
        metric = next(iter(found["test"]))
        row = rows.setdefault(
            json.dumps([setting, arm, options]),
            Row(setting, arm, options, results["source"], metric, results["sizes"], results["steps"]),
        )
        if config["seed"] in row.seeds:
            continue  # several runs may hold the same baseline
        elapsed = [0.0]
        for seconds in found["seconds"]:
            elapsed.append(elapsed[-1] + seconds)
        row.seeds.append(config["seed"])
        row.scores.append(found["test"][metric])
        row.seconds.append(found["median_seconds_per_step"])
        row.memory.append(found["peak_memory_bytes"])
        row.curves.append([(elapsed[int(step)], values[metric]) for step, values in found["dev"].items()])


def _options(config: dict[str, Any], names: dict[str, str]) -> str:
    found = {short: config[name] for name, short in names.items()}
    return " ".join(f"{name}={' '.join(x) if isinstance(x, list) else x}" for name, x in found.items() if x)


def distinction(setting: dict[str, Any], rows: list[Row]) -> str:
    """The options in which ``setting`` differs from others of its task, model and length: ``learning_rate=0.0001``."""
    others = [row.setting for row in rows if all(row.setting[name] == setting[name] for name in SAME)]
    varying = [name for name in setting if any(other.get(name) != setting[name] for other in others)]
    return " ".join(f"{name}={setting[name]}" for name in varying)


def table(rows: list[Row]) -> str:
    """Markdown; the difference is to softmax in the same setting, over the seeds that both have."""
    lines = [
        "| data | model | tokens | train / test | steps | options | attention | metric "
        "| score % | − softmax | s / step | memory |",
        "|---|---|--:|--:|--:|---|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        exact = next((x for x in rows if x.setting == row.setting and x.arm == "softmax" and x is not row), None)
        memory = [x / 2**20 for x in row.memory if x]
        cells = [
            row.setting["task"], row.setting["model"] or "scratch", f"{row.setting['max_length']:,}",
            f"{row.sizes['train']:,} / {row.sizes['test']:,}", f"{row.steps:,}",
            distinction(row.setting, rows), row.name, row.metric,
            _mean([100 * score for score in row.scores]), _difference(row, exact),
            f"{statistics.mean(row.seconds):.3f}", f"{statistics.mean(memory):.0f} MiB" if memory else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(values: list[float]) -> str:
    spread = f" ({min(values):.1f} to {max(values):.1f}, {len(values)} seeds)" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _difference(row: Row, exact: Row | None) -> str:
    shared = sorted({*row.seeds} & {*exact.seeds}) if exact else []
    if exact is None or not shared:
        return ""
    pairs = [(row.scores[row.seeds.index(seed)], exact.scores[exact.seeds.index(seed)]) for seed in shared]
    return f"{100 * statistics.mean(a - b for a, b in pairs):+.1f}"


def draw(rows: list[Row]) -> Any:
    """Per setting: the score of every seed with the mean, and below it the metric on dev against the seconds."""
    from matplotlib.figure import Figure

    settings = list({json.dumps(row.setting): row.setting for row in rows}.values())
    columns = min(3, len(settings))
    bands = -(-len(settings) // columns)
    figure = Figure(figsize=(5 * columns, 6 * bands), layout="constrained")
    axes = figure.subplots(2 * bands, columns, squeeze=False)
    for place in range(bands * columns):
        above, below = axes[2 * (place // columns) : 2 * (place // columns) + 2, place % columns]
        if place >= len(settings):
            above.remove(), below.remove()
            continue
        setting = settings[place]
        shown = sorted((row for row in rows if row.setting == setting), key=lambda row: row.arm != "softmax")
        title = f"{setting['task']}, {setting['model'] or 'scratch'}, {setting['max_length']} tokens"
        above.set_title(f"{title}\n{distinction(setting, rows)}".strip(), fontsize=10)
        _scores(above, shown)
        _curves(below, shown)
    return figure


def _scores(ax: Any, rows: list[Row]) -> None:
    for place, row in enumerate(rows):
        scores = [100 * score for score in row.scores]
        ax.plot([place] * len(scores), scores, "o", color=COLOURS[row.arm], alpha=0.5)
        ax.plot(place, statistics.mean(scores), "_", color=COLOURS[row.arm], markersize=24, markeredgewidth=2)
    ax.set_xticks(range(len(rows)), [row.name.replace(" ", "\n") for row in rows], fontsize=8)
    ax.set(ylabel=f"{rows[0].metric} %, dots are seeds", xlim=(-0.6, len(rows) - 0.4))
    ax.spines[["top", "right"]].set_visible(False)


def _curves(ax: Any, rows: list[Row]) -> None:
    styles: dict[str, int] = {}
    for row in rows:
        style = DASHES[styles.setdefault(row.arm, 0) % len(DASHES)]
        styles[row.arm] += 1
        for i, curve in enumerate(row.curves):
            label = row.name if i == 0 else None
            ax.plot(*zip(*curve, strict=True), style, color=COLOURS[row.arm], marker=".", alpha=0.8, label=label)
    ax.set(xlabel="seconds of training steps", ylabel=f"dev {rows[0].metric}")
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
