"""What `NystromMultiheadAttention` computes outside the operator: exact attention and the value convolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._masks import zero

_C: Any = torch._C  # for a function that is missing in the stubs


class ValueConvolution(nn.Module):
    """Depthwise convolution of the values over the sequence, one kernel per head: y_i = sum_t w_t v_{i + t - taps//2}.

    The skip connection of Nyströmformer. ``weight`` (H, taps) starts uniform in ±1/sqrt(taps), as the `nn.Conv2d` of
    the paper's code. Values outside the sequence and at ignored keys count as zero; ignored queries get zero.
    """

    def __init__(self, num_heads: int, taps: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, taps, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, value: Tensor, ignored_keys: Tensor | None, ignored_queries: Tensor | None) -> Tensor:
        """value (N, H, S, d), bool masks (N, S), True = ignore -> (N, H, S, d)."""
        heads, taps = self.weight.shape
        padded = F.pad(zero(value, ignored_keys), (0, 0, taps // 2, taps - 1 - taps // 2))
        return zero(F.conv2d(padded, self.weight[:, None, :, None], groups=heads), ignored_queries)

    def extra_repr(self) -> str:
        return "num_heads={}, taps={}".format(*self.weight.shape)


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """``a is b``, or the same view of the same memory: FSDP2, full backward hooks and reentrant checkpointing pass each
    argument on as a tensor of its own. While compiling, views that are seen to be of one tensor are a ValueError, which
    means eager mode unless ``fullgraph=True``: the compiler cannot tell which part each of them shows, and a guess
    would let padding into the landmarks."""
    if a is b:
        return True
    alike = a.shape == b.shape and a.stride() == b.stride()
    if torch.compiler.is_compiling():
        if alike and (a if a._base is None else a._base) is (b if b._base is None else b._base):
            raise ValueError(
                "NystromMultiheadAttention: under torch.compile query and key must be one tensor object or share no "
                "memory, got two views of one tensor; set self_attention=True (or False) on the module, or pass the "
                "same object as both for self-attention (x = x.mT; attention(x, x, x))"
            )
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # by torch.func, which hides the memory
    if alike and wrapped(a) and wrapped(b):
        return same_tensor(torch._C._functorch.get_unwrapped(a), torch._C._functorch.get_unwrapped(b))
    return alike and a.storage_offset() == b.storage_offset() and _C._is_alias_of(a, b)


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention with the random stream of `nn.MultiheadAttention` -> (N, H, L, d), weights (N, H, L, S)."""
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal), None
    weights = F.dropout(exact_weights(q, k, mask), dropout_p)
    return weights @ v, weights


def exact_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax weights (N, H, L, S), zeros in rows without any key, where a plain softmax and its gradient are NaN."""
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    if mask is None:
        return scores.softmax(-1)
    scores = scores + mask
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
