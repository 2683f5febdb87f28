"""Long-Range Arena's ListOps: nested operations on digits, 500 to 2000 symbols long, whose value is the label.

The distribution is that of the benchmark's own generator: an operator with probability 1/4 above the greatest depth of
10, else a digit; 2 to 10 arguments; minimum, maximum, median (rounded down) or sum modulo 10; more than 500 and fewer
than 2000 digits, operators and closing brackets; no duplicates; 96,000 + 2,000 + 2,000 expressions.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from .. import UsageError
from ..splits import Example, Splits
from . import files

OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
END = "]"
DEPTH, ARGUMENTS, OPERATOR_CHANCE = 10, 10, 0.25
SHORTEST, LONGEST = 500, 2000  # both excluded
SIZES = {"train": 96_000, "val": 2_000, "test": 2_000}
LABELS = tuple(map(str, range(10)))
FILE = re.compile(r"(?:^|/)basic_(train|val|test)\.tsv$")


def read(args: argparse.Namespace) -> Splits:
    """basic_{train,val,test}.tsv of the benchmark, or expressions made here from the seed."""
    if args.data_dir is None:
        made = generate(args.seed, _sizes(args))
        source, splits = f"Long-Range Arena ListOps, generated from seed {args.seed}", made
    else:
        source, splits = "Long-Range Arena ListOps", _from_files(args.data_dir)
    examples: dict[str, list[Example]] = {
        name: [(symbols(text), value) for text, value in splits[name]] for name in SIZES
    }
    return Splits(source, LABELS, examples["train"], examples["test"], examples["val"], tokens="symbols")


def generate(seed: int, sizes: dict[str, int]) -> dict[str, list[tuple[str, int]]]:
    """(expression, value) of each split, in the notation of :func:`expression`; a test set of its own comes first, so
    that it stays the same whatever the size of train."""
    rng = random.Random(seed)
    seen: set[str] = set()
    splits: dict[str, list[tuple[str, int]]] = {}
    for name in sorted(sizes, key=("test", "val", "train").index):
        splits[name] = []
        while len(splits[name]) < sizes[name]:
            text, value, length = expression(rng)
            if SHORTEST < length < LONGEST and text not in seen:
                seen.add(text)
                splits[name].append((text, value))
    return splits


def expression(rng: random.Random, depth: int = 1) -> tuple[str, int, int]:
    """-> (text, value, symbols but parentheses). The text nests as in the benchmark's files: ( ( ( [MAX 2 ) 9 ) ] )"""
    if depth == DEPTH or rng.random() > OPERATOR_CHANCE:
        digit = rng.randrange(10)
        return str(digit), digit, 1
    arguments = [expression(rng, depth + 1) for _ in range(rng.randint(2, ARGUMENTS))]
    operator = rng.choice(tuple(OPERATORS))
    texts = [text for text, _, _ in arguments]
    text = "( " * (len(texts) + 1) + " ".join([operator, *(f"{text} )" for text in texts), END, ")"])
    return text, OPERATORS[operator]([value for _, value, _ in arguments]), 2 + sum(n for _, _, n in arguments)


def evaluate(text: str) -> int:
    """The value of an expression, with or without parentheses."""
    stack: list[tuple[str, list[int]]] = [("", [])]
    for symbol in symbols(text).split():
        if symbol in OPERATORS:
            stack.append((symbol, []))
        elif symbol == END:
            operator, values = stack.pop()
            stack[-1][1].append(OPERATORS[operator](values))
        else:
            stack[-1][1].append(int(symbol))
    ((_, (value,)),) = stack
    return value


def symbols(text: str) -> str:
    """Without the parentheses, which the brackets make redundant; the lengths are counted so."""
    return " ".join(symbol for symbol in text.split() if symbol not in "()")


def write_generated(args: argparse.Namespace) -> None:
    """The benchmark's files."""
    with files.new_folder(args.write_data) as root:
        for name, examples in generate(args.seed, _sizes(args)).items():
            lines = ["Source\tTarget", *(f"{text}\t{value}" for text, value in examples)]
            (root / f"basic_{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _sizes(args: argparse.Namespace) -> dict[str, int]:
    train, test = args.max_train or SIZES["train"], args.max_test or SIZES["test"]
    return {"train": train, "val": min(test, SIZES["val"]), "test": test}


def _from_files(folder: Path) -> dict[str, list[tuple[str, int]]]:
    splits: dict[str, list[tuple[str, int]]] = {}
    for name, content in files.members(folder, FILE, ("*.tsv", "*/*.tsv")):
        header, *lines = files.rows(files.decode(content, name)) or [[]]
        if header != ["Source", "Target"]:
            raise UsageError(f"{name} must have the columns Source and Target, got {header}; use the benchmark's files")
        found = FILE.search(name)
        assert found
        splits[found[1]] = []
        for number, line in enumerate(lines, 2):
            if len(line) != 2 or line[1] not in LABELS:
                raise UsageError(
                    f"{name} must hold an expression and a digit per line, line {number} has {line!r:.60}; repair it"
                )
            splits[found[1]].append((line[0], int(line[1])))
    missing = [name for name in SIZES if not splits.get(name)]
    if missing:
        raise UsageError(f"--data-dir must hold basic_{missing[0]}.tsv, {folder} does not; leave it out to generate")
    return splits
