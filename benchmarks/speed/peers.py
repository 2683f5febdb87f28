"""What a user could pick instead: exact attention, and Nyström attention composed from torch's own operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nystrom_ext import nystrom_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def segment_means(x: Tensor, m: int) -> Tensor:
    """(B, H, n, d) -> (B, H, m, d); n must be a multiple of m, as in the released implementations."""
    return x.unflatten(2, (m, -1)).mean(3)


def pseudo_inverse(a: Tensor, iterations: int = 6) -> Tensor:
    """Newton-Schulz, with the constant of each head (arXiv 2102.03902, equation 14)."""
    z = a.mT / a.sum(-2).amax(-1)[..., None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        x = a @ z
        z = 0.25 * z @ (13 * eye - x @ (15 * eye - x @ (7 * eye - x)))
    return z


def eager(m: int) -> Attention:
    """The released implementations' way: three explicit softmax matrices."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        qt, kt = segment_means(q, m), segment_means(k, m)
        p1, a, p3 = (q @ kt.mT).softmax(-1), (qt @ kt.mT).softmax(-1), (qt @ k.mT).softmax(-1)
        return (p1 @ pseudo_inverse(a)) @ (p3 @ v)

    return attention


def two_sdpa(m: int) -> Attention:
    """What a careful user writes today: both passes as scaled_dot_product_attention, the core as batched products."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qt, kt = segment_means(q, m), segment_means(k, m)
        u = F.scaled_dot_product_attention(qt, k, v)
        a = (q.shape[-1] ** -0.5 * qt @ kt.mT).softmax(-1)
        return F.scaled_dot_product_attention(q, kt, pseudo_inverse(a) @ u)

    return attention


def peers(m: int, compiled: bool) -> dict[str, Attention]:
    """Every contestant by the name of its column; ours is ``nystrom_ext``."""
    table: dict[str, Attention] = {
        "nystrom_ext": lambda q, k, v: nystrom_attention(q, k, v, num_landmarks=m),
        "eager": eager(m),
        "two SDPA": two_sdpa(m),
    }
    if compiled:
        table["two SDPA, compiled"] = torch.compile(two_sdpa(m))
    table["exact SDPA"] = F.scaled_dot_product_attention
    return table
