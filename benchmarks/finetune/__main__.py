"""``python -m benchmarks.finetune``"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from . import UsageError, checkpoint, data, memory, model, report, scratch
from .arguments import command_line, config, parse
from .interrupts import Interrupted, Interrupts
from .splits import Splits
from .tasks import listops, reviews


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 2 after bad input, 128 + the number of the signal that ended the run."""
    interrupts = Interrupts()
    args: argparse.Namespace | None = None
    try:
        with interrupts.caught():
            args = parse(argv)
            if args.write_data:
                (listops if args.task == "lra-listops" else reviews).write_generated(args)
                print(f"wrote {args.write_data}")
            else:
                run(args, interrupts)
        return 0
    except UsageError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not memory.exhausted(error) or args is None:
            raise
        print("error:", _advice(args), file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        kept = (
            args and not args.write_data and any((args.output_dir / x).exists() for x in (checkpoint.NAME, "run.json"))
        )
        way = "run the same command with --resume to continue" if kept else "nothing was begun"
        print(f"\ninterrupted by signal {interrupted.number}; {way}", file=sys.stderr)
        return 128 + interrupted.number


def run(args: argparse.Namespace, interrupts: Interrupts) -> None:
    _prepare(args)
    splits = data.load(args)
    job: Any = scratch.Job(args, splits) if args.model == "scratch" else _pretrained().Job(args, splits)
    _describe(splits, job)
    if args.dry_run:
        for name in args.attention:
            seconds = job.trial(name)
            print(
                f"{name}: {seconds:.3f} s per step on the longest texts, so at most {job.steps * seconds / 60:.0f} min"
            )
        print("dry run: nothing was written")
        return
    results: dict[str, Any] = {
        "task": args.task,
        "source": splits.source,
        "config": config(args),
        "command": "python -m benchmarks.finetune " + command_line(args),
        "versions": report.versions(),
        "threads": torch.get_num_threads(),
        "evaluated": splits.evaluated,
        "steps": job.steps,
        "sizes": {name: len(encoded) for name, encoded in job.sets.items()}
        | {"vocab": job.vocab, "longest": job.lengths[-1]},
        "arms": job.run(interrupts),
    }
    results["ratios"] = report.ratios(results["arms"])
    report.show(results)
    for path in report.write(args.output_dir, results):
        print(f"wrote {path}")
    for name in args.attention if args.do_predict else ():
        for split in splits.unlabelled:
            path = report.write_predictions(args.output_dir, name, split, splits.labels, job.predict(name, split))
            print(f"wrote {path}")


def _pretrained() -> Any:
    try:
        from . import pretrained
    except ImportError as error:
        raise UsageError(f"a Hugging Face --model needs other packages: {error}; pip install .[finetune]") from error
    return pretrained


def _describe(splits: Splits, job: Any) -> None:
    print(f"data: {splits.source}")
    print("      " + ", ".join(f"{len(encoded):,} {name}" for name, encoded in job.sets.items()), end="; ")
    lengths = job.lengths
    print(f"{lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}; {job.vocab:,} words")
    empty = data.empty_texts(splits)
    if empty:
        print(f"      {empty} empty texts are kept, as one unknown token")


def _advice(args: argparse.Namespace) -> str:
    ways = "lower --batch-size or --max-length, or leave out softmax from --attention"
    if args.model != "scratch":
        ways += "; --gradient-accumulation-steps keeps the batch, --gradient-checkpointing trades time for memory"
    return f"a step must fit into memory, {args.batch_size} texts of {args.max_length} tokens do not; {ways}"


def _prepare(args: argparse.Namespace) -> None:
    """What can fail early must not fail late."""
    model.check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.dry_run:
        return
    checkpoint.prepare(args.output_dir)


if __name__ == "__main__":
    sys.exit(main())
