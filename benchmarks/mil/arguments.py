"""The command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetune import UsageError
from benchmarks.finetune.arguments import Parser, normalised

from .model import ATTENTIONS

POSITIVE = (
    "instances", "share", "dim", "heads", "num_landmarks", "steps", "test_bags", "learning_rate", "threads",
    "checkpoint_every",
)  # fmt: skip
# What may differ between an interrupted run and the run that resumes it.
FREE = ("output_dir", "resume", "checkpoint_every")
SMALLEST = 16  # instances, of which PPEG's convolutions make something


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check; raises UsageError on bad values."""
    args = _build().parse_args(None if argv is None else normalised(argv))
    _check(args)
    args.attention.sort(key=ATTENTIONS.index)
    return args


def config(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide the result; all of them plain values."""
    return {name: value for name, value in sorted(vars(args).items()) if name not in FREE}


def _build() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks.mil",
        description="Train a TransMIL-style classifier of bags of digits with several kinds of attention, side by "
        "side, and draw what its class token attends to. A few minutes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("bags").add_argument
    add("--digit", type=int, default=3, help="a bag is positive if it holds this digit")
    add("--instances", type=int, nargs="+", default=[2000, 4000], help="of a bag: the number, or least and most")
    add("--share", type=float, default=0.1, help="of a positive bag's instances that show the digit")
    add("--test-bags", type=int, default=60, help="how many the models are tested on")
    add = parser.add_argument_group("model").add_argument
    add("--attention", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS), help="kinds to compare")
    add("--dim", type=int, default=128, help="features of a token")
    add("--heads", type=int, default=4, help="attention heads")
    add("--num-landmarks", type=int, default=64, help="landmarks; TransMIL has dim / 2")
    add("--dropout", type=float, default=0.1, help="behind the attention")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, default=160, help="optimizer steps, of one bag each")
    add("--learning-rate", type=float, default=1e-3, help="at its peak")
    add("--weight-decay", type=float, default=0.01, help="of AdamW")
    add("--warmup-steps", type=float, default=0.1, help="a number, or a share of the steps")
    add("--seed", type=int, default=0, help="of bags, initial values and dropout")
    add("--threads", type=int, help="CPU threads; default: torch's choice")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", type=Path, default=Path("runs/mil"), help="gets checkpoint, results and heat map")
    add("--checkpoint-every", type=int, default=25, help="steps between checkpoints")
    add("--resume", action="store_true", help="continue from the checkpoint in --output-dir")
    return parser


def _check(args: argparse.Namespace) -> None:
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not all(x > 0 for x in (value if isinstance(value, list) else [value])):
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            raise UsageError(f"{_flag(name)} must be greater than 0, got {shown}; leave it out for the default")
    for name in ("weight_decay", "warmup_steps"):
        if not getattr(args, name) >= 0:
            raise UsageError(f"{_flag(name)} must not be negative, got {getattr(args, name)}; 0 switches it off")
    if args.warmup_steps >= 1 and not args.warmup_steps.is_integer():
        raise UsageError(f"--warmup-steps must be whole or a share below 1, got {args.warmup_steps}; round it")
    if not 0 <= args.digit <= 9:
        raise UsageError(f"--digit must be one of 0 to 9, got {args.digit}; choose one")
    if len(args.instances) > 2 or args.instances[0] > args.instances[-1] or args.instances[0] < SMALLEST:
        shown = " ".join(map(str, args.instances))
        rule = f"--instances must be one number or the least and the most, from {SMALLEST}"
        raise UsageError(f"{rule}, got {shown}; write --instances 2000 4000")
    if not args.share <= 1:
        raise UsageError(f"--share must be at most 1, got {args.share}; 0.1 is every tenth instance")
    if not 0 <= args.dropout < 1:
        raise UsageError(f"--dropout must be in [0, 1), got {args.dropout}; 0 switches it off")
    if args.dim % args.heads:
        raise UsageError(f"--dim must be divisible by --heads, got {args.dim} and {args.heads}; change one")
    if args.test_bags < 2:
        raise UsageError(f"--test-bags must be at least 2, one of each kind, got {args.test_bags}; raise it")
    if not 0 <= args.seed < 2**31:
        raise UsageError(f"--seed must be in [0, 2**31), got {args.seed}; choose a smaller one")
    if len(set(args.attention)) < len(args.attention):
        raise UsageError(f"--attention must not repeat, got {' '.join(args.attention)}; name each once")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device must be usable, got {args.device}: {error}; choose another") from error


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
