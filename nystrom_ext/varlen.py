"""Nyström attention of sequences packed one after another, without padding between them, as in flash-attn."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .functional import nystrom_attention


def nystrom_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> Tensor:
    """:func:`nystrom_attention` of every sequence by itself: bit for bit what a call for it alone returns.

    Sequence b has the queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1] - 1`` and the keys likewise. The tokens are
    copied into a padded batch and back, B x max_seqlen tokens of memory; the operator itself spends nothing on padding.

    Args:
        query: (total_q, H, d). Dtypes and devices as for :func:`nystrom_attention`.
        key: (total_k, H, d), or (total_k, H_kv, d) with ``enable_gqa``.
        value: (total_k, H, e) or (total_k, H_kv, e).
        cu_seqlens_q: (B + 1) int32 or int64, cumulative lengths from 0 to total_q, on the device of query.
        cu_seqlens_k: likewise up to total_k; the same tensor for self-attention.
        max_seqlen_q: at least the longest sequence's length; found out here, it would keep a GPU waiting.
        max_seqlen_k: likewise.
        **options: those of :func:`nystrom_attention` except the masks.

    Returns:
        (total_q, H, e). Differentiable once with respect to query, key, value and conv_weight.

    Raises:
        ValueError: tensors or options that do not fit.
        RuntimeError: on a GPU or compiled, offsets that do not fit the tokens.
    """
    if masks := {"key_padding_mask", "query_padding_mask"} & options.keys():
        raise ValueError(f"nystrom_attention_varlen has no padding, got {', '.join(sorted(masks))}; leave it out")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 3:
            raise ValueError(
                f"{name} must have shape (tokens, heads, features), got {tuple(x.shape)}; use .flatten(0, 1)"
            )
    if not torch.compiler.is_compiling() and len(value) != len(key):  # compiled, the copy says it
        raise ValueError(f"key and value must have the same number of tokens, got {len(key)} and {len(value)}")
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(longest, (torch.SymInt, Integral)):
            raise ValueError(f"{name} must be an integer, got {longest!r}; int(max(lengths)) is it")
    if (options.get("window") or options.get("pinned")) and max_seqlen_q != max_seqlen_k:
        raise ValueError(
            f"window and pinned need self-attention, got max_seqlen_q = {max_seqlen_q} and max_seqlen_k = "
            f"{max_seqlen_k}; pass the same offsets and the same max_seqlen for both"
        )
    queries = _Packed("q", cu_seqlens_q, max_seqlen_q, query)
    same = cu_seqlens_k is cu_seqlens_q and max_seqlen_k == max_seqlen_q and len(key) == len(query)
    keys = queries if same else _Packed("k", cu_seqlens_k, max_seqlen_k, key)
    if queries.samples != keys.samples:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must hold the offsets of as many sequences, got "
            f"{queries.samples} and {keys.samples}"
        )
    out = nystrom_attention(
        queries.pad(query),
        keys.pad(key),
        keys.pad(value),
        keys.ignored,
        query_padding_mask=queries.ignored,
        **options,
    )
    return queries.unpad(out)


class _Packed:
    """Where the tokens of one side go in a padded batch."""

    def __init__(self, side: str, offsets: Tensor, longest: int, tokens: Tensor) -> None:
        name, total = f"cu_seqlens_{side}", len(tokens)
        if not isinstance(offsets, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(offsets).__name__}; torch.tensor(...) makes one")
        if offsets.dim() != 1 or len(offsets) < 2 or offsets.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} must have shape (sequences + 1) and dtype int32 or int64, got {tuple(offsets.shape)} of "
                f"{offsets.dtype}; lengths.cumsum(0) with a 0 in front is it"
            )
        if offsets.device != tokens.device:
            raise ValueError(f"{name} must be on the device of its tokens, {tokens.device}, got {offsets.device}")
        self.samples, self.longest = len(offsets) - 1, longest
        lengths = offsets.diff()
        fits = (offsets[0] == 0) & (offsets[-1] == total) & (lengths >= 0).all() & (lengths <= longest).all()
        rule = f"{name} must rise from 0 to the number of tokens, by at most max_seqlen_{side} at a time"
        if not offsets.is_cpu or torch.compiler.is_compiling():  # a GPU is not waited for
            torch._assert_async(fits, rule)
        elif not fits:
            found = f"{offsets.tolist()} for {total} tokens and max_seqlen_{side} = {longest}"
            raise ValueError(f"{rule}, got {found}; lengths.cumsum(0) with a 0 in front fits")
        token = torch.arange(total, device=offsets.device)
        sample = torch.bucketize(token, offsets[1:], right=True)
        self.place = sample * longest + token - offsets[sample]
        self.ignored = torch.arange(longest, device=offsets.device) >= lengths[:, None]

    def pad(self, x: Tensor) -> Tensor:
        """(total, H, d) -> (B, H, longest, d)"""
        padded = x.new_zeros(self.samples * self.longest, *x.shape[1:]).index_copy(0, self.place, x)
        return padded.unflatten(0, (self.samples, self.longest)).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """(B, H, longest, e) -> (total, H, e)"""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.place)
