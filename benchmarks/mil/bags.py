"""Bags of handwritten digits, as whole slides are bags of patches: positive if one of them shows the digit asked for.

An instance is one of scikit-learn's 8 x 8 digits, shifted by up to a pixel, scaled and noisy. A bag's instances fill a
square grid row by row; those that make it positive are neighbours there, as a tumour's patches are. Test bags are made
from other images than training bags.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy as np
import torch
from torch import Tensor

FEATURES = 64
SPLITS = ("train", "test")
NOISE, SPREAD = 0.15, 0.4  # of the range of a pixel: what is added, and about the standard deviation
TRAIN_SHARE = 2 / 3  # of the images


@dataclass(frozen=True)
class Bag:
    """instances (1, n, FEATURES) float32, label (1,) 0 or 1, positive (n,) bool: which show the digit asked for."""

    instances: Tensor
    label: Tensor
    positive: Tensor


class Bags:
    """Bag ``number`` of a split depends on the seed, the split and the number alone; even ones are negative."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    @cached_property
    def _digits(self) -> tuple[np.ndarray, np.ndarray]:
        """Images with every shift (shifts, images, 8, 8) from 0 to 1, and what they show."""
        from sklearn.datasets import load_digits

        data = load_digits()
        padded = np.pad(data.images.astype(np.float32) / 16, ((0, 0), (1, 1), (1, 1)))
        shifted = [padded[:, row : row + 8, column : column + 8] for row in range(3) for column in range(3)]
        return np.stack(shifted), data.target

    def fingerprint(self) -> str:
        """Of what the bags are made from."""
        return hashlib.sha256(self._digits[0].tobytes() + self._digits[1].tobytes()).hexdigest()

    def bag(self, split: str, number: int) -> Bag:
        args = self.args
        random = np.random.default_rng([args.seed, SPLITS.index(split), number])
        n = int(random.integers(args.instances[0], args.instances[-1], endpoint=True))
        positive = np.zeros(n, dtype=bool)
        if number % 2:
            positive[_neighbours(n, max(1, round(args.share * n)), random)] = True
        shifted, shown = self._digits
        images = np.arange(len(shown))
        images = images[(images < TRAIN_SHARE * len(images)) == (split == "train")]
        with_digit, others = images[shown[images] == args.digit], images[shown[images] != args.digit]
        chosen = np.where(positive, random.choice(with_digit, n), random.choice(others, n))
        pixels = shifted[random.integers(len(shifted), size=n), chosen].reshape(n, FEATURES)
        pixels = pixels * random.uniform(0.7, 1.3, (n, 1)) + NOISE * random.standard_normal((n, FEATURES))
        centred = (pixels - shifted[:, images].mean((0, 1)).reshape(FEATURES)) / SPREAD
        instances = torch.from_numpy(centred.astype(np.float32))[None]
        return Bag(instances, torch.tensor([number % 2]), torch.from_numpy(positive))


def _neighbours(n: int, count: int, random: np.random.Generator) -> np.ndarray:
    """The ``count`` of n instances nearest to one of them on the grid."""
    side = ceil(n**0.5)
    row, column = np.divmod(np.arange(n), side)
    centre = random.integers(n)
    return np.argsort((row - row[centre]) ** 2 + (column - column[centre]) ** 2, kind="stable")[:count]
