"""The masks of `nn.MultiheadAttention`: what they mean, checked without waiting for a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Entries of a floating-point key_padding_mask up to this mean "ignore": -inf, finfo.min, -1e9 and the customary -1e4.
IGNORE_THRESHOLD = -1e4


def added_keys(module: nn.MultiheadAttention) -> int:
    """How many keys ``add_bias_kv`` and ``add_zero_attn`` add."""
    return (module.bias_k is not None) + module.add_zero_attn


def zero(x: Tensor, ignored: Tensor | None) -> Tensor:
    """x (N, H, n, d) with zeros where ``ignored`` (N, n) is True, whatever x holds there."""
    return x if ignored is None else x.masked_fill(ignored[:, None, :, None], 0)


def check_key_mask(mask: Tensor | None) -> None:
    """Refuses finite biases of single keys, which the approximation cannot honour. Does not wait for a GPU."""
    if mask is None or mask.dtype == torch.bool:
        return
    torch._assert_async(
        ((mask <= IGNORE_THRESHOLD) | (mask == 0)).all(),
        "NystromMultiheadAttention: beyond num_landmarks tokens a floating-point key_padding_mask must hold 0 (keep) "
        "or values <= -1e4 (ignore), found others; pass a bool mask or raise num_landmarks",
    )


def key_mask(mask: Tensor | None, k: Tensor, added: int) -> Tensor | None:
    """key_padding_mask (N, S) or (S,) -> (N, S) with the ``added`` keys, which are never masked; k (N, H, S, d)."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        F._canonical_mask(mask, "key_padding_mask", None, "", mask.dtype)  # raises for dtypes that are no masks
    mask = F.pad(mask if mask.dim() == 2 else mask.unsqueeze(0), (0, added))
    for dim, (size, expected) in enumerate(zip(mask.shape, (k.shape[0], k.shape[2]), strict=True)):
        if size != expected:
            raise AssertionError(f"Expected key_padded_mask.shape[{dim}] to be {expected}, but got {size}")
    return mask


def query_mask(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """query_padding_mask (N, L) or (L,) -> (N, L); q (N, H, L, d)."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise ValueError(
            f"query_padding_mask must be bool with True = ignore, got {mask.dtype}; write mask.bool(), or `mask < 0` "
            f"for one of 0 and -inf"
        )
    mask = mask if mask.dim() == 2 else mask.unsqueeze(0)
    if mask.shape != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"query_padding_mask must have shape (batch, query tokens) = {(q.shape[0], q.shape[2])}, got "
            f"{tuple(mask.shape)}"
        )
    return mask


def additive_mask(q: Tensor, k: Tensor, kpm: Tensor | None, attn_mask: Tensor | None, added: int) -> Tensor | None:
    """Both masks as one of q's dtype that broadcasts to (N, H, L, S). F.scaled_dot_product_attention on the CPU
    refuses others or, float32 next to float64, silently computes nonsense (torch 2.13)."""
    kpm = F._canonical_mask(kpm, "key_padding_mask", F._none_or_dtype(attn_mask), "attn_mask", q.dtype)
    attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", q.dtype, check_other=False)
    if attn_mask is not None:
        N, H, L, S = *q.shape[:3], k.shape[2] - added
        expected = (L, S) if attn_mask.dim() == 2 else (N * H, L, S)
        if attn_mask.shape != expected:
            raise RuntimeError(
                f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {expected}."
            )
        attn_mask = F.pad(attn_mask, (0, added))
        attn_mask = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (N, H))
    if kpm is not None:
        kpm = kpm[:, None, None]
        attn_mask = kpm if attn_mask is None else kpm + attn_mask
    return None if attn_mask is None else attn_mask.to(q.dtype)


def masks_nothing(mask: Tensor) -> bool:
    """Whether all of it is False or 0, where that can be read at once: a tensor on the CPU with values, not traced."""
    plain = type(mask) in (Tensor, torch.nn.Parameter) and mask.device.type == "cpu"
    if not plain or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(mask):
        return False
    return not mask.any()
