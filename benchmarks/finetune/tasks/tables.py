"""CSV, TSV, JSON and parquet files, and data sets of the Hub, read with Hugging Face's datasets."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import UsageError
from ..splits import Example, Splits, Text

KINDS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
ROLES = {"train": "train", "validation": "dev", "dev": "dev", "test": "test"}
TEXTS = (("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("sentence",), ("text",))


def found(folder: Path | None, task: str) -> dict[str, list[Path]]:
    """Split -> table files ``[TASK/][data/]SPLIT*.{parquet,csv,json,jsonl}`` below ``folder``, .tsv excepted."""
    tables: dict[str, list[Path]] = {}
    if folder is None or not folder.is_dir():
        return tables
    places = [folder / task, folder / task / "data", folder, folder / "data"]
    place = next((p for p in places if any(f.suffix in KINDS and f.suffix != ".tsv" for f in _files(p))), None)
    for file in sorted(_files(place)) if place else ():
        split = file.name.partition(".")[0].partition("-")[0]
        if file.suffix in KINDS and file.suffix != ".tsv" and split.split("_")[0] in ROLES:
            tables.setdefault(split, []).append(file)
    return tables if "train" in tables else {}


def read_task(
    folder: Path, task: str, labels: tuple[str, ...], keys: tuple[str, ...], numbering: tuple[str, ...] = ()
) -> Splits:
    """``numbering``: what the numbers in the label column mean where the tables do not say."""
    tables = {split: _load(paths) for split, paths in found(folder, task).items()}
    return _splits(f"{task}, tables", tables, keys, labels, numbering or labels)


def read_files(args: argparse.Namespace) -> Splits:
    """--train-file and the like: column "label", and the texts in named columns or else in the first ones."""
    given = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    return _splits(str(args.train_file.name), {split: _load([path]) for split, path in given.items() if path})


def read_hub(args: argparse.Namespace) -> Splits:
    import datasets

    name = " ".join(filter(None, (args.dataset_name, args.dataset_config_name)))
    try:
        tables = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
    except Exception as error:  # of many libraries
        raise UsageError(
            f"--dataset-name must be a data set that the Hub or the local cache has, got {name}: "
            f"{str(error).splitlines()[0]}; use --train-file with local files"
        ) from error
    return _splits(name, dict(tables))


def _files(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.is_file()] if place.is_dir() else []


def _load(paths: list[Path]) -> Any:
    import datasets

    kinds = {KINDS.get(path.suffix) for path in paths}
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UsageError(f"a data file must exist, got {missing[0]}; name an existing one")
    (kind,) = kinds if len(kinds) == 1 else (None,)
    if kind is None:
        raise UsageError(f"a data file must be one of {', '.join(KINDS)}, got {paths[0]}; convert it")
    options = {"sep": "\t", "quoting": 3} if paths[0].suffix == ".tsv" else {}  # 3: quotes mean themselves
    read = getattr(datasets.Dataset, f"from_{kind}")
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:  # where datasets would keep an Arrow copy
            return read([str(path) for path in paths], cache_dir=cache, keep_in_memory=True, **options)
    except Exception as error:  # of pandas, pyarrow and datasets, in many kinds
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{paths[0]} must be an intact {kind} file: {reason[0]}; repair or export it again") from error


def _splits(
    source: str,
    tables: dict[str, Any],
    keys: tuple[str, ...] = (),
    labels: tuple[str, ...] | None = None,
    numbering: tuple[str, ...] = (),
) -> Splits:
    tables = {split: table for split, table in tables.items() if split.split("_")[0] in ROLES}
    if "train" not in tables:
        raise UsageError(f"the data must have a split named train, {source} has {', '.join(tables)}; name one so")
    train = tables["train"]
    keys = keys or _keys(train.column_names, source)
    for split, table in tables.items():
        missing = [name for name in (*keys, *(["label"] if split == "train" else [])) if name not in table.column_names]
        if missing:
            raise UsageError(
                f"{source}, {split}, must have the columns {', '.join(keys)} and label, it lacks {', '.join(missing)} "
                f"and has {', '.join(table.column_names)}; rename them"
            )
    numbering = tuple(getattr(train.features["label"], "names", None) or numbering)
    if labels is None:
        labels = numbering or _labels(train["label"])
    splits = Splits(source, labels, [], [], metrics=("accuracy",) if labels else ("pearson", "spearman"))
    for split, table in tables.items():
        texts: list[Text] = [_text(row, keys, f"{source}, {split}") for row in table.select_columns(list(keys))]
        role = ROLES[split.split("_")[0]]
        if "label" not in table.column_names or set(table["label"]) <= {-1, None}:
            splits.unlabelled[split] = texts
            continue
        numbers = [_number(x, labels, numbering, f"{source}, {split}") for x in table["label"]]
        examples: list[Example] = list(zip(texts, numbers, strict=True))
        if getattr(splits, role):  # as MNLI's mismatched
            splits.further[split] = examples
        else:
            setattr(splits, role, examples)
    splits.evaluated = "test" if splits.test or not splits.dev else "validation"
    return splits


def _keys(columns: list[str], source: str) -> tuple[str, ...]:
    for keys in TEXTS:
        if set(keys) <= set(columns):
            return keys
    first = tuple(name for name in columns if name not in ("label", "idx", "id"))[:2]
    if not first:
        raise UsageError(f"{source} must have a column of texts, it has {', '.join(columns)}; add one named text")
    return first


def _text(row: dict[str, Any], keys: tuple[str, ...], where: str) -> Text:
    texts = tuple(row[key] for key in keys)
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{where}: the columns {', '.join(keys)} must hold texts, got {texts!r:.80}; fill or drop it")
    return texts[0] if len(texts) == 1 else (texts[0], texts[1])


def _labels(values: Iterable[Any]) -> tuple[str, ...]:
    """() for scores, as in run_glue.py: a floating-point column is one."""
    distinct = set(values)
    if all(isinstance(value, float) for value in distinct):
        return ()
    return tuple(map(str, sorted(distinct, key=lambda x: (str(type(x)), x if isinstance(x, int) else str(x)))))


def _number(value: Any, labels: tuple[str, ...], numbering: tuple[str, ...], where: str) -> float:
    if not labels and isinstance(value, (int, float)):
        return float(value)
    name = str(value)
    if isinstance(value, int) and numbering and 0 <= value < len(numbering):
        name = numbering[value]
    if name not in labels:
        rule = f"one of {', '.join(labels)}" if labels else "a number"
        raise UsageError(f"a label must be {rule}, {where} has {value!r}; repair the file")
    return labels.index(name)
