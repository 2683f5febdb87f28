"""What a call of `NystromMultiheadAttention` is: exact or not, and which tokens of either side it ignores.

Shapes: N batch, H heads, L queries, S keys with the added ones, d head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._attention import same_tensor
from ._masks import IGNORE_THRESHOLD, added_keys, check_key_mask, key_mask, masks_nothing, query_mask
from ._warnings import warn_once

_UNKNOWN_PADDING = (
    "NystromMultiheadAttention: query and key are two tensors of equal length with a key_padding_mask, so that nobody "
    "knows whether the padded queries are padding too; they are taken for tokens and averaged into the landmarks. Set "
    "self_attention=True (in the constructor or convert_) if both are the same tokens, else self_attention=False; "
    "convert_(model, batch=...) finds out on a sample"
)


class Regime(NamedTuple):
    """Masks: True = ignore, None where there is nothing to ignore."""

    exact: bool  # the call is that of nn.MultiheadAttention
    key_mask: Tensor | None  # (N, S), bool or added to the scores
    keys: Tensor | None  # (N, S) bool
    given: Tensor | None  # (N, L): the queries that query_padding_mask names
    queries: Tensor | None  # (N, L): those, or padding because the keys are the same tokens


def regime(
    module: Any,
    query: Tensor,
    key: Tensor,
    q: Tensor,
    k: Tensor,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Regime:
    """Of a call with query and key, projected to q (N, H, L, d) and k (N, H, S, d). Errors as of ``forward``."""
    kpm = key_mask(key_padding_mask, k, added_keys(module))
    keys = kpm if kpm is None or kpm.dtype == torch.bool else kpm <= IGNORE_THRESHOLD
    given = query_mask(query_padding_mask, q)
    exact = _is_exact(module, q.shape[2], k.shape[2], attn_mask, is_causal)
    padding = _padding(module, query, key, q, k, keys if given is None else None, exact)
    if not exact:
        check_key_mask(kpm)
    return Regime(exact, kpm, keys, given, padding if given is None else given)


def _is_exact(module: Any, L: int, S: int, attn_mask: Tensor | None, is_causal: bool) -> bool:
    """Whether this call is that of `nn.MultiheadAttention`. An exported graph runs at any length, so there the operator
    decides, which is exact up to ``num_landmarks`` tokens as well; only padded queries differ."""
    if attn_mask is None and torch.compiler.is_exporting():
        return False
    if min(L, S) <= module.num_landmarks:
        return True
    if attn_mask is None or (not is_causal and masks_nothing(attn_mask)):
        return False
    if module.unsupported_mask == "error":
        raise NotImplementedError(
            f"NystromMultiheadAttention: attn_mask is not supported with L={L}, S={S} > num_landmarks="
            f"{module.num_landmarks} (an (L, S) mask is O(L*S)), nor is is_causal (landmarks are means over past and "
            f"future). Pass padding as key_padding_mask, raise num_landmarks, or construct with "
            f'unsupported_mask="exact".'
        )
    return True


def _padding(
    module: Any, query: Tensor, key: Tensor, q: Tensor, k: Tensor, ignored: Tensor | None, exact: bool
) -> Tensor | None:
    """Which queries are padding because the keys are the same tokens (N, L); None: none, or it does not matter."""
    L, S = q.shape[2], k.shape[2] - added_keys(module)
    if module.self_attention and L != S:
        raise ValueError(
            f"NystromMultiheadAttention: self_attention=True needs as many queries as keys, got {L} and {S}; leave it "
            f"out (None) for a module that is called with other keys too"
        )
    extended = not exact and (module.window > 0 or module.pinned > 0)
    if not extended and (ignored is None or (exact and module.conv is None)):
        return None
    itself = same_tensor(query, key) if module.self_attention is None else module.self_attention
    if extended and not itself:
        raise ValueError(
            f"NystromMultiheadAttention: window={module.window} and pinned={module.pinned} need self-attention, got a "
            f"key of shape {tuple(key.shape)} that is not the query of shape {tuple(query.shape)}; set "
            f"self_attention=True if both are the same tokens, or window=0, pinned=0"
        )
    if itself:
        return None if ignored is None else ignored[:, :L]
    if module.self_attention is None and L == S and not exact:
        warn_once(module, _UNKNOWN_PADDING)
    return None
