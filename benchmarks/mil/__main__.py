"""``python -m benchmarks.mil``"""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

import torch

from benchmarks.finetune import UsageError, checkpoint, memory
from benchmarks.finetune.interrupts import Interrupted, Interrupts
from benchmarks.speed import machine

from . import report
from .arguments import config, parse
from .bags import Bags
from .training import Arm, test, train, two_steps


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 2 after bad input, 128 + the number of the signal that ended the run."""
    interrupts = Interrupts()
    args: argparse.Namespace | None = None
    try:
        with interrupts.caught():
            args = parse(argv)
            run(args, interrupts, sys.argv[1:] if argv is None else argv)
        return 0
    except UsageError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not memory.exhausted(error) or args is None:
            raise
        rule = f"error: a step must fit into memory, a bag of {args.instances[-1]} instances does not"
        print(f"{rule}; lower --instances or --dim, or leave out exact from --attention", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        kept = args and (args.output_dir / checkpoint.NAME).exists()
        way = "run the same command with --resume to continue" if kept else "nothing was begun"
        print(f"\ninterrupted by signal {interrupted.number}; {way}", file=sys.stderr)
        return 128 + interrupted.number


def run(args: argparse.Namespace, interrupts: Interrupts, argv: list[str]) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    found = machine.facts(args.device)
    bags = Bags(args)
    arms = [Arm.of(args, name) for name in args.attention]
    checkpoint.prepare(args.output_dir)
    header: dict[str, Any] = {"config": config(args), "fingerprint": bags.fingerprint()}
    save = checkpoint.begin(args, header, arms)

    train(arms, bags, args, interrupts, save)
    test(arms, bags, args, interrupts, save)
    bag = bags.bag("test", 1)  # a positive one
    heats = {arm.name: report.heat_map(arm, bag, args.device) for arm in arms}
    peaks = {arm.name: memory.peak(args.device, two_steps, args, arm.name) for arm in arms}
    results = {
        "config": header["config"],
        "command": "python -m benchmarks.mil " + shlex.join(word for word in argv if word != "--resume"),
        "machine": found,
        "threads": torch.get_num_threads(),
        "arms": {arm.name: report.arm_results(arm, bag, heats[arm.name], peaks[arm.name]) for arm in arms},
    }
    written = report.write(args.output_dir, results, bag, heats)
    report.show(results)
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
