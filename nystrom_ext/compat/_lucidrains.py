"""What the package nystrom-attention (lucidrains) computes from the input of a module to its output.

Shared by the class that stands in for the package's and by the conversion of modules that exist, the package's and
copies of it. Shapes: B batch, n tokens, H heads, d features of a head, m landmarks, N the multiple of m above n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._masks import zero
from .._weights import positions
from ..functional import nystrom_attention, nystrom_attention_weights
from ..modules import Options
from .formulas import lucidrains_factors
from .presets import attention


@dataclass(frozen=True)
class Layout:
    """Names of the attributes of a module that computes what the package computes, and of the argument of its
    ``forward`` that asks for the attention matrix. The rest is called alike everywhere."""

    qkv: str
    out: str
    heads: str
    landmarks: str
    scale: str
    weights: str


PACKAGE = Layout("to_qkv", "to_out", "heads", "num_landmarks", "scale", "return_attn")


class Settings(NamedTuple):
    """What a call computes: the package's mathematics, or with ``ours`` the operator with these options."""

    num_landmarks: int
    iterations: int
    eps: float
    ours: dict[str, Any] | None = None


class _Inputs(NamedTuple):
    """Of the attention: queries, keys and values (B, H, N, d), the mask (B, N), True = keep, and how many of the N
    tokens are zeros that were put in front."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    padding: int


def attend(module: Any, layout: Layout, settings: Settings, x: Tensor, mask: Tensor | None) -> Tensor:
    """What ``module.forward(x, mask)`` computes: x (B, n, dim), mask (B, n), True = keep -> (B, n, dim)."""
    q, k, v, mask, padding = _inputs(module, layout, settings, x, mask)
    conv = getattr(module, "res_conv", None) if getattr(module, "residual", True) else None
    taps = None if conv is None else _taps(conv, q.shape[1])
    if settings.ours is None:
        q = _scaled(q, getattr(module, layout.scale))
        options: dict[str, Any] = {
            "num_landmarks": settings.num_landmarks,
            "pinv_iterations": settings.iterations,
            "eps": settings.eps,
        }
        out = attention("lucidrains", q, k, v, mask, conv_weight=taps, **options)
        values, ignored = v if mask is None else v * mask[:, None, :, None], None
    else:
        ignored = None if mask is None else ~mask.bool()
        scale = getattr(module, layout.scale)
        out = nystrom_attention(
            q, k, v, ignored, query_padding_mask=ignored, scale=scale, conv_weight=taps, **settings.ours
        )
        values = zero(v, ignored)
    if conv is not None and taps is None:
        out = out + zero(conv(values), ignored)
    return getattr(module, layout.out)(out.transpose(1, 2).flatten(2))[:, padding:]


def factors(module: Any, layout: Layout, settings: Settings, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """F (B, H, N, m), Z (B, H, m, m) and B (B, H, m, N), whose product acts on the values; float32 or float64."""
    q, k, _, mask, _ = _inputs(module, layout, settings, x, mask)
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q = _scaled(q.to(dtype), getattr(module, layout.scale))
        mask = None if mask is None else mask.bool()
        return lucidrains_factors(q, k.to(dtype), mask, settings.num_landmarks, settings.iterations, settings.eps)


def weights(module: Any, layout: Layout, settings: Settings, x: Tensor, mask: Tensor | None) -> Tensor:
    """The attention matrix: (B, H, N, N) of the package, (B, H, n, n) with ``ours``."""
    if settings.ours is None:
        f, z, b = factors(module, layout, settings, x, mask)
        return (f @ z) @ b
    q, k, _, mask, _ = _inputs(module, layout, settings, x, mask)
    ignored = None if mask is None else ~mask.bool()
    scale = getattr(module, layout.scale)
    return nystrom_attention_weights(q, k, ignored, query_padding_mask=ignored, scale=scale, **settings.ours)


def attention_rows(
    module: Any,
    layout: Layout,
    settings: Settings,
    x: Tensor,
    rows: Tensor | Sequence[int],
    mask: Tensor | None,
    average: bool,
) -> Tensor:
    """Rows of :func:`weights`, without what was put in front: (B, H, R, n), or with ``average`` (B, R, n)."""
    n, (m, iterations, _, ours) = x.shape[1], settings
    rows = positions(rows, n, x.device)
    if ours is None and (mask is not None or n <= m):
        f, z, b = factors(module, layout, settings, x, mask)
        some = f.index_select(2, rows + (f.shape[2] - n)) @ z @ b
        return (some.mean(1) if average else some)[..., f.shape[2] - n :]
    q, k, _, mask, padding = _inputs(module, layout, settings, x, mask)
    options: dict[str, Any] = {"scale": getattr(module, layout.scale), "rows": rows + padding, "average_heads": average}
    if ours is not None:
        ignored = None if mask is None else ~mask.bool()
        return nystrom_attention_weights(q, k, ignored, query_padding_mask=ignored, **options, **ours)
    dtype = torch.promote_types(q.dtype, torch.float32)
    options |= {"num_landmarks": m, "pinv_iterations": iterations, "coefficient": "global"}
    with torch.autocast(q.device.type, enabled=False):
        return nystrom_attention_weights(q.to(dtype), k.to(dtype), **options)[..., padding:]


def _inputs(module: Any, layout: Layout, settings: Settings, x: Tensor, mask: Tensor | None) -> _Inputs:
    """The padding comes before the projection, as in the package: q, k and v stay views of one tensor."""
    padding = -x.shape[1] % settings.num_landmarks if settings.ours is None else 0
    if padding:
        x = F.pad(x, (0, 0, padding, 0))
        mask = None if mask is None else F.pad(mask, (padding, 0))
    project = getattr(module, layout.qkv)
    parts = (x, x, x) if project is None else project(x).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (getattr(module, layout.heads), -1)).transpose(1, 2) for part in parts)
    return _Inputs(q, k, v, mask, padding)


def _scaled(q: Tensor, scale: float) -> Tensor:
    """For formulas that scale by d ** -0.5, which not every copy of the package does."""
    ratio = scale * q.shape[-1] ** 0.5
    return q if abs(ratio - 1) < 1e-9 else q * ratio


def _taps(conv: nn.Module, heads: int) -> Tensor | None:
    """The weight (H, taps) for the operator; None where the module may do more than the package's."""
    if type(conv) is not nn.Conv2d or conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks:
        return None
    plain = conv.stride == conv.dilation == (1, 1) and conv.bias is None and conv.padding_mode == "zeros"
    taps, width = conv.kernel_size
    same = taps % 2 == 1 and width == 1 and conv.padding == (taps // 2, 0) and conv.groups == heads == conv.in_channels
    return conv.weight[:, 0, :, 0] if plain and same else None


def differs(options: Options) -> bool:
    """Whether they ask for what the package's mathematics do not have."""
    return bool(options.window or options.pinned or options.coefficient != "global")


def own_options(module: Any, layout: Layout) -> dict[str, Any]:
    """The module's own settings as options of conversion."""
    coefficient = "per_head" if getattr(module, "padding", "package") == "ours" else "global"
    m, iterations = getattr(module, layout.landmarks), module.pinv_iterations
    return {"num_landmarks": m, "pinv_iterations": iterations, "coefficient": coefficient}


def settings_of(module: Any, layout: Layout) -> Settings:
    """From the options that conversion set, else from the module's attributes, which may change between calls."""
    options = module.nystrom_options
    m, iterations = getattr(module, layout.landmarks), module.pinv_iterations
    ours = getattr(module, "padding", "package") == "ours"
    if options is None:
        own = own_options(module, layout)
    else:
        own, ours = options.attention, ours or differs(options)
        m, iterations = options.num_landmarks, options.pinv_iterations
    return Settings(m, iterations, module.eps, own if ours else None)
