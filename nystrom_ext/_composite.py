"""The operator's formula in differentiable ATen operations: what is made of it can be differentiated again,
transformed, exported, and looked into.

As :mod:`nystrom_ext.reference` defines it, for whole batches, without data on the host and with symbolic sizes
(`_problem`). Time O((L + S) m), memory O((L + S) (m + window + pinned)), never (L, S).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autocast import cast_inputs
from ._columns import Columns
from ._problem import Problem, masked, softmax, zero


class Passes(NamedTuple):
    """What the formula multiplies, for all queries and keys."""

    p1: Tensor  # (B, H, L, m)
    z: Tensor  # (B, H, m, m)
    p3: Tensor  # (B, H, m, S)
    columns: list[tuple[Columns, Tensor]]  # the other columns of P1


def passes(problem: Problem, query: Tensor, key: Tensor) -> Passes:
    q, k = problem.prepare(query, problem.queries.ignored), problem.prepare(key, problem.keys.ignored)
    qt, kt = problem.means(q, problem.queries), problem.means(k, problem.keys)
    scores = problem.scale * qt @ k.mT
    p3 = problem.drop_keys(softmax(scores, problem.free))
    columns = problem.columns()
    missed = problem.missed(qt, kt, masked(scores, problem.free).logsumexp(-1)) if columns else None
    p1, *rest = problem.query_pass(q, kt, missed, columns, [c.scores(q, k) for c in columns])
    if not columns:  # else it is self-attention, and no sample has few queries beside many keys
        p1 = torch.where(problem.by_queries, problem.own(), p1)
    return Passes(p1, problem.inverse(qt, kt), p3, list(zip(columns, rest, strict=True)))


@cast_inputs
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    query_padding_mask: Tensor | None = None,
    num_landmarks: int = 64,
    pinv_iterations: int = 6,
    scale: float | None = None,
    dropout_p: float = 0.0,
    conv_weight: Tensor | None = None,
    coefficient: str = "per_head",
    enable_gqa: bool = False,
    window: int = 0,
    pinned: int = 0,
    rng_state: Tensor | None = None,
) -> Tensor:
    """As :func:`nystrom_ext.nystrom_attention`, unchecked; dropout needs ``rng_state``, int64 (2,): seed and offset."""
    problem = Problem(
        query,
        key,
        key_padding_mask,
        query_padding_mask=query_padding_mask,
        num_landmarks=num_landmarks,
        pinv_iterations=pinv_iterations,
        scale=scale,
        dropout_p=dropout_p,
        coefficient=coefficient,
        enable_gqa=enable_gqa,
        window=window,
        pinned=pinned,
        rng_state=rng_state,
    )
    f = passes(problem, query, key)
    v = problem.prepare(value, key_padding_mask)
    u = f.p3 @ v
    w = torch.where(problem.by_keys, problem.means(v, problem.keys), torch.where(problem.by_queries, u, f.z @ u))
    out = f.p1 @ w
    for columns, p in f.columns:
        out = out + columns.apply(p, v)
    if conv_weight is not None:
        out = out + convolution(v, conv_weight.to(v))
    return zero(out, query_padding_mask).to(query.dtype)


class Factors(NamedTuple):
    """The attention matrix (B, H, L, S): left @ right and, for each of columns, p where ``columns.add`` puts it."""

    left: Tensor  # (B, H, L, m)
    right: Tensor  # (B, H, m, S)
    columns: list[tuple[Columns, Tensor]]


def factors(problem: Problem, query: Tensor, key: Tensor) -> Factors:
    """In the type of the computation: float64 for float64, else float32. Rows of ignored queries are not zero yet."""
    f = passes(problem, query, key)
    right = torch.where(problem.by_queries, f.p3, f.z @ f.p3)
    members = problem.keys.members(problem.slots)[:, None].to(right)
    return Factors(f.p1, torch.where(problem.by_keys, members, right), f.columns)


def convolution(v: Tensor, weight: Tensor) -> Tensor:
    """y_i = sum_t w_t v_{i + t - T//2}, zero outside; v (B, H, n, e), weight (H, T)."""
    taps = weight.shape[1]
    padded = F.pad(v, (0, 0, taps // 2, taps - taps // 2))  # one more than it takes, for n = 0
    return F.conv2d(padded, weight[:, None, :, None], groups=v.shape[1])[:, :, : v.shape[2]]
