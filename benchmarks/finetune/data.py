"""Which task reads what, the tokenizer of models from scratch, and the batches.

To add a task, write its reader in :mod:`.tasks` and name it in ``TASKS``.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from . import UsageError
from .splits import Example, Splits, Text, parts
from .tasks import glue, listops, lra, reviews, tables

PAD, UNKNOWN = 0, 1  # token numbers
BYTES = 2 + 256  # vocabulary of the tasks whose tokens are bytes
MAX_DEV = 2000

TASKS: dict[str, Callable[[argparse.Namespace], Splits]] = {
    "imdb": reviews.imdb,
    **dict.fromkeys(glue.LAYOUTS, glue.read),
    "lra-listops": listops.read,
    "lra-text": reviews.lra_text,
    "lra-image": lra.image,
    "lra-pathfinder": lra.pathfinder,
    "lra-retrieval": lra.retrieval,
    "synthetic": reviews.synthetic_reviews,
    "files": tables.read_files,
    "hub": tables.read_hub,
}


def load(args: argparse.Namespace) -> Splits:
    """Read the task, apply --max-train and --max-test, and hold out a tenth of train where there is no dev split.

    Where test has no labels, dev takes its place; nothing is ever chosen by it.
    """
    splits = TASKS[args.task](args)
    classes = bool(splits.labels)
    if not splits.test:
        splits.test = splits.dev
    if args.max_test:
        same = splits.dev is splits.test
        splits.test, _ = _take(splits.test, args.max_test, args.seed, classes)
        splits.dev = splits.test if same else _take(splits.dev, args.max_test, args.seed, classes)[0]
        splits.further = {name: _take(x, args.max_test, args.seed, classes)[0] for name, x in splits.further.items()}
    if not splits.dev:
        used = min(args.max_train or len(splits.train), len(splits.train))
        splits.dev, splits.train = _take(splits.train, min(MAX_DEV, max(2, used // 10)), args.seed, classes)
    if not splits.test:
        splits.test, splits.evaluated = splits.dev, "a held-out part of train"
    if args.max_train:
        splits.train, _ = _take(splits.train, args.max_train, args.seed, classes)
    for name in ("train", "dev", "test"):
        if not getattr(splits, name):
            raise UsageError(f"the {name} split must have examples, it has none; use more examples")
    if classes and len({label for _, label in splits.train}) < 2:
        raise UsageError("the train split must have two classes or more, it has one; use more examples")
    return splits


def empty_texts(splits: Splits) -> int:
    examples = splits.train + splits.dev + splits.test
    return sum(not any(part.strip() for part in parts(text)) for text, _ in examples)


def _take(examples: list[Example], count: int, seed: int, classes: bool) -> tuple[list[Example], list[Example]]:
    """(a random subset of up to ``count`` in which classes keep their shares, the rest), both in the original order."""
    groups: dict[float, list[int]] = {}
    for i, (_, label) in enumerate(examples):
        groups.setdefault(label if classes else 0, []).append(i)
    chosen: set[int] = set()
    before = 0
    for label, indices in sorted(groups.items()):
        random.Random(f"{seed} {label}").shuffle(indices)
        ends = (before, before + len(indices))
        share = [(2 * count * n + len(examples)) // (2 * len(examples)) for n in ends]  # rounded
        chosen.update(indices[: share[1] - share[0]])
        before += len(indices)
    return [x for i, x in enumerate(examples) if i in chosen], [x for i, x in enumerate(examples) if i not in chosen]


# ---- tokens


def train_tokenizer(texts: list[Text], vocab_size: int, tokens: str = "words") -> Tokenizer:
    """The most frequent ``vocab_size`` tokens, special ones included: lower-cased words and punctuation marks, or
    "symbols", which stand between blanks. The texts of a pair are joined by [SEP]."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    pairs = any(isinstance(text, tuple) for text in texts)
    special = ["[PAD]", "[UNK]", *(["[SEP]"] if pairs else [])]
    if tokens == "words":
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, show_progress=False, special_tokens=special)
    tokenizer.train_from_iterator([part for text in texts for part in parts(text)], trainer, length=len(texts))
    if pairs:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A", pair="$A [SEP] $B", special_tokens=[("[SEP]", special.index("[SEP]"))]
        )
    return tokenizer


def encode(texts: list[Text], tokenizer: Tokenizer | None, max_length: int) -> list[list[Tensor]]:
    """Token numbers of each text; bytes, which need no tokenizer, of each of its parts."""
    if tokenizer is None:
        return [[_bytes(part, max_length) for part in parts(text)] for text in texts]
    tokenizer.enable_truncation(max_length)
    return [[_ids(encoding.ids)] for encoding in tokenizer.encode_batch(texts)]


def _bytes(part: str | bytes, max_length: int) -> Tensor:
    content = part.encode() if isinstance(part, str) else part
    return _ids([byte + 2 for byte in content[:max_length]])


def _ids(ids: list[int]) -> Tensor:
    return torch.tensor(ids or [UNKNOWN], dtype=torch.int32)


class Encoded:
    """A split as token numbers. ``batch`` gives ids (B, n), or (B, 2, n) for pairs of bytes, padded to the longest text
    in the batch, and labels (B,)."""

    def __init__(self, examples: list[Example], tokenizer: Tokenizer | None, max_length: int) -> None:
        self.ids = encode([text for text, _ in examples], tokenizer, max_length)
        self.lengths = [max(map(len, ids)) for ids in self.ids]
        self.labels = torch.tensor([label for _, label in examples])
        self._order: tuple[str, list[int]] = ("", [])  # of the current epoch

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        texts = [ids for i in indices for ids in self.ids[i]]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PAD)
        return ids if len(texts) == len(indices) else ids.unflatten(0, (len(indices), -1)), self.labels[indices]

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
        order = sorted(range(len(self)), key=lambda i: self.lengths[i])
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
