"""The tokens of one side of attention, their ranks and segments, and the band of those that are near one another.

Masks become numbers here and nothing is read on the host, so that sizes may be symbolic: `_composite` computes with it.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries in a block of the band, or the window if that is more: narrower blocks would be products of next to nothing.
BLOCK = 32


class Tokens:
    """The n tokens of one side in each of B samples, of which some are to be ignored.

    valid (B, n); count (B, 1); rank (B, n): the valid tokens in order, then the others; segments (B, 1): how many;
    segment (B, n): which, -1 for ignored ones; first (B, 1): tokens of lower rank are pinned.
    """

    def __init__(self, x: Tensor, ignored: Tensor | None, landmarks: int, pinned: int = 0) -> None:
        """x (B, H, n, d), ignored (B, n) bool. A sample of up to ``landmarks`` tokens has no pinned ones."""
        self.ignored = ignored
        everything = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device)
        self.valid = everything if ignored is None else ~ignored
        number = self.valid.long()
        self.count = number.sum(-1, keepdim=True)
        self.rank = torch.where(self.valid, number.cumsum(-1), self.count + (1 - number).cumsum(-1)) - 1
        self.segments = self.count.clamp(max=landmarks)
        # the j with j n // m <= rank < (j + 1) n // m
        segment = ((self.rank + 1) * self.segments - 1) // self.count.clamp(min=1)
        self.segment = torch.where(self.valid, segment, -1)
        self.first = (self.count > landmarks) * pinned

    def members(self, slots: int) -> Tensor:
        """(B, slots, n) bool: which tokens a landmark is the mean of."""
        slot = torch.arange(slots, device=self.rank.device)
        return (self.segment[:, None] == slot[:, None]) & (self.rank >= self.first)[:, None]

    def ends(self, slots: int) -> tuple[Tensor, Tensor]:
        """(B, slots) twice: a landmark's tokens are those of rank start .. end - 1."""
        slot = torch.arange(slots, device=self.rank.device)
        ends = [(j * self.count // self.segments.clamp(min=1)).minimum(self.count) for j in (slot, slot + 1)]
        return ends[0].maximum(self.first), ends[1].maximum(self.first)

    @functools.cached_property
    def order(self) -> Tensor:
        """(B, n): where the token of each rank is."""
        return torch.zeros_like(self.rank).scatter(1, self.rank, self.positions.expand_as(self.rank))

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.rank.shape[1], device=self.rank.device)

    def in_order(self, x: Tensor, most: int | None = None) -> Tensor:
        """x (B, H, n, d) by rank, or only its first ``most`` rows."""
        if self.ignored is None:
            return x if most is None else x[:, :, :most]
        return torch.take_along_dim(x, self.order[:, None, :most, None], 2)


class Band:
    """Each query beside the keys near it, for self-attention: O(n window) numbers.

    Queries in rank order fall into blocks of at least ``window``; a block's columns are the keys of its own, of the
    block before and of the one behind. Rows are in the order of the tokens. rank (B, n, columns): whose column it is.
    """

    def __init__(self, tokens: Tokens, window: int) -> None:
        self.tokens, self.n = tokens, tokens.rank.shape[1]
        self.block = torch.sym_max(BLOCK, window)
        self.blocks = (self.n + self.block - 1) // self.block
        column = torch.arange(3 * self.block, device=tokens.rank.device)
        self.rank = ((tokens.rank // self.block - 1) * self.block)[..., None] + column

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """q k^T of the band's entries: (B, H, n, d) twice -> (B, H, n, columns)."""
        return self._rows(self._blocks(q) @ self._around(k).mT)

    def apply(self, p: Tensor, v: Tensor) -> Tensor:
        """The band p (B, H, n, columns) times the values (B, H, n, e) -> (B, H, n, e)."""
        return self._rows(self._blocks(p) @ self._around(v))

    def added(self, p: Tensor, weights: Tensor) -> Tensor:
        """weights (B, H, n, n) and the entries of p (B, H, n, columns) where they belong."""
        place = self.rank.clamp(0, self.n - 1)  # columns of no key hold zeros
        if self.tokens.ignored is not None:
            place = torch.take_along_dim(self.tokens.order[:, None], place, 2)
        return weights.scatter_add(3, place[:, None].expand_as(p), p)

    def _blocks(self, x: Tensor) -> Tensor:
        x = F.pad(self.tokens.in_order(x), (0, 0, 0, self.blocks * self.block - self.n))
        return x.unflatten(2, (self.blocks, self.block))

    def _around(self, x: Tensor) -> Tensor:
        x = F.pad(self._blocks(x), (0, 0, 0, 0, 1, 1))
        return torch.cat([x[:, :, :-2], x[:, :, 1:-1], x[:, :, 2:]], 3)

    def _rows(self, x: Tensor) -> Tensor:
        x = x.flatten(2, 3)[:, :, : self.n]
        return x if self.tokens.ignored is None else torch.take_along_dim(x, self.tokens.rank[:, None, :, None], 2)
