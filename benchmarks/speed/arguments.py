"""The command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.finetune import UsageError
from benchmarks.finetune.arguments import Parser

from .cases import TABLES
from .peers import NAMES

POSITIVE = ("batch", "heads", "head_dim", "num_landmarks", "threads", "repeats", "seconds", "max_exact", "max_rivals")
QUICK = [512, 1024, 2048, 4096, 8192]
FULL = [*QUICK, 16384, 32768, 65536]


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default is None or isinstance(action.default, bool | list)
        return action.help if plain else super()._get_help_string(action)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse, fill in what depends on --full, and check; raises UsageError on bad values."""
    args = _build().parse_args(argv)
    args.lengths = args.lengths or (FULL if args.full else QUICK)
    args.tables = args.tables or (list(TABLES) if args.full else ["length"])
    args.max_exact = args.max_exact if args.max_exact is not None else (16384 if args.full else 8192)
    args.max_rivals = args.max_rivals if args.max_rivals is not None else (16384 if args.full else 8192)
    args.contestants.sort(key=NAMES.index)
    args.gradients = args.gradients or args.full
    args.check = args.check or args.strict
    _check(args)
    return args


def _build() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks.speed",
        description="Measure nystrom_attention beside what a user could pick instead. Minutes; --full: much longer.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what").add_argument
    add("--full", action="store_true", help=f"all tables, and lengths up to {FULL[-1]}")
    add(
        "--tables",
        nargs="+",
        choices=TABLES,
        metavar="TABLE",
        help=f"default: length; with --full all; {', '.join(TABLES)}",
    )
    add(
        "--contestants",
        nargs="+",
        choices=NAMES,
        default=list(NAMES),
        metavar="NAME",
        help=f"default: all; {'; '.join(NAMES)}",
    )
    add("--gradients", action="store_true", help="the backward pass by the gradients asked for; --full: always")
    add("--lengths", type=int, nargs="+", help="multiples of --num-landmarks, for the peers' sake")
    add("--batch", type=int, default=1, help="samples")
    add("--heads", type=int, default=8, help="heads")
    add("--head-dim", type=int, default=64, help="features per head")
    add("--num-landmarks", type=int, default=64, help="landmarks")
    add("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"], help="of the inputs")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--threads", type=int, help="CPU threads; default: torch's choice")

    add = parser.add_argument_group("how").add_argument
    add("--repeats", type=int, default=25, help="most runs of a contestant in a cell")
    add("--seconds", type=float, default=1.0, help="time budget of a contestant in a cell, after warm-up")
    add("--max-exact", type=int, help="longest sequence for exact attention; default: 8192, with --full 16384")
    add("--max-rivals", type=int, help="as --max-exact, for Linformer, Performer and Reformer")
    add("--no-memory", action="store_true", help="skip the memory table, which starts a process per number")

    add = parser.add_argument_group("result").add_argument
    add("--check", action="store_true", help="print the project's bars, each with what was measured")
    add("--strict", action="store_true", help="as --check, and exit with status 1 when one is missed")
    add("--output-dir", type=Path, default=Path("benchmarks/speed/results"), help="gets MACHINE.json and MACHINE.png")
    return parser


def _check(args: argparse.Namespace) -> None:
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not value > 0:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} must be greater than 0, got {value}; leave it out for the default")
    if bad := [n for n in args.lengths if n % args.num_landmarks or n <= args.num_landmarks]:
        rule = f"--lengths must be larger multiples of --num-landmarks {args.num_landmarks}"
        raise UsageError(f"{rule}, got {' '.join(map(str, bad))}; change one of them")
    for name in ("lengths", "contestants", "tables"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            raise UsageError(f"--{name} must not repeat, got {' '.join(map(str, values))}; name each once")
    if "nystrom_ext" not in args.contestants:
        raise UsageError("--contestants must contain nystrom_ext, to which all others are compared; add it")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device must be usable, got {args.device}: {error}; choose another") from error
