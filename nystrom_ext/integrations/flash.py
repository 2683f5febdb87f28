"""flash-attn's two functions, so that code written for it switches by one import::

    from nystrom_ext.integrations.flash import flash_attn_func, flash_attn_varlen_func

Names, argument order and layouts are flash-attn 2's; what they compute is Nyström attention beyond ``num_landmarks``
tokens. What landmarks cannot honour is refused by name. ``functools.partial`` sets the options that flash-attn does not
have: ``num_landmarks``, ``pinned``, ``pinv_iterations``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._warnings import warn_once
from ..functional import nystrom_attention
from ..varlen import nystrom_attention_varlen

_WINDOW = (
    "window_size=(w, w) is window=w of nystrom_attention: tokens at a larger distance, which flash-attn leaves out, "
    "are attended to through landmarks, and exactly up to num_landmarks tokens"
)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **options: Any,
) -> Tensor:
    """:func:`nystrom_ext.nystrom_attention` on (batch, tokens, heads, features).

    Args:
        q: (B, L, H, d), any dtype of :func:`nystrom_ext.nystrom_attention`.
        k, v: (B, S, H_kv, d) and (B, S, H_kv, e), H a multiple of H_kv.
        dropout_p: as there; 0 in evaluation.
        softmax_scale: default ``d ** -0.5``.
        window_size: (w, w) is ``window=w``: the tokens at a distance of at most w exactly, where flash-attn leaves the
            others out and this lets landmarks stand for them. (-1, -1) is no window.
        deterministic: it always is.
        options: ``num_landmarks``, ``pinned``, ``pinv_iterations`` and others of :func:`nystrom_ext.nystrom_attention`.

    Returns:
        (B, L, H, e).

    Raises:
        NotImplementedError: causal, softcap, alibi_slopes, return_attn_probs, a window with two sides.
    """
    _check(causal, softcap, alibi_slopes, return_attn_probs)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    settings = {"dropout_p": dropout_p, "scale": softmax_scale, "enable_gqa": q.shape[2] != k.shape[2], **options}
    return nystrom_attention(*heads, window=_window(window_size), **settings).transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """:func:`nystrom_ext.nystrom_attention_varlen`: (total_q, H, d), (total_k, H_kv, d), (total_k, H_kv, e) ->
    (total_q, H, e). The other arguments as for :func:`flash_attn_func`; ``block_table`` is refused as well."""
    _check(causal, softcap, alibi_slopes, return_attn_probs, block_table)
    offsets = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    settings = {"dropout_p": dropout_p, "scale": softmax_scale, "enable_gqa": q.shape[1] != k.shape[1], **options}
    return nystrom_attention_varlen(q, k, v, *offsets, window=_window(window_size), **settings)


def _check(
    causal: bool,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
    block_table: Tensor | None = None,
) -> None:
    refused = {
        "causal=True": causal,
        f"softcap={softcap}": softcap != 0,
        "alibi_slopes": alibi_slopes is not None,
        "return_attn_probs=True": return_attn_probs,
        "block_table": block_table is not None,
    }
    if named := [name for name, given in refused.items() if given]:
        raise NotImplementedError(
            f"Nyström attention cannot honour flash-attn's {', '.join(named)}: landmarks are means over all tokens; "
            f"leave it out, or keep flash_attn for this layer"
        )


def _window(size: tuple[int, int]) -> int:
    left, right = size
    if left != right:
        raise NotImplementedError(
            f"Nyström attention has one window for both sides, got window_size={size}; pass ({max(size)}, "
            f"{max(size)}), or (-1, -1) for none"
        )
    if left >= 0:
        warn_once(_window, _WINDOW)
    return max(left, 0)
