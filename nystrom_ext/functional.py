"""Nyström attention as functions on (batch, heads, tokens, features) tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library, _transforms, _weights  # noqa: F401  register the ops
from ._options import count
from ._warnings import warn_once


def nystrom_attention(
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
    self_attention: bool | None = None,
) -> Tensor:
    r"""Softmax attention approximated in O((L + S) m) time and memory (Nyströmformer, arXiv 2102.03902).

    :math:`\mathrm{softmax}(s Q \tilde K^T)\, Z\, \mathrm{softmax}(s \tilde Q K^T) V` with segment means
    :math:`\tilde Q, \tilde K` over the valid tokens and Z from ``pinv_iterations`` Newton-Schulz steps. A sample with
    at most ``num_landmarks`` valid keys or valid queries gets exact softmax attention. Padding and batch mates never
    change a result.

    Args:
        query: (B, H, L, d), float64, float32, bfloat16 or float16, any strides; 16-bit inputs are computed in float32.
        key: (B, H, S, d), same dtype and device; (B, H_kv, S, d) with ``enable_gqa``.
        value: (B, H, S, e) or (B, H_kv, S, e).
        key_padding_mask: (B, S) bool, True = ignore, as in ``nn.MultiheadAttention``.
        query_padding_mask: (B, L) bool, True = ignore: these rows of the result are zero and take no part in the
            landmarks. For self-attention pass the same mask twice, or ``self_attention=True``.
        num_landmarks: m, the number of segment means. ``m >= L`` or ``m >= S`` is exact attention.
        pinv_iterations: six are a spectral filter that suits attention; more approximate it worse, not better.
        scale: s, default ``d ** -0.5``.
        dropout_p: probability of dropping entries of the (L, m) probabilities, with those of the window and the pinned
            tokens; pass 0 in evaluation, as with SDPA.
        conv_weight: (H, taps): a depthwise convolution of the values over the sequence is added; needs L = S.
        coefficient: ``"per_head"``, or ``"global"`` as in the paper's released code, which couples the batch.
        enable_gqa: query head h reads key head ``h // (H // H_kv)``.
        window: exact attention to the valid tokens at a distance of at most ``window``, in one softmax with the
            landmarks, which then stand for the tokens outside. 16 removes most of the error of sharp, local heads.
        pinned: exact attention of every query to the first ``pinned`` valid tokens, which are left out of the
            landmarks: class tokens, attention sinks. ``window`` and ``pinned`` are for self-attention: L = S and one
            mask; 0 and 0 are the paper's operator.
        self_attention: whether queries and keys are the same tokens. True: one mask stands for both sides, and
            L = S. False: the masks are what they are. None: True where ``query is key``; else, with as many queries as
            keys and a ``key_padding_mask`` alone, a warning, as nobody knows whose tokens the padded queries are.

    Returns:
        (B, H, L, e), stored so that ``.transpose(1, 2).flatten(2)`` is a view. Differentiable with respect to
        query, key, value and conv_weight, and again, and in forward mode (`torch.func`, gradient penalties): beyond a
        first ``.backward()`` by ATen's operations in place of the kernels, some ten times as slow as that, in
        O((L + S) (m + window)) memory.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; the message names the rule and the way out.
        TypeError: a tensor as ``scale``.
    """
    check((query, key, value), scale, num_landmarks, pinv_iterations, window, pinned)
    if dropout_p > 0 and hasattr(query, "device_mesh"):
        raise NotImplementedError(
            f"nystrom_attention: dropout_p={dropout_p} of a DTensor, where each process would draw a seed of its own; "
            "pass 0, or local tensors (to_local()) to a call on each process"
        )
    if key_padding_mask is not None or query_padding_mask is not None or self_attention:
        key_padding_mask, query_padding_mask = _both_masks(
            query, key, key_padding_mask, query_padding_mask, self_attention, num_landmarks
        )
    return torch.ops.nystrom_ext.attention(
        query,
        key,
        value,
        key_padding_mask,
        query_padding_mask=query_padding_mask,
        conv_weight=conv_weight,
        num_landmarks=num_landmarks,
        pinv_iterations=pinv_iterations,
        scale=scale,
        dropout_p=dropout_p,
        coefficient=coefficient,
        enable_gqa=enable_gqa,
        window=window,
        pinned=pinned,
    )


def nystrom_attention_weights(
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
    self_attention: bool | None = None,
    average_heads: bool = False,
    rows: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """The attention matrix P1 Z P3 that :func:`nystrom_attention` applies to the values, for inspection.

    The other arguments as for :func:`nystrom_attention`, whose masks, regimes and dropout (the same entries for the
    same random state) are the matrix's. Rows may have negative entries and sum to 1 only approximately.

    All of it is O(L S) in time and memory: H L S numbers, or L S with ``average_heads``, which never makes more. A few
    ``rows`` cost O(R S) memory and O(R (m + S) + (L + S) m) time, as the operator itself.

    Args:
        average_heads: the mean over the heads.
        rows: positions of the queries whose rows are wanted, in any order, a list or (R,) int64 on the device of
            query; negative ones count from the end. A class token's is ``[0]``.

    Returns:
        (B, H, L, S) or (B, H, R, S), without H with ``average_heads``, in the dtype of query. Ignored queries have rows
        of zeros, ignored keys columns of zeros. Differentiable any number of times with respect to query and key.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; the message names the rule and the way out.
    """
    if key_padding_mask is not None or query_padding_mask is not None or self_attention:
        key_padding_mask, query_padding_mask = _both_masks(
            query, key, key_padding_mask, query_padding_mask, self_attention, num_landmarks
        )
    options: dict[str, Any] = {
        "query_padding_mask": query_padding_mask,
        "num_landmarks": num_landmarks,
        "pinv_iterations": pinv_iterations,
        "scale": scale,
        "dropout_p": dropout_p,
        "coefficient": coefficient,
        "enable_gqa": enable_gqa,
        "window": window,
        "pinned": pinned,
    }
    return _weights.attention_weights(query, key, key_padding_mask, average_heads, rows, **options)


def check(tensors: Sequence[Tensor], scale: float | None, *counts: int) -> None:
    """What the dispatcher would refuse in words of its own, or take: a scale that learns nothing."""
    if isinstance(scale, Tensor):
        raise TypeError(
            "nystrom_attention: scale must be a float, got a tensor, which would get no gradient; multiply query by it "
            "and pass scale=1.0"
        )
    for name, value in zip(("num_landmarks", "pinv_iterations", "window", "pinned"), counts, strict=True):
        if type(value) is not int:
            count(name, value, int(name == "num_landmarks"), "as of 64 or numpy.int64(64)")
    for x in tensors:
        if isinstance(x, Tensor) and (x.is_nested or x.layout != torch.strided):
            raise ValueError(
                f"nystrom_attention: query, key and value must be dense, got a tensor of layout {x.layout}, nested: "
                f"{x.is_nested}; nystrom_attention_varlen takes sequences of different lengths"
            )


_UNKNOWN_PADDING = (
    "nystrom_attention: as many queries as keys with a key_padding_mask alone, so that nobody knows whether the padded "
    "queries are padding too; they are taken for tokens and averaged into the landmarks. Pass self_attention=True if "
    "both are the same tokens, else query_padding_mask or self_attention=False"
)


def _both_masks(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    self_attention: bool | None,
    num_landmarks: int,
) -> tuple[Tensor | None, Tensor | None]:
    """The masks of keys and of queries, the one for the other where both are the same tokens."""
    itself = query is key if self_attention is None else self_attention
    if itself:
        if query.shape[-2] != key.shape[-2]:
            raise ValueError(
                f"nystrom_attention: self_attention=True needs as many queries as keys, got {query.shape[-2]} and "
                f"{key.shape[-2]}; leave it out for cross-attention"
            )
        return (query_mask if key_mask is None else key_mask), (key_mask if query_mask is None else query_mask)
    if self_attention is None and query_mask is None and not isinstance(query, torch.fx.Proxy):
        if num_landmarks < query.shape[-2] == key.shape[-2]:
            warn_once(nystrom_attention, _UNKNOWN_PADDING)
    return key_mask, query_mask
