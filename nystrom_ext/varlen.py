"""Nyström attention of sequences packed one after another, without padding between them, as in flash-attn."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from . import _library  # noqa: F401  registers the ops
from .functional import check


def nystrom_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    *,
    num_landmarks: int = 64,
    pinv_iterations: int = 6,
    scale: float | None = None,
    dropout_p: float = 0.0,
    conv_weight: Tensor | None = None,
    coefficient: str = "per_head",
    enable_gqa: bool = False,
    window: int = 0,
    pinned: int = 0,
    key_padding_mask: None = None,
    query_padding_mask: None = None,
) -> Tensor:
    """:func:`nystrom_attention` of every sequence by itself: bit for bit what a call for it alone returns.

    The kernels read the packed tokens where they are. Positional arguments are those of flash-attn's
    ``flash_attn_varlen_func`` and of ``torch.nn.attention.varlen.varlen_attn``.

    Args:
        query: (total_q, H, d). Dtypes and devices as for :func:`nystrom_attention`, any strides.
        key: (total_k, H, d), or (total_k, H_kv, d) with ``enable_gqa``.
        value: (total_k, H, e) or (total_k, H_kv, e).
        cu_seqlens_q: (B + 1) int32 or int64, cumulative lengths from 0 to total_q, on the device of query: sequence b
            has the queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1] - 1``. Lengths may be 0.
        cu_seqlens_k: likewise up to total_k; for self-attention the same tensor, or one that holds the same.
        max_seqlen_q: at least the longest sequence's length, an integer or a tensor of one. None finds it out, on a
            CPU; on a GPU the program would have to wait for it.
        max_seqlen_k: likewise.
        num_landmarks, pinv_iterations, scale, dropout_p, conv_weight, coefficient, enable_gqa, window, pinned:
            as for :func:`nystrom_attention`. ``conv_weight`` ends at the sequences' borders; it, ``window`` and
            ``pinned`` are for self-attention. With ``dropout_p`` entries are numbered as in a padded batch, by
            sequence, head and position in the sequence: neither lengths nor contents of other sequences matter.
            ``coefficient="global"`` couples the sequences.
        key_padding_mask, query_padding_mask: refused, packed sequences have no padding.

    Returns:
        (total_q, H, e). Differentiable as :func:`nystrom_attention` is; beyond a first gradient by way of a padded
        batch.

    Raises:
        ValueError: tensors or options that do not fit; the message names the rule and the way out.
        RuntimeError: on a GPU, later, offsets that do not fit the tokens.
    """
    check((query, key, value), scale, num_landmarks, pinv_iterations, window, pinned)
    if key_padding_mask is not None or query_padding_mask is not None:
        name = "key_padding_mask" if key_padding_mask is not None else "query_padding_mask"
        raise ValueError(f"nystrom_attention_varlen: packed sequences have no padding, got {name}; leave it out")
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(offsets, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(offsets).__name__}; torch.tensor(...) makes one")
    return torch.ops.nystrom_ext.attention_varlen(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        _longest("q", max_seqlen_q, cu_seqlens_q),
        _longest("k", max_seqlen_k, cu_seqlens_k),
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


def _longest(side: str, given: int | Tensor | None, offsets: Tensor) -> int:
    if isinstance(given, (torch.SymInt, Integral)):
        return given  # type: ignore[return-value]
    if isinstance(given, Tensor) and given.numel() == 1 and not given.is_floating_point():
        return int(given)
    if given is None and offsets.is_cpu and offsets.numel() > 1 and not torch.compiler.is_compiling():
        return int(offsets.diff().max())
    raise ValueError(
        f"max_seqlen_{side} must be an integer or a tensor of one (None only for offsets on a CPU, not compiled), got "
        f"{given!r}; int(max(lengths)) is it"
    )
