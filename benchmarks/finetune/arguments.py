"""The command line. Names follow run_glue.py and TrainingArguments where these have the option."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from . import UsageError
from .data import TASKS
from .model import ATTENTIONS

POSITIVE = (
    "num_landmarks", "max_length", "max_positions", "epochs", "max_steps", "batch_size", "eval_batch_size",
    "learning_rate", "d_model", "layers", "heads", "feedforward", "vocab_size", "threads", "checkpoint_every",
    "max_train", "max_test",
)  # fmt: skip
# What may differ between an interrupted run and the run that resumes it.
FREE = ("data_dir", "output_dir", "resume", "checkpoint_every", "eval_batch_size", "write_synthetic")


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of ending the program."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the options")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default is not None else action.help


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check; raises UsageError on bad values."""
    args = _build().parse_args(argv)
    args.task = args.task or ("imdb" if args.data_dir else "synthetic")
    _check(args)
    return args


def config(args: argparse.Namespace) -> dict[str, object]:
    """The options that decide the result; all of them plain values."""
    return {name: value for name, value in sorted(vars(args).items()) if name not in FREE}


def _build() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks.finetune",
        description="Train and evaluate a text classifier with softmax and with Nyström attention, side by side.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("data").add_argument
    add("--task", choices=sorted(TASKS), help="default: imdb with --data-dir, synthetic without")
    add("--data-dir", type=Path, help="data set folder, or a tar archive of it (read in place)")
    add("--max-train", type=int, help="use a balanced random subset of this size; synthetic: how many to generate")
    add("--max-test", type=int, help="as --max-train, for the test split")
    add("--max-length", type=int, default=1024, help="tokens kept of each text")
    add("--vocab-size", type=int, default=8192, help="words the tokenizer learns from the training texts")
    add("--write-synthetic", type=Path, metavar="DIR", help="write the synthetic set in the aclImdb format, and stop")

    add = parser.add_argument_group("model").add_argument
    add("--attention", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS), help="arms to train side by side")
    add("--num-landmarks", type=int, default=64, help="landmarks of the Nyström arm")
    add("--d-model", type=int, default=64, help="features per token")
    add("--layers", type=int, default=2, help="encoder layers")
    add("--heads", type=int, default=2, help="attention heads")
    add("--feedforward", type=int, default=128, help="hidden features of the feed-forward block")
    add("--dropout", type=float, default=0.0, help="dropout probability")
    add("--max-positions", type=int, default=4096, help="rows of the position table, the limit for --max-length")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=1, help="passes over the training texts")
    add("--max-steps", type=int, help="optimizer steps; overrides --epochs")
    add("--batch-size", type=int, default=16, help="texts per step")
    add("--eval-batch-size", type=int, default=16, help="texts per evaluation batch")
    add("--learning-rate", type=float, default=3e-3, help="peak of the schedule: linear warm-up, linear decay")
    add("--weight-decay", type=float, default=0.01, help="AdamW weight decay")
    add("--seed", type=int, default=0, help="decides data, initial values, batches and dropout")
    add("--threads", type=int, help="CPU threads; default: torch's choice")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")

    add = parser.add_argument_group("output").add_argument
    add("--output-dir", type=Path, default=Path("runs/finetune"), help="gets results, figure, tokenizer, checkpoint")
    add("--checkpoint-every", type=int, default=50, help="steps between checkpoints")
    add("--resume", action="store_true", help="continue from the checkpoint in --output-dir")
    return parser


def _check(args: argparse.Namespace) -> None:
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UsageError(f"{_flag(name)} must be greater than 0, got {value}; leave it out for the default")
    if args.max_length > args.max_positions:
        raise UsageError(
            f"--max-length must not exceed the position table, got {args.max_length} > {args.max_positions}; "
            "lower --max-length or raise --max-positions"
        )
    if args.d_model % args.heads:
        raise UsageError(f"--d-model must be divisible by --heads, got {args.d_model} and {args.heads}; change one")
    if not 0 <= args.dropout < 1:
        raise UsageError(f"--dropout must be in [0, 1), got {args.dropout}; 0 switches it off")
    if not args.weight_decay >= 0:
        raise UsageError(f"--weight-decay must not be negative, got {args.weight_decay}; 0 switches it off")
    if not 0 <= args.seed < 2**31:
        raise UsageError(f"--seed must be in [0, 2**31), got {args.seed}; choose a smaller one")
    if len(set(args.attention)) < len(args.attention):
        raise UsageError(f"--attention must not repeat, got {' '.join(args.attention)}; name each once")
    if (args.data_dir is None) != (args.task == "synthetic"):
        rule = "needs" if args.data_dir is None else "takes no"
        raise UsageError(f"--task {args.task} {rule} --data-dir, got {args.data_dir}; change one")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
