"""The tokens of one side of attention: masks become numbers, ranks and segments, and nothing is read on the host."""

from __future__ import annotations

import torch
from torch import Tensor


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
        # (B, n): where the token of each rank is
        self.order = torch.zeros_like(self.rank).scatter(1, self.rank, self.positions.expand_as(self.rank))
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

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.rank.shape[1], device=self.rank.device)

    def in_order(self, x: Tensor) -> Tensor:
        """x (B, H, n, d) by rank."""
        return x if self.ignored is None else take(x, self.order)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, H, n, d) by index (B, R). `torch.take_along_dim` would fix symbolic sizes."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
