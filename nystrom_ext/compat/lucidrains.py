"""A stand-in for the package nystrom-attention (lucidrains), which TransMIL and its descendants use.

    from nystrom_ext.compat.lucidrains import NystromAttention    # instead of: from nystrom_attention import

For code that cannot be edited, call :func:`install` before importing it; :func:`nystrom_ext.convert_` switches models
that exist. Shapes: B batch, n tokens, H heads, d features of a head, m ``num_landmarks``, N the multiple of m above n.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from .._tracing import fx_leaf, refuse_script
from ..modules import Options
from ._lucidrains import PACKAGE, attend, attention_rows, factors, settings_of, weights


class NystromAttention(nn.Module):
    """The package's class: constructor, ``forward``, state_dict (``to_qkv``, ``to_out.0``, ``res_conv``), initial
    values for the same seed and results are the same, those of :func:`nystrom_ext.compat.attention`.

    Without a mask and with n > m the fused operator computes them. A mask, or n <= m, takes PyTorch operators, at the
    package's own cost: several (B, H, N, m) tensors, kept for the backward pass. With the package's mathematics, n
    not a multiple of m puts zeros in front that take part as keys unless there is a mask, padding changes what valid
    tokens get, and the samples of a batch depend on one another. 16-bit modules work, computed in float32.

    Args:
        padding: ``"package"``, or ``"ours"``: then :func:`nystrom_ext.nystrom_attention` computes everything, always
            fused: nothing is put in front, up to m tokens the attention is exact, and neither padding nor the other
            samples of a batch change a bit of a result. Masked tokens get ``to_out.0.bias``.
    The other arguments are those of the package. ValueError for a number that it fails with later.
    """

    nystrom_options: Options | None = None  # set by conversion
    padding = "package"  # also of objects that were pickled as the package's

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        num_landmarks: int = 256,
        pinv_iterations: int = 6,
        residual: bool = True,
        residual_conv_kernel: int = 33,
        eps: float = 1e-8,
        dropout: float = 0.0,
        *,
        padding: str = "package",
    ) -> None:
        if padding not in ("package", "ours"):
            raise ValueError(
                f'padding must be "package" or "ours", got {padding!r}; "package" computes what nystrom-attention '
                f'computes, with "ours" padding changes nothing'
            )
        if residual and residual_conv_kernel % 2 == 0:
            raise ValueError(f"residual_conv_kernel must be odd, got {residual_conv_kernel}; an even one changes n")
        options = Options(num_landmarks=num_landmarks, pinv_iterations=pinv_iterations)
        super().__init__()
        self.eps = eps
        self.num_landmarks, self.pinv_iterations = options.num_landmarks, options.pinv_iterations
        self.heads = heads
        self.scale = dim_head**-0.5
        self.padding = padding
        inner = heads * dim_head
        self.to_qkv = nn.Linear(dim, inner * 3, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(dropout))
        self.residual = residual
        if residual:
            taps = residual_conv_kernel
            self.res_conv = nn.Conv2d(heads, heads, (taps, 1), padding=(taps // 2, 0), groups=heads, bias=False)

    def configure(self, options: Options) -> None:
        self.nystrom_options = options

    def extra_repr(self) -> str:
        return f"heads={self.heads}, num_landmarks={self.num_landmarks}, padding={self.padding!r}"

    @fx_leaf
    def forward(
        self, x: Tensor, mask: Tensor | None = None, return_attn: bool = False, return_attn_matrices: bool = False
    ) -> Any:
        """x (B, n, dim) -> (B, n, dim), with ``return_attn`` a pair of that and the matrix that acts on the values.

        Args:
            mask: (B, n) bool, **True = keep**, as in the package.
            return_attn: (B, H, N, N), rows and columns of the N - n zeros in front first, as in the package; (B, H, n,
                n) with ``padding="ours"``. It is made once, in O(N² (m + d)) time: at n = 20,000 and H = 8 in float32
                it has 12.8 GB, and as much again for its gradient.
            return_attn_matrices: the three factors (B, H, N, m), (B, H, m, m), (B, H, m, N) instead, whose product it
                is, in O(n m) memory. NotImplementedError with ``padding="ours"``.
        """
        settings = settings_of(self, PACKAGE)
        if return_attn_matrices and settings.ours is not None:
            raise NotImplementedError(
                'NystromAttention: return_attn_matrices needs padding="package" and no options of convert_ that the '
                "package lacks: the operator does not keep its factors; use return_attn"
            )
        out = attend(self, PACKAGE, settings, x, mask)
        if not (return_attn or return_attn_matrices):
            return out
        if self.nystrom_options is not None and self.nystrom_options.need_weights == "never":
            return out, None
        return out, (factors if return_attn_matrices else weights)(self, PACKAGE, settings, x, mask)

    def attention_rows(
        self,
        x: Tensor,
        rows: Tensor | Sequence[int],
        mask: Tensor | None = None,
        average_attn_weights: bool = False,
    ) -> Tensor:
        """Some rows of the matrix of ``return_attn``, without the others: (B, H, R, n), with ``average_attn_weights``
        (B, R, n). A class token's: ``attention_rows(x, [0])``. Modules that ``convert_`` switched have it too.

        Rows and columns are those of the n tokens; with ``padding="package"`` the zeros in front, which the package's
        matrix begins with, are left out, with the share of the attention that they take. O(n) time, and O(R n) memory
        beside the projections; O(n m) memory where the module itself takes PyTorch operators. Differentiable.

        Args:
            x, mask: as for ``forward``.
            rows: positions of R tokens, a list or an int64 tensor on the device of x; negative ones count from the end.

        Raises:
            ValueError: rows that are no positions of tokens.
        """
        return attention_rows(self, PACKAGE, settings_of(self, PACKAGE), x, rows, mask, average_attn_weights)


class _PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor, **arguments: Any) -> Any:
        return self.fn(self.norm(x), **arguments)


class _FeedForward(nn.Module):
    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        wide = dim * mult
        self.net = nn.Sequential(nn.Linear(dim, wide), nn.GELU(), nn.Dropout(dropout), nn.Linear(wide, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Nystromformer(nn.Module):
    """The package's transformer, as :class:`NystromAttention` is its attention: same arguments, state_dict, results."""

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        dim_head: int = 64,
        heads: int = 8,
        num_landmarks: int = 256,
        pinv_iterations: int = 6,
        attn_values_residual: bool = True,
        attn_values_residual_conv_kernel: int = 33,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        padding: str = "package",
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention = NystromAttention(
                dim,
                dim_head,
                heads,
                num_landmarks,
                pinv_iterations,
                residual=attn_values_residual,
                residual_conv_kernel=attn_values_residual_conv_kernel,
                dropout=attn_dropout,
                padding=padding,
            )
            feed_forward = _FeedForward(dim, dropout=ff_dropout)
            self.layers.append(nn.ModuleList([_PreNorm(dim, attention), _PreNorm(dim, feed_forward)]))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, n, dim), mask (B, n) bool, True = keep -> (B, n, dim)."""
        layers: Any = self.layers
        for attention, feed_forward in layers:
            x = attention(x, mask=mask) + x
            x = feed_forward(x) + x
        return x


def install() -> None:
    """Make ``from nystrom_attention import NystromAttention`` give ours in this process, and ``Nystromformer``.

    With or without the package; call it before the code that imports it. Modules built before stay the package's:
    :func:`nystrom_ext.convert_` knows them.
    """
    for name in ("nystrom_attention", "nystrom_attention.nystrom_attention"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            module = sys.modules[name] = ModuleType(name, "NystromAttention and Nystromformer, by nystrom_ext.compat.")
            vars(module)["__path__"] = []  # a package, for those who import from its submodule
        vars(module).update(NystromAttention=NystromAttention, Nystromformer=Nystromformer, Nystromer=Nystromformer)
