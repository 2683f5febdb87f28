"""A stand-in for ``xformers.components.attention.NystromAttention``, which xformers 0.0.29 removed.

    from nystrom_ext.compat.xformers import NystromAttention    # instead of: from xformers.components.attention import

For code that cannot be edited, call :func:`install` before importing it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from .._tracing import refuse_script
from .presets import attention


class NystromAttention(nn.Module):
    """The removed class: constructor, ``forward``, state_dict (``skip_connection.weight``) and results are the same.

    Computed by :func:`nystrom_ext.compat.attention`, fused where that fuses. Heads are folded into the batch, as there.

    Args:
        dropout: acts on the result.
        num_heads: only used by the convolution.
        landmark_pooling: module (N, n, d) -> (N, num_landmarks, d); default segment means.
        causal: kept for its results: beyond num_landmarks tokens it lets the future through and drops the values after
            the first num_landmarks, of which it warns once.
        use_razavi_pinverse: Newton-Schulz with ``inv_iterations``; False: `torch.linalg.pinv`.
        pinverse_original_init: one start for the whole batch, which couples its samples.
        v_skip_connection: module (B, num_heads, n, d) -> same shape, added to the result.
        conv_kernel_size: makes ``v_skip_connection`` a depthwise convolution, if there is none.
    """

    requires_input_projection = True  # what xformers' MultiHeadDispatch asks an attention
    requires_head_dimension = False
    requires_separate_masks = True
    requires_same_k_q_dimensions = False
    requires_skip_multi_head = False
    requires_squared_context = False
    supports_attention_mask = False
    supports_key_padding_mask = True

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        dropout: float,
        num_heads: int,
        num_landmarks: int = 64,
        landmark_pooling: nn.Module | None = None,
        causal: bool = False,
        use_razavi_pinverse: bool = True,
        pinverse_original_init: bool = False,
        inv_iterations: int = 6,
        v_skip_connection: nn.Module | None = None,
        conv_kernel_size: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_landmarks = num_landmarks
        self.landmark_pooling = landmark_pooling
        self.causal = causal
        self.use_razavi_pinverse = use_razavi_pinverse
        self.pinverse_original_init = pinverse_original_init
        self.inv_iterations = inv_iterations
        self.attn_drop = nn.Dropout(dropout)
        if v_skip_connection is None and conv_kernel_size is not None:
            k = conv_kernel_size
            v_skip_connection = nn.Conv2d(
                num_heads, num_heads, (k, 1), padding=(k // 2, 0), bias=False, groups=num_heads
            )
        self.skip_connection = v_skip_connection

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """q (B * num_heads, L, d), k and v (B * num_heads, S, d) -> (B * num_heads, L, d).

        4-D inputs are served where num_landmarks >= k.shape[-2], by exact attention over the last but one dimension:
        users who pass (B, n, heads, d) get attention across heads, as they did.

        Args:
            key_padding_mask: (B, S) or (B * num_heads, 1, S), bool, **True = keep**, or 0 and exactly -inf = ignore.
        """
        if q.dim() == 4 and key_padding_mask is None and self.num_landmarks >= k.shape[-2]:
            out = self.forward(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
            return out.unflatten(0, q.shape[:2])
        if q.dim() != 3:
            raise ValueError(f"expected q, k, v of shape (batch * heads, tokens, features), got {tuple(q.shape)}")
        pooling = self.landmark_pooling
        x = attention(
            "xformers",
            q.unsqueeze(1),
            k.unsqueeze(1),
            v.unsqueeze(1),
            _per_head(key_padding_mask, len(k)),
            num_landmarks=self.num_landmarks,
            pinv_iterations=self.inv_iterations,
            causal=self.causal,
            use_razavi_pinverse=self.use_razavi_pinverse,
            pinverse_original_init=self.pinverse_original_init,
            landmark_pooling=None if pooling is None else lambda x: pooling(x.squeeze(1)).unsqueeze(1),
        ).squeeze(1)
        if self.skip_connection is not None:
            x = x + self.skip_connection(v.unflatten(0, (-1, self.num_heads))).flatten(0, 1)
        return self.attn_drop(x)


def _per_head(mask: Tensor | None, batch: int) -> Tensor | None:
    """(B, S) or (B * heads, 1, S) -> (B * heads, S)."""
    if mask is None:
        return None
    if mask.dim() == 3:
        return mask.squeeze(1)
    return mask.repeat_interleave(batch // len(mask), 0)


def install() -> None:
    """Make ``from xformers.components.attention import NystromAttention`` work in this process.

    With or without xformers; a class that xformers still has stays.
    """
    name = "xformers.components.attention"
    try:
        module = importlib.import_module(name)
    except ImportError:
        module = sys.modules[name] = ModuleType(name, "Only NystromAttention, by nystrom_ext.compat.")
    vars(module).setdefault("NystromAttention", NystromAttention)
