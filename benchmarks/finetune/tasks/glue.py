"""GLUE: the official TSV files, whose layout differs from task to task, or tables as the Hub has them."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from typing import Any

from .. import UsageError
from ..splits import Example, Splits, Text
from . import files, tables


@dataclass(frozen=True)
class Layout:
    """Columns by number, from 0, because headers vary between copies; ``keys`` and ``hub_labels`` are the Hub's."""

    folder: str
    columns: tuple[int, ...]
    label: int
    test_columns: tuple[int, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    keys: tuple[str, ...]
    header: bool = True  # of train and dev; test always has one
    skip_short_lines: bool = False
    dev: tuple[str, ...] = ("dev",)
    test: tuple[str, ...] = ("test",)
    hub_labels: tuple[str, ...] = ()  # where its numbers mean something else


YES_NO, ENTAILMENT, MNLI = ("0", "1"), ("entailment", "not_entailment"), ("contradiction", "entailment", "neutral")
ACCURACY, PAIR = ("accuracy",), ("sentence1", "sentence2")
LAYOUTS = {
    "cola": Layout("CoLA", (3,), 1, (1,), YES_NO, ("matthews",), ("sentence",), header=False),
    "sst2": Layout("SST-2", (0,), 1, (1,), YES_NO, ACCURACY, ("sentence",)),
    "mrpc": Layout("MRPC", (3, 4), 0, (3, 4), YES_NO, ("f1", "accuracy"), PAIR),
    "stsb": Layout("STS-B", (7, 8), -1, (7, 8), (), ("pearson", "spearman"), PAIR),
    "qqp": Layout(
        "QQP", (3, 4), 5, (1, 2), YES_NO, ("f1", "accuracy"), ("question1", "question2"), skip_short_lines=True
    ),
    "mnli": Layout(
        "MNLI", (8, 9), -1, (8, 9), MNLI, ACCURACY, ("premise", "hypothesis"),
        dev=("dev_matched", "dev_mismatched"), test=("test_matched", "test_mismatched"),
        hub_labels=("entailment", "neutral", "contradiction"),
    ),
    "qnli": Layout("QNLI", (1, 2), -1, (1, 2), ENTAILMENT, ACCURACY, ("question", "sentence")),
    "rte": Layout("RTE", (1, 2), -1, (1, 2), ENTAILMENT, ACCURACY, PAIR),
    "wnli": Layout("WNLI", (1, 2), -1, (1, 2), YES_NO, ACCURACY, PAIR),
}  # fmt: skip


def read(args: argparse.Namespace) -> Splits:
    """Trains on train and evaluates on dev, as everybody does: the labels of test are not public."""
    layout = LAYOUTS[args.task]
    options: dict[str, Any] = {"metrics": layout.metrics, "evaluated": layout.dev[0]}
    if tables.found(args.data_dir, args.task):
        hub = layout.hub_labels or layout.labels
        splits = tables.read_task(args.data_dir, args.task, layout.labels, layout.keys, hub)
        if not splits.dev and not splits.test:
            raise UsageError(f"{args.task} must have a validation table, {args.data_dir} has none; add one")
        splits.dev, splits.test, splits.metrics, splits.evaluated = splits.dev or splits.test, [], *options.values()
        return splits
    names = ("train", *layout.dev, *layout.test)
    folder = layout.folder.replace("-", "-?")
    wanted = re.compile(rf"(?:^|/){folder}/({'|'.join(names)})\.tsv$", re.IGNORECASE)
    found = {
        name.rpartition("/")[2][:-4].lower(): (name, files.decode(content, name))
        for name, content in files.members(args.data_dir, wanted, ("*.tsv", "*/*.tsv", "glue_data/*/*.tsv"))
    }
    missing = [name for name in ("train", *layout.dev) if name not in found]
    if missing:
        raise UsageError(
            f"{args.task} needs {layout.folder}/{{{','.join(('train', *layout.dev))}}}.tsv, {args.data_dir} lacks "
            f"{', '.join(missing)}; name the folder or archive that holds {layout.folder}"
        )
    examples = {name: _labelled(layout, *found[name]) for name in ("train", *layout.dev)}
    unlabelled = {name: _unlabelled(layout, *found[name]) for name in layout.test if name in found}
    further = {name: examples[name] for name in layout.dev[1:]}
    source = f"GLUE {layout.folder}"
    dev = examples[layout.dev[0]]
    return Splits(source, layout.labels, examples["train"], [], dev, further, unlabelled, **options)


def _labelled(layout: Layout, name: str, text: str) -> list[Example]:
    lines = list(enumerate(files.rows(text), 1))
    if layout.header:
        (_, header), *lines = lines or [(1, [""])]
        if header[layout.label : layout.label + 1 or None] and _is_label(layout, header[layout.label]):
            raise UsageError(f"{name} must begin with a header line, got a labelled example; restore the header")
    needed = max(*layout.columns, layout.label) + 1
    examples: list[Example] = []
    for number, line in lines:
        if len(line) < needed:
            if layout.skip_short_lines:
                continue
            raise UsageError(
                f"{name} must have at least {needed} columns between tabs, line {number} has {len(line)}; "
                f"use the official {layout.folder} files"
            )
        examples.append((_text(line, layout.columns), _label(layout, line[layout.label], f"{name} line {number}")))
    if not examples:
        raise UsageError(f"{name} must have examples, it has none; get the file again")
    return examples


def _unlabelled(layout: Layout, name: str, text: str) -> list[Text]:
    needed = max(layout.test_columns) + 1
    lines = files.rows(text)[1:]
    for number, line in enumerate(lines, 2):
        if len(line) < needed:
            raise UsageError(f"{name} must have at least {needed} columns, line {number} has {len(line)}; restore it")
    return [_text(line, layout.test_columns) for line in lines]


def _text(line: list[str], columns: tuple[int, ...]) -> Text:
    return line[columns[0]] if len(columns) == 1 else (line[columns[0]], line[columns[1]])


def _is_label(layout: Layout, value: str) -> bool:
    try:
        _label(layout, value, "")
    except UsageError:
        return False
    return True


def _label(layout: Layout, value: str, where: str) -> float:
    if layout.labels:
        if value not in layout.labels:
            raise UsageError(
                f"a label must be one of {', '.join(layout.labels)}, {where} has {value!r}; use the official "
                f"{layout.folder} files"
            )
        return layout.labels.index(value)
    try:
        score = float(value)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:
        raise UsageError(f"a score must be a number from 0 to 5, {where} has {value!r}; repair the line")
    return score
