"""One call of the operator: its tokens, regimes and options, and the stages of the formula in differentiable ATen
operations. `_composite` and `_weights` put them together.

Each sample's regime is a tensor: no data is read on the host, and sizes may be symbolic. Shapes: B samples, H heads,
L queries, S keys, m slots for landmarks, of which short samples leave some empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ._columns import BLOCK, Band, Columns, Pinned
from ._tokens import Tokens, take
from .reference import WORD, philox


class Problem:
    """One call's tokens, regimes and options, and the stages of the computation. Arguments as `nystrom_attention`."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        query_padding_mask: Tensor | None = None,
        num_landmarks: int = 64,
        pinv_iterations: int = 6,
        scale: float | None = None,
        dropout_p: float = 0.0,
        coefficient: str = "per_head",
        enable_gqa: bool = False,
        window: int = 0,
        pinned: int = 0,
        rng_state: Tensor | None = None,
    ) -> None:
        L, S = query.shape[2], key.shape[2]
        self.samples, self.heads, self.group = query.shape[0], query.shape[1], query.shape[1] // key.shape[1]
        self.type = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.iterations, self.coefficient = pinv_iterations, coefficient
        self.scale = query.shape[3] ** -0.5 if scale is None else scale
        self.dropout_p, self.rng_state = dropout_p, rng_state
        self.window, self.pinned = _upto(S, window), _upto(S, pinned)
        self.has_window, self.has_pinned = window > 0, pinned > 0
        self.slots = max(_upto(S, num_landmarks), 1)  # with S <= num_landmarks every key is its own
        self.queries = Tokens(query, query_padding_mask, num_landmarks)
        self.keys = Tokens(key, key_padding_mask, num_landmarks, self.pinned)
        few_queries, self.few_keys = self.queries.count <= num_landmarks, self.keys.count <= num_landmarks
        # (B, 1, 1, 1): every key its own landmark, every query its own landmark, or neither (then, unless pinned tokens
        # are all that there is, Nyström)
        self.by_keys = _matrix(self.few_keys)
        self.by_queries = _matrix(few_queries & ~self.few_keys)
        self.nystrom = _matrix(~few_queries & ~self.few_keys & (self.keys.count > pinned))
        self.surely_exact = statically_known_true(L <= num_landmarks) or statically_known_true(S <= num_landmarks)

    def prepare(self, x: Tensor, ignored: Tensor | None) -> Tensor:
        """x (B, H or H_kv, n, d) for all H heads in the type of the computation, zero at ignored tokens."""
        x = zero(x, ignored).to(self.type)
        if x.shape[1] == self.heads:
            return x
        return x[:, :, None].expand(-1, -1, self.group, -1, -1).flatten(1, 2)

    def means(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Of a prepared x over the segments, (B, H, m, d)."""
        return self.divide(self.sums(x, tokens.members(self.slots)), tokens)

    def sums(self, x: Tensor, members: Tensor) -> Tensor:
        """Of a prepared x over the tokens in each slot; one product for all heads, which share the tokens."""
        sums = members.to(self.type) @ x.transpose(1, 2).flatten(2)
        return sums.unflatten(2, (self.heads, x.shape[3])).transpose(1, 2)

    def divide(self, sums: Tensor, tokens: Tokens) -> Tensor:
        start, end = tokens.ends(self.slots)
        return sums / (end - start).clamp(min=1)[:, None, :, None]

    def inverse(self, qt: Tensor, kt: Tensor) -> Tensor:
        """Z (B, H, m, m) of samples in the Nyström regime; of others something finite, which nothing depends on."""
        eye = torch.eye(self.slots, dtype=self.type, device=qt.device)
        if self.surely_exact:
            return eye.expand(self.samples, self.heads, -1, -1)
        a = torch.where(self.nystrom, softmax(self.scale * qt @ kt.mT, self.alive[:, None, None]), eye)
        rows, columns = (a.sum(dim).amax(-1)[..., None, None] for dim in (-1, -2))
        if self.coefficient == "global":
            rows, columns = (torch.where(self.nystrom, x, 0) for x in (rows, columns))
            rows, columns = (torch.cat([x.flatten(), x.new_zeros(1)]).amax(0) for x in (rows, columns))
        z = a.mT / torch.where(self.nystrom, rows * columns, 1)
        for _ in range(self.iterations):
            x = a @ z
            z = 0.25 * z @ (13 * eye - x @ (15 * eye - x @ (7 * eye - x)))
        return z

    @property
    def alive(self) -> Tensor:
        """(B, m): landmarks that stand for any token."""
        start, end = self.keys.ends(self.slots)
        return end > start

    @property
    def free(self) -> Tensor | None:
        """(B, 1, 1, S): the keys of the key pass, which leaves pinned tokens out; None where it has all of them."""
        if self.keys.ignored is None and not self.has_pinned:
            return None
        return (self.keys.valid & (self.keys.rank >= self.keys.first))[:, None, None]

    def missed(self, qt: Tensor, kt: Tensor, lse: Tensor) -> Tensor:
        """delta (B, H, m) from LSE3 (B, H, m): what the landmarks miss of the keys' mass, in logarithm."""
        start, end = self.keys.ends(self.slots)
        counted = self.scale * qt @ kt.mT + _log(end - start, self.type)[:, None, None]
        landmarks = masked(counted, self.alive[:, None, None]).logsumexp(-1)
        return torch.where(self.nystrom[..., 0], lse - landmarks, 0)

    def columns(self) -> list[Columns]:
        """Of the query pass over all queries, beside the landmarks."""
        few = (self.keys.rank.shape[1] <= 3 * x for x in (BLOCK, self.window))  # the band would have more
        if self.has_window and any(statically_known_true(x) for x in few):
            return [Columns(self.keys)]
        pinned = [Pinned(self.keys, self.pinned)] if self.has_pinned else []
        return [*pinned, Band(self.keys, self.window)] if self.has_window else [*pinned]

    def query_pass(
        self,
        q: Tensor,
        kt: Tensor,
        missed: Tensor | None = None,
        columns: Sequence[Columns] = (),
        scores: Sequence[Tensor] = (),
        rows: Tensor | None = None,
    ) -> list[Tensor]:
        """P1 of prepared queries (B, H, R, d), those at the positions ``rows`` or all of them: (B, H, R, m), and as
        much for each of the ``columns``, whose q k^T the ``scores`` are."""
        scores = [self.scale * q @ kt.mT, *(self.scale * x for x in scores)]
        if missed is None:
            keep, number = self.alive[:, None], torch.arange(self.slots, device=q.device)[None, None]
        else:
            rank, segment = (at(x, rows) for x in (self.queries.rank, self.queries.segment))
            outside = self._outside(rank)
            own = take(missed[..., None], segment.clamp(min=0))
            scores[0] = scores[0] + _log(outside, self.type)[:, None] + own
            keep = torch.cat([outside > 0, *(self._keep(c, rank) for c in columns)], -1)
            number = self._numbers(rank, columns)
        p = softmax(torch.cat(scores, -1), keep[:, None])
        if self.dropout_p > 0:
            p = p * self.multiplier(at(self.queries.positions[None], rows), number)
        return list(p.split([x.shape[-1] for x in scores], -1))

    def _outside(self, rank: Tensor) -> Tensor:
        """c_iJ (B, R, m): the tokens that landmark J stands for beside the window of a query, by the query's rank."""
        start, end = (x[:, None] for x in self.keys.ends(self.slots))
        if not self.has_window:
            return (end - start).expand(-1, rank.shape[1], -1)
        first, last = rank[..., None] - self.window, rank[..., None] + self.window
        inside = ((last + 1).minimum(end) - first.maximum(start)).clamp(min=0)
        return end - start - inside * ~self.few_keys[..., None]

    def _keep(self, columns: Columns, rank: Tensor) -> Tensor:
        """(B, R, columns): which count, for queries of the ranks (B, R). A sample of few keys has landmarks alone."""
        column, first, count = columns.rank, self.keys.first[..., None], self.keys.count[..., None]
        near = torch.zeros_like(column, dtype=torch.bool)
        if self.has_window:
            near = ((column - rank[..., None]).abs() <= self.window) & (column >= first) & ~self.few_keys[..., None]
        keep = (near | (column < first) if columns.pinned else near) & (column >= 0) & (column < count)
        return keep.expand(*rank.shape, -1)

    def _numbers(self, rank: Tensor, columns: Sequence[Columns]) -> Tensor:
        """Dropout's numbers of the columns (B, R, columns): landmarks, pinned tokens, window."""
        near = (self.keys.count - 1).clamp(max=self.window)[..., None] - rank[..., None]
        landmarks = ((self.keys.count > self.pinned) * self.slots)[..., None]  # none are columns where all are pinned
        numbers = [torch.arange(self.slots, device=rank.device)[None, None]]
        for column in (c.rank for c in columns):
            number = torch.where(column < self.keys.first[..., None], column, self.pinned + near + column)
            numbers.append((landmarks + number).clamp(min=0))
        return torch.cat([x.expand(*rank.shape, -1) for x in numbers], -1)

    def multiplier(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Dropout's multipliers (B, H, R, columns), as `reference.dropout_multiplier`: rows (B or 1, R) are positions,
        columns (B or 1, R or 1, columns) numbers."""
        if self.rng_state is None:
            raise ValueError("dropout_p > 0 needs rng_state, int64 (2,): seed and offset")
        seed, offset = self.rng_state.unbind()
        head = torch.arange(self.samples * self.heads, device=rows.device).unflatten(0, (self.samples, self.heads))
        counter = [columns[:, None] // 4, rows[:, None, :, None], head[..., None, None], offset & WORD]
        words = philox(counter, seed & WORD, (seed >> 32 ^ offset >> 32) & WORD)
        word, lane = words[0], (columns % 4)[:, None]
        for i in range(1, 4):
            word = torch.where(lane == i, words[i], word)
        kept = (word >= int(self.dropout_p * 2**32)).to(self.type)
        return kept / (1 - self.dropout_p) if self.dropout_p < 1 else torch.zeros_like(kept)

    def drop_keys(self, p3: Tensor, span: slice = slice(None)) -> Tensor:
        """P3 (B, H, m, keys of the span) with dropout where every query is its own landmark."""
        if self.dropout_p == 0:
            return p3
        place = (self.queries.members(self.slots) * self.queries.positions).sum(-1)
        return p3 * torch.where(self.by_queries, self.multiplier(place, self.keys.positions[None, None, span]), 1)

    def own(self, rows: Tensor | None = None) -> Tensor:
        """(B, 1, R, m): each query its own landmark."""
        slot = torch.arange(self.slots, device=self.queries.rank.device)
        return (at(self.queries.rank, rows)[..., None] == slot)[:, None].to(self.type)


def zero(x: Tensor, ignored: Tensor | None) -> Tensor:
    """x (B, H, n, d) with zeros where ``ignored`` (B, n) is True, whatever x holds there."""
    return x if ignored is None else x.masked_fill(ignored[:, None, :, None], 0)


def masked(scores: Tensor, keep: Tensor | None) -> Tensor:
    """-inf where ``keep`` is False, except in rows that keep nothing: those stay finite, and so do their gradients."""
    return scores if keep is None else scores.masked_fill(~(keep | ~keep.any(-1, keepdim=True)), -torch.inf)


def softmax(scores: Tensor, keep: Tensor | None) -> Tensor:
    """Over the columns to keep, 0 elsewhere, also in rows that keep nothing."""
    p = masked(scores, keep).softmax(-1)
    return p if keep is None else p.masked_fill(~keep, 0)


def _log(count: Tensor, dtype: torch.dtype) -> Tensor:
    """Of counts; of 0 whatever, as such columns are masked."""
    return count.clamp(min=1).to(dtype).log()


def _upto(size: int, most: int) -> int:
    """The less of both where it is known; a symbolic size counts as large unless its range says otherwise."""
    return size if statically_known_true(size <= most) else most


def _matrix(x: Tensor) -> Tensor:
    return x[..., None, None]


@overload
def at(x: Tensor, rows: Tensor | None) -> Tensor: ...
@overload
def at(x: Tensor | None, rows: Tensor | None) -> Tensor | None: ...
def at(x: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """x (B or 1, n) at some positions, or all."""
    return x if x is None or rows is None else x.index_select(1, rows)
