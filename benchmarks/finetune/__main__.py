"""``python -m benchmarks.finetune``"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from tokenizers import Tokenizer

from . import UsageError, checkpoint, data, memory, model, report, synthetic, training
from .arguments import config, parse
from .checkpoint import write_atomically
from .interrupts import Interrupted, Interrupts


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, 2 after bad input, 128 + the number of the signal that ended the run."""
    interrupts = Interrupts()
    args: argparse.Namespace | None = None
    try:
        with interrupts.caught():
            args = parse(argv)
            if args.write_synthetic:
                reviews = synthetic.generate(args.max_length, args.seed, args.max_train, args.max_test)
                synthetic.write(args.write_synthetic, reviews)
                print(f"wrote {args.write_synthetic}")
            else:
                run(args, interrupts)
        return 0
    except UsageError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        kept = args and not args.write_synthetic and (args.output_dir / checkpoint.NAME).exists()
        way = "run the same command with --resume to continue" if kept else "nothing was begun"
        print(f"\ninterrupted by signal {interrupted.number}; {way}", file=sys.stderr)
        return 128 + interrupted.number


def run(args: argparse.Namespace, interrupts: Interrupts) -> None:
    _prepare(args)
    splits = data.load(args)
    tokenizer = _tokenizer(args, splits)
    sets = {name: data.Encoded(getattr(splits, name), tokenizer, args.max_length) for name in ("train", "dev", "test")}
    lengths = sorted(len(ids) for ids in sets["train"].ids)
    shape = (tokenizer.get_vocab_size(), len(splits.labels))
    print(f"data: {splits.source}")
    print("      " + ", ".join(f"{len(encoded):,} {name}" for name, encoded in sets.items()), end="; ")
    print(f"{lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}; {shape[0]:,} words")
    arms = [training.Arm.create(name, model.build(args, name, *shape), args) for name in args.attention]
    _train(args, arms, sets, splits.fingerprint(), interrupts)

    results: dict[str, Any] = {
        "task": args.task,
        "source": splits.source,
        "config": config(args),
        "versions": report.versions(),
        "threads": torch.get_num_threads(),
        "steps": len(arms[0].losses),
        "sizes": {name: len(encoded) for name, encoded in sets.items()} | {"vocab": shape[0], "longest": lengths[-1]},
        "arms": {arm.name: _evaluate(args, arm, sets["test"], shape) for arm in arms},
    }
    results["ratios"] = report.ratios(results["arms"])
    report.show(results)
    for path in report.write(args.output_dir, results):
        print(f"wrote {path}")


def _prepare(args: argparse.Namespace) -> None:
    """What can fail early must not fail late."""
    model.check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"--output-dir must be writable, {args.output_dir}: {error.strerror}"
        raise UsageError(f"{reason}; choose another") from error
    write_atomically(args.output_dir / ".writable", lambda file: None)
    (args.output_dir / ".writable").unlink()


def _tokenizer(args: argparse.Namespace, splits: data.Splits) -> Tokenizer:
    tokenizer = data.train_tokenizer([text for text, _ in splits.train], args.vocab_size)
    text = tokenizer.to_str(pretty=True)
    write_atomically(args.output_dir / "tokenizer.json", lambda file: file.write(text.encode()))
    return tokenizer


def _train(
    args: argparse.Namespace,
    arms: list[training.Arm],
    sets: dict[str, data.Encoded],
    fingerprint: str,
    interrupts: Interrupts,
) -> None:
    header = {"config": config(args), "fingerprint": fingerprint}
    if args.resume:
        state = checkpoint.load(args.output_dir, config(args), fingerprint)
        for arm in arms:
            arm.restore(state["arms"][arm.name])
        print(f"resuming after step {len(arms[0].losses)}")
    elif (args.output_dir / checkpoint.NAME).exists():
        print(f"starting afresh: replaces the checkpoint in {args.output_dir} (--resume continues from it)")

    def save() -> None:
        checkpoint.save(args.output_dir, {**header, "arms": {arm.name: arm.state() for arm in arms}})

    training.train(arms, sets["train"], sets["dev"], args, interrupts, save)


def _evaluate(
    args: argparse.Namespace, arm: training.Arm, test: data.Encoded, shape: tuple[int, int]
) -> dict[str, Any]:
    start = time.perf_counter()
    accuracy = training.accuracy(arm, test, args, f"test, {arm.name}")
    return {
        "parameters": sum(p.numel() for p in arm.model.parameters()),
        "test_accuracy": accuracy,
        "test_seconds": time.perf_counter() - start,
        "dev_accuracy": {str(step): value for step, value in arm.dev.items()},
        "median_seconds_per_step": statistics.median(arm.seconds),
        "peak_memory_bytes": memory.measure(args, arm.name, *shape),
        "losses": arm.losses,
        "seconds": arm.seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
