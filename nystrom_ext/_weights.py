"""The attention matrix that the operator applies, from its factors: all of it, its mean over the heads, or some rows.

Shapes as in `_problem`; R rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from ._autocast import cast_inputs
from ._columns import Columns
from ._composite import factors
from ._problem import Problem, at, masked, zero
from ._tokens import Tokens

# Numbers of P3 in a block of keys where only some rows are wanted, so that P3 is never there as a whole: 8 MB.
BLOCK = 2**21


@cast_inputs
def attention_weights(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    average_heads: bool,
    rows: Tensor | Sequence[int] | None,
    **options: Any,
) -> Tensor:
    """`nystrom_ext.nystrom_attention_weights`."""
    check(query, key, key_padding_mask, options)
    wanted = None if rows is None else positions(rows, query.shape[2], query.device)
    if options["dropout_p"] > 0:  # as the operator draws it
        options["rng_state"] = torch.randint(2**63 - 1, (2,), device=query.device)
    problem = Problem(query, key, key_padding_mask, **options)
    if wanted is None:
        return whole_matrix(problem, query, key, average_heads)
    weights = some_rows(problem, query, key, wanted)
    return weights.mean(1) if average_heads else weights


def check(query: Tensor, key: Tensor, key_padding_mask: Tensor | None, options: dict[str, Any]) -> None:
    """ValueError as of the operator, which is asked without data, and leaves no call of it in an exported graph."""
    masks = {"key_padding_mask": key_padding_mask, "query_padding_mask": options["query_padding_mask"]}
    for name, x in {"key": key, **masks}.items():
        check_device(name, x, query.device)
    with contextlib.nullcontext() if torch.compiler.is_dynamo_compiling() else _disable_current_modes():
        shapes = {name: x if x is None else x.detach().to("meta") for name, x in masks.items()}
        q, k = (x.detach().to("meta") for x in (query, key))
        torch.ops.nystrom_ext.attention(q, k, k, **{**options, **shapes})
    if (options["window"] or options["pinned"]) and masks["key_padding_mask"] is not masks["query_padding_mask"]:
        require(
            torch.eq(*masks.values()).all(),
            "window and pinned need the same mask for queries and keys, got two that differ; pass one mask twice, or "
            "leave window and pinned out",
        )


def positions(rows: Tensor | Sequence[int], L: int, device: torch.device) -> Tensor:
    """(R,) from 0 to L - 1. ValueError for what are no positions of L queries."""
    if not isinstance(rows, Tensor):
        rows = torch.as_tensor(rows, device=device)
        rows = rows if rows.numel() else rows.long()
    check_device("rows", rows, device)
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(
            f"nystrom_attention_weights: rows must be integers, a list or an int64 tensor of shape (R,), positions of "
            f"queries, got {rows.dtype} of shape {tuple(rows.shape)}; [0] is the first query's"
        )
    inside = (rows >= -L) & (rows < L)
    require(inside.all(), "rows must be positions of queries, from -L to L - 1, got others; leave those out")
    return torch.where(rows < 0, rows + L, rows)


def check_device(name: str, x: Tensor | None, device: torch.device) -> None:
    if x is not None and x.device != device:
        raise ValueError(
            f"nystrom_attention_weights: {name} must be on the device of query, {device}, got {x.device}; move it "
            f"there with .to()"
        )


def require(condition: Tensor, message: str) -> None:
    """ValueError on the CPU; compiled, or elsewhere, RuntimeError without waiting for it."""
    message = f"nystrom_attention_weights: {message}"
    if torch.compiler.is_compiling() or not condition.is_cpu:
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def whole_matrix(problem: Problem, query: Tensor, key: Tensor, average_heads: bool) -> Tensor:
    """(B, H, L, S), or the mean over the heads (B, L, S): one product with the heads side by side."""
    f, ignored = factors(problem, query, key), problem.queries.ignored
    left = zero(f.left, ignored)
    if average_heads:
        weights = (left.transpose(1, 2).flatten(2) / problem.heads @ f.right.flatten(1, 2))[:, None]
    else:
        weights = left @ f.right
    for columns, p in f.columns:
        weights = columns.add(zero(p.mean(1, keepdim=True) if average_heads else p, ignored), weights)
    weights = weights.to(query.dtype)
    return weights[:, 0] if average_heads else weights


def some_rows(problem: Problem, query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
    """(B, H, R, S) for queries at ``rows`` in O(R (m + S) + (L + S) m) time and O(R S) memory: blocks of keys, one
    after another, which the backward pass computes again."""
    ignored = at(problem.queries.ignored, rows)
    q = problem.prepare(query.index_select(2, rows), ignored)
    queries, keys = _Blocks(problem, query, problem.queries), _Blocks(problem, key, problem.keys)
    qt, kt = queries.means(), keys.means()
    z = _recomputed(problem.inverse, qt, kt)
    lse = keys.logsumexp(qt)
    if problem.has_window or problem.has_pinned:
        columns = [Columns(problem.keys)]
        scores = [torch.cat(keys.each(keys.scores, q), -1)]
        p1, *exact = problem.query_pass(q, kt, problem.missed(qt, kt, lse), columns, scores, rows)
    else:
        p1, *exact = problem.query_pass(q, kt, rows=rows)
    p1 = p1.clone(memory_format=torch.contiguous_format)  # of a slice a product asks for strides, which fixes a length
    left = torch.where(problem.by_queries, problem.own(rows), p1 @ z)
    weights = torch.cat(keys.each(keys.weights, p1, left, qt, lse), -1)
    for p in exact:
        weights = weights + p
    return zero(weights, ignored).to(query.dtype)


class _Blocks:
    """The tokens of one side in blocks, and what is computed of each: of x in ``span``."""

    def __init__(self, problem: Problem, x: Tensor, tokens: Tokens) -> None:
        """x (B, H or H_kv, n, d)."""
        self.problem, self.tokens = problem, tokens
        self.members = tokens.members(problem.slots)
        self.spans = _spans(problem, x.shape[2])
        # split once: the gradient of a slice is as large as x, for each block
        self.parts = [x] if len(self.spans) == 1 else x.split(self.spans[0].stop, 2)

    def each(self, function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
        """function(span, x, *tensors) of each block."""
        blocks = zip(self.spans, self.parts, strict=True)
        if len(self.spans) == 1:
            return [function(*block, *tensors) for block in blocks]
        return [_recomputed(function, *block, *tensors) for block in blocks]

    def means(self) -> Tensor:
        """Of segments, (B, H, m, d)."""

        def block(span: slice, x: Tensor) -> Tensor:
            return self.problem.sums(self._prepare(span, x), self.members[..., span])

        return self.problem.divide(torch.stack(self.each(block)).sum(0), self.tokens)

    def scores(self, span: slice, x: Tensor, q: Tensor) -> Tensor:
        """q k^T (B, H, R, keys)."""
        return q @ self._prepare(span, x).mT

    def logsumexp(self, qt: Tensor) -> Tensor:
        """LSE3 (B, H, m)."""

        def block(span: slice, x: Tensor, qt: Tensor) -> Tensor:
            return masked(self.scores(span, x, self.problem.scale * qt), self._free(span)).logsumexp(-1)

        masses = torch.stack(self.each(block, qt), -1)
        if self.problem.free is None:
            return masses.logsumexp(-1)
        some = torch.stack([self.problem.free[..., span].any(-1) for span in self.spans], -1)
        return masked(masses, some).logsumexp(-1)

    def weights(self, span: slice, x: Tensor, p1: Tensor, left: Tensor, qt: Tensor, lse: Tensor) -> Tensor:
        """left P3 (B, H, R, keys), or P1 where every key is its own landmark."""
        p, free = self.problem, self._free(span)
        p3 = self.scores(span, x, p.scale * qt) - lse[..., None]
        p3 = (p3 if free is None else p3.masked_fill(~free, -torch.inf)).exp()
        own = p1.flatten(1, 2) @ self.members[..., span].to(p1)
        return torch.where(p.by_keys, own.unflatten(1, p1.shape[1:3]), left @ p.drop_keys(p3, span))

    def _prepare(self, span: slice, x: Tensor) -> Tensor:
        ignored = self.tokens.ignored
        return self.problem.prepare(x, None if ignored is None else ignored[:, span])

    def _free(self, span: slice) -> Tensor | None:
        free = self.problem.free
        return None if free is None else free[..., span]


def _recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), whose intermediate results the backward pass computes again instead of keeping them."""
    return checkpoint(function, *args, use_reentrant=False) if torch.is_grad_enabled() else function(*args)


def _spans(problem: Problem, n: int) -> list[slice]:
    """Blocks of tokens. One if the length is symbolic: a graph is for all lengths."""
    if torch.compiler.is_compiling() or not isinstance(n, int):
        return [slice(None)]
    size = max(BLOCK // max(problem.slots * problem.samples * problem.heads, 1), 1)
    return [slice(first, first + size) for first in range(0, max(n, 1), size)]
