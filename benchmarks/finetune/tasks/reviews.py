"""The Large Movie Review Dataset: as text, and byte by byte for Long-Range Arena."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from .. import UsageError, synthetic
from ..splits import Example, Splits
from . import files, tables

REVIEW = re.compile(r"(?:^|/)(train|test)/(neg|pos)/\d+_\d+\.txt$")
LABELS = ("neg", "pos")


def imdb(args: argparse.Namespace) -> Splits:
    """aclImdb: {train,test}/{pos,neg}/ID_RATING.txt, anything else in it is ignored; or tables of text and label."""
    if tables.found(args.data_dir, "imdb"):
        return tables.read_task(args.data_dir, "imdb", LABELS, ("text",))
    return _splits(args, clean)


def lra_text(args: argparse.Namespace) -> Splits:
    """The bytes of each review, as they are in the file."""
    splits = _splits(args, lambda text: text.encode())
    splits.source, splits.tokens = f"Long-Range Arena Text: bytes of the {splits.source}", "bytes"
    return splits


def synthetic_reviews(args: argparse.Namespace) -> Splits:
    made = synthetic.generate(args.max_length, args.seed, args.max_train, args.max_test)
    splits: dict[str, list[Example]] = {
        name: [(clean(text), label) for text, label in sorted(found, key=lambda review: review[1])]
        for name, found in made.items()
    }
    source = "SYNTHETIC reviews made by this program, no evidence about real text"
    return Splits(source, LABELS, splits["train"], splits["test"])


def write_generated(args: argparse.Namespace) -> None:
    reviews = synthetic.generate(args.max_length, args.seed, args.max_train, args.max_test)
    synthetic.write(args.write_data, reviews)


def clean(text: str) -> str:
    return " ".join(text.replace("<br />", " ").split())


def _splits(args: argparse.Namespace, convert: Callable[[str], str | bytes]) -> Splits:
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, content in files.members(args.data_dir, REVIEW, ("t*/*/*.txt", "aclImdb/t*/*/*.txt")):
        split, label, file = name.split("/")[-3:]
        found.setdefault((split, label), []).append((file, files.decode(content, name)))
    splits: dict[str, list[Example]] = {"train": [], "test": []}
    for split, examples in splits.items():
        for number, label in enumerate(LABELS):
            if (split, label) not in found:
                raise UsageError(
                    f"every class needs reviews named ID_RATING.txt, none in {split}/{label} of {args.data_dir}; "
                    "name the folder that holds train and test"
                )
            examples += [(convert(text), number) for _, text in sorted(found[split, label])]
    return Splits("Large Movie Review Dataset (aclImdb)", LABELS, splits["train"], splits["test"])
