"""``python -m benchmarks.finetune.scaling``: time and peak memory of a training step against the length.

The model is that of the Long-Range Arena tasks; every length and attention runs alone in a fresh process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from . import UsageError, memory, model, report, training
from .arguments import Parser, parse
from .checkpoint import write_atomically

VOCABULARY, CLASSES = 258, 2


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.finetune.scaling", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192], help="tokens")
    add("--attention", nargs="+", choices=model.ATTENTIONS, default=list(model.ATTENTIONS))
    add("--num-landmarks", type=int, default=64)
    add("--batch-size", type=int, default=2, help="texts per step")
    add("--steps", type=int, default=5, help="timed steps; the median counts")
    add("--threads", type=int, default=1)
    add(
        "--output",
        type=Path,
        default=Path("runs/scaling"),
        help="writes OUTPUT.json and OUTPUT.png; done ones are kept",
    )
    try:
        options = parser.parse_args(argv)
        if min(options.lengths) < 1 or options.steps < 1:
            raise UsageError(
                f"--lengths and --steps must be positive, got {options.lengths}, {options.steps}; change them"
            )
        options.output.parent.mkdir(parents=True, exist_ok=True)
        measure(options)
    except UsageError as error:
        print("error:", error, file=sys.stderr)
        return 2
    return 0


def measure(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    document, figure = options.output.with_suffix(".json"), options.output.with_suffix(".png")
    setting = {name: getattr(options, name) for name in ("num_landmarks", "batch_size", "steps", "threads")}
    found = report.resumed(document, setting)
    done = {(case["attention"], case["length"]) for case in found["cases"]}
    for length in options.lengths:
        for attention in options.attention:
            if (attention, length) in done:
                continue
            found["cases"].append(_case(options, attention, length))
            report.write_json(document, found)
    drawing = draw(found)
    write_atomically(figure, lambda file: drawing.savefig(file, format="png", dpi=150))
    print(f"wrote {document}\nwrote {figure}")


def _case(options: argparse.Namespace, attention: str, length: int) -> dict[str, Any]:
    words = f"--task lra-text --data-dir unread --attention {attention} --max-length {length} --max-positions {length}"
    words += f" --num-landmarks {options.num_landmarks} --batch-size {options.batch_size} --threads {options.threads}"
    args = parse(words.split())
    model.check(args)
    arm = training.Arm.create(attention, model.build(args, attention, VOCABULARY, CLASSES), args)
    ids = torch.randint(2, VOCABULARY, (args.batch_size, length), dtype=torch.int32)
    for step in range(options.steps + 1):
        training.train_step(arm, ids, torch.zeros(len(ids), dtype=torch.long), step, args)
    seconds = statistics.median(arm.seconds[1:])
    peak = memory.measure(args, attention, VOCABULARY, CLASSES, False)
    print(f"{length:>6} tokens, {attention:<9}: {seconds:8.3f} s per step, {(peak or 0) / 2**20:6.0f} MiB", flush=True)
    return {"attention": attention, "length": length, "median_seconds_per_step": seconds, "peak_memory_bytes": peak}


def draw(found: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = (
        ("median_seconds_per_step", 1.0, "s per training step"),
        ("peak_memory_bytes", 2.0**-20, "peak memory, MiB"),
    )
    for ax, (key, factor, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for name in dict.fromkeys(case["attention"] for case in found["cases"]):
            cases = sorted((c for c in found["cases"] if c["attention"] == name and c[key]), key=lambda c: c["length"])
            points = [(case["length"], factor * case[key]) for case in cases]
            if points:
                ax.loglog(*zip(*points, strict=True), ".-", color=report.COLOURS[name], label=report.NAMES[name])
        ax.set(xlabel="tokens", title=title)
        lengths = sorted({case["length"] for case in found["cases"]})
        ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
        ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    setting = found["setting"]
    figure.suptitle(f"2 layers, d_model 64, 2 heads, batch {setting['batch_size']}, m = {setting['num_landmarks']}")
    return figure


if __name__ == "__main__":
    sys.exit(main())
