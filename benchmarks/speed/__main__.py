"""``python -m benchmarks.speed``"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.finetune import UsageError
from benchmarks.finetune.checkpoint import prepare, write_atomically
from benchmarks.finetune.interrupts import Interrupted, Interrupts

from . import bars, cases, gradients, machine, memory, report, stages
from .arguments import parse
from .gate import Gate, same_bits
from .measure import race


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 when --strict finds a missed bar, 2 after bad input, 128 + a signal's number."""
    try:
        with Interrupts().caught():
            return run(parse(argv))
    except UsageError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        print(f"\ninterrupted by signal {interrupted.number}; nothing was written", file=sys.stderr)
        return 128 + interrupted.number


def run(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    prepare(args.output_dir)
    results = measure(args)
    written = write(args, results)  # before anything is printed, which may fail
    report.show(results)
    if args.check:
        report.show_bars(results["bars"])
    for path in written:
        print(f"wrote {path}")
    missed = [bar for bar in results["bars"] if bar["passed"] is False]
    return 1 if args.strict and missed else 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the command line asks for, as plain values."""
    found = machine.facts(args.device)
    tables = cases.tables(args)
    memory_entries = [] if args.no_memory else memory.entries(args)
    groups = [group for table in tables.values() for group in table]
    gate, cells, memories = Gate(), [], []
    total = 3 + args.gradients + len(cases.PASSES) * len(groups) + len(memory_entries)
    interval = 0.1 if sys.stderr.isatty() else 10.0  # few lines in a log
    with tqdm(total=total, desc="peak of the machine", mininterval=interval, dynamic_ncols=True) as bar:
        peaks = machine.peaks(args.device, args.dtype)
        bar.update()
        for group in groups:
            for name, backward in cases.PASSES.items():
                bar.set_description(f"{group[0].table} {group[0].column}, {name}", refresh=False)
                cells += cell(group, name, backward, gate, args)
                bar.update()
        for entry, name in memory_entries:
            bar.set_description(f"memory {entry.contestant} {entry.column}", refresh=False)
            memories.append(memory.record(entry, name, gate, args))
            bar.update()
        bar.set_description("stages", refresh=False)
        profiled = stages.records(args)
        bar.update()
        bar.set_description("gradients", refresh=False)
        by_gradients = gradients.records(args) if args.gradients else []
        bar.update(args.gradients)
        bar.set_description("peak of the machine", refresh=False)
        peaks = machine.better(peaks, machine.peaks(args.device, args.dtype))
        bar.update()
    results = {
        "config": {key: value for key, value in vars(args).items() if key != "output_dir"},
        "machine": found,
        "peaks": peaks,
        "errors": gate.errors,
        "same_bits": same_bits(args.device) if "nystrom_ext" in gate.errors else None,
        "cells": cells,
        "stages": profiled,
        "gradients": by_gradients,
        "memory": memories,
    }
    return {**results, "bars": bars.bars(results)}


def cell(
    group: list[cases.Entry], name: str, backward: bool, gate: Gate, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The records of one group of entries, those that are left out or refused included."""
    why = {entry: cases.left_out(entry, args) or gate.refusal(entry.contestant, entry.case) for entry in group}
    admitted = [entry for entry in group if not why[entry]]
    measured = dict(zip(admitted, race(admitted, backward, args.repeats, args.seconds), strict=True))
    return [{**entry.record(name), **measured.get(entry, {"status": why[entry]})} for entry in group]


def write(args: argparse.Namespace, results: dict[str, Any]) -> list[Path]:
    """The JSON document and the figure; returns their paths."""
    from .plots import draw

    stem = machine.slug(results["machine"]) + ("-full" if args.full else "")
    document, figure = (args.output_dir / f"{stem}.{ending}" for ending in ("json", "png"))
    text = json.dumps(results, indent=1) + "\n"
    write_atomically(document, lambda file: file.write(text.encode()))
    drawing = draw(results)
    write_atomically(figure, lambda file: drawing.savefig(file, format="png", dpi=110))
    return [document, figure]


if __name__ == "__main__":
    machine.keep_memory()
    sys.exit(main())
