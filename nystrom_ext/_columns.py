"""Columns of the query pass that are keys, beside those that are landmarks: all keys, pinned ones, the window's."""

from __future__ import annotations

import torch
from torch import Tensor

from ._tokens import Tokens, take

# Queries in a block of the band, or the window if that is more: narrower blocks would be products of next to nothing.
BLOCK = 32


class Columns:
    """All keys, for windows that hold about as many; the other classes are for some of them.

    rank (B or 1, R or 1, columns): whose column it is; pinned: whether pinned tokens are among them.
    """

    rank: Tensor
    pinned = True

    def __init__(self, tokens: Tokens) -> None:
        self.rank = tokens.rank[:, None]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, H, R, d), (B, H, S, d) -> (B, H, R, columns)."""
        return q @ k.mT

    def apply(self, p: Tensor, v: Tensor) -> Tensor:
        """(B, H, R, columns), (B, H, S, e) -> (B, H, R, e)."""
        return p @ v

    def add(self, p: Tensor, weights: Tensor) -> Tensor:
        """weights (B, H, R, S) and the entries of p (B, H, R, columns) where they belong; may change the weights."""
        return weights + p


class Pinned(Columns):
    """The first tokens."""

    def __init__(self, tokens: Tokens, pinned: int) -> None:
        self.rank = torch.arange(pinned, device=tokens.rank.device)[None, None]
        self.select = ((tokens.rank[:, None] == self.rank.mT) & tokens.valid[:, None])[:, None]  # (B, 1, pinned, S)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ (self.select.to(k) @ k).mT

    def apply(self, p: Tensor, v: Tensor) -> Tensor:
        return p @ (self.select.to(v) @ v)

    def add(self, p: Tensor, weights: Tensor) -> Tensor:
        return weights + p @ self.select.to(p)


class Band(Columns):
    """The keys near each query that are not pinned, for self-attention: O(n window) numbers.

    Queries in rank order fall into blocks of at least ``window``; a block's columns are the keys of its own, of the
    block before and of the one behind. Rows are in the order of the tokens. rank (B, n, columns).
    """

    pinned = False

    def __init__(self, tokens: Tokens, window: int) -> None:
        n, device = tokens.rank.shape[1], tokens.rank.device
        self.tokens, block = tokens, max(BLOCK, window)
        blocks = torch.arange(n // block + 2, device=device)[:, None] * block  # never one: a size of 1 would broadcast
        columns = torch.arange(-block, 2 * block, device=device)
        self.queries = (blocks + torch.arange(block, device=device)).clamp(max=n - 1)
        self.keys = (blocks + columns).clamp(0, n - 1)  # columns of no key count for nothing
        self.rank = (tokens.rank // block * block)[..., None] + columns

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = self.tokens.in_order(q), self.tokens.in_order(k)
        return self._rows(q[:, :, self.queries] @ k[:, :, self.keys].mT)

    def apply(self, p: Tensor, v: Tensor) -> Tensor:
        p, v = self.tokens.in_order(p), self.tokens.in_order(v)
        return self._rows(p[:, :, self.queries] @ v[:, :, self.keys])

    def add(self, p: Tensor, weights: Tensor) -> Tensor:
        order = self.tokens.order
        place = self.rank.clamp(0, order.shape[1] - 1)
        if self.tokens.ignored is not None:
            place = order[:, None].expand(-1, order.shape[1], -1).gather(2, place)
        return weights.scatter_add_(3, place[:, None].expand_as(p), p)

    def _rows(self, x: Tensor) -> Tensor:
        """(B, H, blocks, queries, d) -> (B, H, n, d)."""
        return take(x.flatten(2, 3), self.tokens.rank)
