"""Long-Range Arena's Image, Pathfinder and Retrieval, from the files that the benchmark uses."""

from __future__ import annotations

import argparse
import io
import random
import re
from collections.abc import Iterator

from .. import UsageError
from ..splits import Example, Splits
from . import files

SIDE = 32
PIXELS = SIDE * SIDE
CIFAR = re.compile(r"(?:^|/)(?:data_batch_[1-5]|test_batch)\.bin$")
CIFAR_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PATHFINDER = re.compile(r"(?:^|/)curv_contour_length_14/(?:metadata/\d+\.npy|imgs/\d+/[^/]+\.png)$")
PAIRS = re.compile(r"(?:^|/)new_aan_pairs\.(train|eval|test)\.tsv$")
GREY = (0.2989, 0.5870, 0.1140)  # weights of red, green and blue


def image(args: argparse.Namespace) -> Splits:
    """CIFAR-10's binary version: records of a label and 3 x 1024 bytes, which become 1024 grey ones."""
    batches = {name.rpartition("/")[2]: (name, content) for name, content in _cifar(args)}
    names = [f"data_batch_{number}.bin" for number in range(1, 6)]
    missing = [name for name in (*names, "test_batch.bin") if name not in batches]
    if missing:
        raise UsageError(
            f"--data-dir must hold CIFAR-10's binary version, {args.data_dir} lacks {missing[0]}; "
            "get cifar-10-binary.tar.gz and name it or its folder"
        )
    train = [example for name in names for example in _records(*batches[name])]
    count = len(train) * 9 // 10  # as the benchmark: the last tenth is for validation
    test = _records(*batches["test_batch.bin"])
    source = "Long-Range Arena Image: CIFAR-10, grey"
    return Splits(source, CIFAR_LABELS, train[:count], test, train[count:], tokens="bytes")


def pathfinder(args: argparse.Namespace) -> Splits:
    """pathfinder32/curv_contour_length_14: metadata/N.npy, which are lines of text, and the pictures that they name."""
    found = dict(files.members(args.data_dir, PATHFINDER, ("metadata/*.npy", "imgs/*/*.png", *_below("*/"))))
    pictures = {"/".join(name.split("/")[-3:]): content for name, content in found.items() if name.endswith(".png")}
    examples: list[Example] = []
    for name in sorted(name for name in found if name.endswith(".npy")):
        for number, line in enumerate(files.decode(found[name], name).split("\n"), 1):
            fields = line.split(" ")
            if not line.strip():
                continue
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise UsageError(
                    f"{name} must say folder, picture, number and label 0 or 1 in each line, line {number} is "
                    f"{line!r:.60}; get the benchmark's files again"
                )
            picture = pictures.get(f"{fields[0]}/{fields[1]}")
            if picture is None:
                raise UsageError(f"{name} names {fields[0]}/{fields[1]}, which is missing; get the files again")
            if picture:  # the release holds empty files, which the benchmark skips
                examples.append((_pixels(picture, f"{fields[0]}/{fields[1]}"), int(fields[3])))
    if not examples:
        raise UsageError(
            f"--data-dir must hold curv_contour_length_14 with metadata and imgs, {args.data_dir} does not; "
            "name pathfinder32 of lra_release"
        )
    random.Random(0).shuffle(examples)  # whatever the seed of the run: the splits stay what they are
    a, b = len(examples) * 8 // 10, len(examples) * 9 // 10
    source = "Long-Range Arena Pathfinder, 32 x 32, hard"
    return Splits(source, ("apart", "connected"), examples[:a], examples[b:], examples[a:b], tokens="bytes")


def retrieval(args: argparse.Namespace) -> Splits:
    """new_aan_pairs.{train,eval,test}.tsv: label, two identifiers, two papers; are they related?"""
    splits: dict[str, list[Example]] = {}
    for name, content in files.members(args.data_dir, PAIRS, ("*.tsv", "*/*.tsv")):
        found = PAIRS.search(name)
        assert found
        examples = splits.setdefault(found[1], [])
        for number, line in enumerate(files.rows(files.decode(content, name)), 1):
            label = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}.get(line[0])
            if len(line) != 5 or label is None:
                raise UsageError(
                    f"{name} must have label 0 or 1, two identifiers and two texts per line, line {number} has "
                    f"{len(line)} columns and label {line[0]!r:.20}; get the benchmark's files again"
                )
            examples.append(((line[3].encode(), line[4].encode()), label))
    missing = [name for name in ("train", "eval", "test") if not splits.get(name)]
    if missing:
        raise UsageError(
            f"--data-dir must hold new_aan_pairs.{missing[0]}.tsv, {args.data_dir} does not; name tsv_data of "
            "lra_release"
        )
    source = "Long-Range Arena Retrieval (AAN)"
    labels = ("unrelated", "related")
    return Splits(source, labels, splits["train"], splits["test"], splits["eval"], tokens="bytes")


def _below(prefix: str) -> tuple[str, ...]:
    return tuple(f"{up}curv_contour_length_14/{tail}" for up in ("", prefix) for tail in ("metadata/*.npy", "imgs/*/*"))


def _cifar(args: argparse.Namespace) -> Iterator[tuple[str, bytes]]:
    return files.members(args.data_dir, CIFAR, ("*.bin", "*/*.bin"))


def _records(name: str, content: bytes) -> list[Example]:
    size = 1 + 3 * PIXELS
    if not content or len(content) % size or max(content[::size]) >= len(CIFAR_LABELS):
        raise UsageError(
            f"{name} must consist of records of {size} bytes that begin with a label below {len(CIFAR_LABELS)}, its "
            f"{len(content)} bytes do not; get cifar-10-binary.tar.gz again"
        )
    return [(_grey(content[i + 1 : i + size]), content[i]) for i in range(0, len(content), size)]


def _grey(planes: bytes) -> bytes:
    """Three planes -> one, as the benchmark's image library converts: a step in [0, 1], then 255.5 levels, cut off."""
    import numpy as np

    colours = np.frombuffer(planes, np.uint8).reshape(3, -1).astype(np.float32) / 255
    return np.minimum(np.array(GREY, np.float32) @ colours * 255.5, 255).astype(np.uint8).tobytes()


def _pixels(content: bytes, name: str) -> bytes:
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(content), formats=["PNG"])
        if picture.size == (SIDE, SIDE):
            return picture.convert("L").tobytes()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UsageError(f"{name} must be an intact PNG, it is not: {error}; get the files again") from error
    raise UsageError(f"{name} must have {SIDE} x {SIDE} pixels, it has {picture.size}; name pathfinder32")
