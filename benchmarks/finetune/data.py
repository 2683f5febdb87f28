"""Readers of the data sets, the tokenizer and the batches.

A task is one function of the arguments that returns :class:`Splits`; to add one, write it and register it in ``TASKS``.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import random
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from . import UsageError, synthetic

Example = tuple[str, int]  # text, label
PAD, UNKNOWN = 0, 1  # token numbers
MAX_DEV = 2000
REVIEW = re.compile(r"(?:^|/)(train|test)/(neg|pos)/\d+_\d+\.txt$")


@dataclass
class Splits:
    """Examples of each split; a reader leaves ``dev`` empty when the data set has none."""

    source: str  # one line: what the data are
    labels: tuple[str, ...]
    train: list[Example]
    test: list[Example]
    dev: list[Example] = field(default_factory=list)

    def fingerprint(self) -> str:
        """Changes with any text, label or order: a run must resume on the data it began with."""
        digest = hashlib.sha256()
        for name in ("train", "dev", "test"):
            for text, label in getattr(self, name):
                digest.update(f"{name}\0{label}\0{text}\0".encode())
        return digest.hexdigest()


def load(args: argparse.Namespace) -> Splits:
    """Read the task, apply --max-train and --max-test, and hold out a tenth of train where there is no dev split."""
    splits = TASKS[args.task](args)
    if not splits.dev:
        used = min(args.max_train or len(splits.train), len(splits.train))
        splits.dev, splits.train = _take(splits.train, min(MAX_DEV, max(2, used // 10)), args.seed)
    if args.max_train:
        splits.train, _ = _take(splits.train, args.max_train, args.seed)
    if args.max_test:
        splits.test, _ = _take(splits.test, args.max_test, args.seed)
    for name in ("train", "dev", "test"):
        present = {label for _, label in getattr(splits, name)}
        for number, label in enumerate(splits.labels):
            if number not in present:
                raise UsageError(f"the {name} split must have every class, it has no {label}; use more examples")
    return splits


def _take(examples: list[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(a balanced random subset of up to ``count``, the rest), both in the original order."""
    labels = sorted({label for _, label in examples})
    chosen: set[int] = set()
    for rank, label in enumerate(labels):
        indices = [i for i, example in enumerate(examples) if example[1] == label]
        random.Random(f"{seed} {label}").shuffle(indices)
        chosen.update(indices[: (count + len(labels) - 1 - rank) // len(labels)])
    return [x for i, x in enumerate(examples) if i in chosen], [x for i, x in enumerate(examples) if i not in chosen]


# ---- tasks


def _synthetic(args: argparse.Namespace) -> Splits:
    train, test = (
        [(_clean(text), label) for text, label in sorted(reviews, key=lambda review: review[1])]
        for reviews in synthetic.generate(args.max_length, args.seed, args.max_train, args.max_test).values()
    )
    source = "SYNTHETIC reviews made by this program, no evidence about real text"
    return Splits(source, ("neg", "pos"), train, test)


def _imdb(args: argparse.Namespace) -> Splits:
    """aclImdb: {train,test}/{pos,neg}/ID_RATING.txt in a folder or a tar archive; anything else in it is ignored."""
    path: Path = args.data_dir
    if not path.exists():
        raise UsageError(f"--data-dir must exist, got {path}; download aclImdb_v1.tar.gz and name it or its folder")
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, content in _folder(path) if path.is_dir() else _archive(path):
        split, label, file = name.split("/")[-3:]
        found.setdefault((split, label), []).append((file, _decode(content, name)))
    splits: dict[str, list[Example]] = {"train": [], "test": []}
    for split, examples in splits.items():
        for number, label in enumerate(("neg", "pos")):
            if (split, label) not in found:
                raise UsageError(
                    f"every class needs reviews named ID_RATING.txt, none in {split}/{label} of {path}; "
                    "name the folder that holds train and test"
                )
            examples += [(_clean(text), number) for _, text in sorted(found[split, label])]
    return Splits("Large Movie Review Dataset (aclImdb)", ("neg", "pos"), splits["train"], splits["test"])


TASKS: dict[str, Callable[[argparse.Namespace], Splits]] = {"imdb": _imdb, "synthetic": _synthetic}


def _folder(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each review below ``path``, or below its folder aclImdb."""
    root = path / "aclImdb" if (path / "aclImdb").is_dir() else path
    for file in root.glob("t*/*/*.txt"):
        if REVIEW.search(file.as_posix()):
            try:
                yield file.as_posix(), file.read_bytes()
            except OSError as error:
                raise UsageError(f"every review must be readable, {file}: {error.strerror}; repair it") from error


def _archive(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member) if REVIEW.search(member.name) else None
                if stream:
                    yield member.name, stream.read()
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise UsageError(f"--data-dir must be a folder or an intact tar, {path}: {error}; get it again") from error


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"reviews must be UTF-8, {name} is not at byte {error.start}; repair or remove it") from error


def _clean(text: str) -> str:
    return " ".join(text.replace("<br />", " ").split())


# ---- tokens


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Lower-cased words and punctuation marks; the most frequent ``vocab_size`` of them, special tokens included."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, show_progress=False, special_tokens=["[PAD]", "[UNK]"])
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


class Encoded:
    """A split as token numbers. ``batch`` gives ids (B, n) padded to the longest text in the batch, and labels (B,)."""

    def __init__(self, examples: list[Example], tokenizer: Tokenizer, max_length: int) -> None:
        tokenizer.enable_truncation(max_length)
        encodings = tokenizer.encode_batch([text for text, _ in examples])
        self.ids = [torch.tensor(encoding.ids or [UNKNOWN], dtype=torch.int32) for encoding in encodings]
        self.labels = torch.tensor([label for _, label in examples])
        self._order: tuple[str, list[int]] = ("", [])  # of the current epoch

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([self.ids[i] for i in indices], batch_first=True, padding_value=PAD)
        return ids, self.labels[indices]

    def training_batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """The batch of a step: a function of step and seed alone, so that a resumed run sees the same ones."""
        epoch, position = divmod(step, self.steps_per_epoch(batch_size))
        key = f"{seed} {epoch}"
        if key != self._order[0]:
            self._order = key, random.Random(key).sample(range(len(self)), len(self))
        return self.batch(self._order[1][position * batch_size : (position + 1) * batch_size])

    def steps_per_epoch(self, batch_size: int) -> int:
        return -(-len(self) // batch_size)

    def evaluation_batches(self, batch_size: int) -> list[list[int]]:
        """Indices of texts of similar length together, which keeps padding small."""
        order = sorted(range(len(self)), key=lambda i: len(self.ids[i]))
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
