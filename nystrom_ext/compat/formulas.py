"""What the released Nyström attentions compute, in PyTorch operators.

All are softmax(Q Kt^T) Z softmax(Qt K^T) V, Z close to the pseudo-inverse of A = softmax(Qt Kt^T), with Newton-Schulz
started at A^T / c. They differ in the segments whose means are Qt and Kt, in c, and in what padding does. Each formula
was written from the implementation it names, whose defects it keeps.

Shapes: q (B, H, L, d), k (B, H, S, d), v (B, H, S, e), n = L = S tokens where they must agree, m landmarks. A formula
returns the attention (B, H, L, e), and the values that the implementation's convolution sees. Float32 or float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Bias = Tensor | float


def nystrom(
    q: Tensor, k: Tensor, v: Tensor, qt: Tensor, kt: Tensor, pinv: Callable[[Tensor], Tensor], *biases: Bias
) -> Tensor:
    """(F Z) (B V), with ``biases`` added to the scores of F (L, m), A (m, m) and B (m, S)."""
    f, z, b = factors(q, k, qt, kt, pinv, *biases)
    return (f @ z) @ (b @ v)


def factors(
    q: Tensor, k: Tensor, qt: Tensor, kt: Tensor, pinv: Callable[[Tensor], Tensor], *biases: Bias
) -> tuple[Tensor, Tensor, Tensor]:
    """F, Z and B of :func:`nystrom`."""
    bias1, bias2, bias3 = biases
    z = pinv((qt @ kt.mT + bias2).softmax(-1))
    return (q @ kt.mT + bias1).softmax(-1), z, (qt @ k.mT + bias3).softmax(-1)


def pseudo_inverse(a: Tensor, coefficient: str, iterations: int) -> Tensor:
    """Newton-Schulz from A^T / c, c = |A|_1 |A|_inf of each matrix, or of the largest of all of them ("global").

    Some implementations take c = |A|_1, the largest column sum: after a softmax the row sums |A|_inf are 1.
    """
    columns, rows = a.abs().sum(-2), a.abs().sum(-1)
    if coefficient == "global":
        c = columns.max() * rows.max()
    else:
        c = (columns.amax(-1) * rows.amax(-1))[..., None, None]
    z, eye = a.mT / c, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        x = a @ z
        z = z @ (13 * eye - x @ (15 * eye - x @ (7 * eye - x))) / 4
    return z


def segment_means(x: Tensor, m: int, short: int) -> Tensor:
    """Means over ``short`` segments of n // m tokens, then m - short equal ones: (.., n, d) -> (.., m, d)."""
    length = short * (x.shape[-2] // m)
    means = x[..., :length, :].unflatten(-2, (short, -1)).mean(-2)
    if short == m:
        return means
    return torch.cat([means, x[..., length:, :].unflatten(-2, (m - short, -1)).mean(-2)], -2)


def longer_segments_last(x: Tensor, m: int) -> Tensor:
    return segment_means(x, m, m - x.shape[-2] % m)


def _exact_or_equal_segments(
    q: Tensor, k: Tensor, v: Tensor, bias: Bias, m: int, iterations: int, seq_len: int | None, coefficient: str
) -> Tensor:
    """Shared by the official code and Hugging Face. ``seq_len`` is the configured length: m = seq_len is exact."""
    q, k = q * q.shape[-1] ** -0.25, k * k.shape[-1] ** -0.25
    if m == (seq_len or k.shape[-2]):
        return (q @ k.mT + bias).softmax(-1) @ v
    qt, kt = segment_means(q, m, m), segment_means(k, m, m)
    return nystrom(q, k, v, qt, kt, lambda a: pseudo_inverse(a, coefficient, iterations), 0, 0, bias)


def official(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    m: int,
    iterations: int,
    coefficient: str = "global",
    *,
    seq_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """mlpen/Nystromformer. mask (B, n), 1 = keep.

    Padded rows are zeroed before the means, which still divide by the full segment length.
    """
    bias: Bias = 0
    if mask is not None:
        keep = mask.to(q.dtype)
        q, k, bias = q * keep[:, None, :, None], k * keep[:, None, :, None], -1e9 * (1 - keep)[:, None, None]
    out = _exact_or_equal_segments(q, k, v, bias, m, iterations, seq_len, coefficient)
    return out, v if mask is None else v * keep[:, None, :, None]


def official_exact(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, m: int, iterations: int, *, seq_len: int | None = None
) -> tuple[Tensor, Tensor]:
    """mlpen/Nystromformer with c of each matrix, its option "exact"."""
    return official(q, k, v, mask, m, iterations, "per_head", seq_len=seq_len)


def huggingface(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, m: int, iterations: int, *, seq_len: int | None = None
) -> tuple[Tensor, Tensor]:
    """transformers' Nystromformer. mask (B, n) bool, True = keep, or additive (B, 1, 1, n).

    Only softmax(Qt K^T) is masked: padded rows enter the means and the convolution.
    """
    bias: Bias = 0
    if mask is not None:
        bias = mask
        if mask.dim() == 2:
            bias = (1 - mask.to(q.dtype))[:, None, None] * torch.finfo(q.dtype).min
    return _exact_or_equal_segments(q, k, v, bias, m, iterations, seq_len, "global"), v


def t2t(
    q: Tensor, k: Tensor, v: Tensor, mask: None, m: int, iterations: int, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The official T2T-ViT module, which scales by (dim / heads) ** -0.5 with dim before the projection: ``scale``."""
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    qt, kt = longer_segments_last(q, m), longer_segments_last(k, m)
    return nystrom(q, k, v, qt, kt, lambda a: pseudo_inverse(a, "per_head", iterations), 0, 0, 0), v


def lucidrains(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, m: int, iterations: int, *, eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """lucidrains/nystrom-attention, after its left padding: n is a multiple of m. mask (B, n) bool, True = keep."""
    f, z, b = lucidrains_factors(q, k, mask, m, iterations, eps)
    v = v if mask is None else v * mask[:, None, :, None]
    return (f @ z) @ (b @ v), v


def lucidrains_factors(
    q: Tensor, k: Tensor, mask: Tensor | None, m: int, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """F (B, H, n, m), Z (B, H, m, m) and B (B, H, m, n) of :func:`lucidrains`."""
    q = q * q.shape[-1] ** -0.5
    biases: tuple[Bias, ...] = (0, 0, 0)
    if mask is None:
        qt, kt = segment_means(q, m, m), segment_means(k, m, m)
    else:
        q, k = (x * mask[:, None, :, None] for x in (q, k))
        count = mask.unflatten(-1, (m, -1)).sum(-1)
        qt, kt = (x.unflatten(-2, (m, -1)).sum(-2) / (count + eps)[:, None, :, None] for x in (q, k))
        token, landmark = mask[:, None, :, None], (count > 0)[:, None, :, None]
        pairs = (token, landmark), (landmark, landmark), (landmark, token)
        # A sum with -max is -max, so rows without any pair become uniform, as by the original's masked_fill.
        biases = tuple(q.new_zeros(()).where(a & b.mT, -torch.finfo(q.dtype).max) for a, b in pairs)
    return factors(q, k, qt, kt, lambda a: pseudo_inverse(a, "global", iterations), *biases)


def xformers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    m: int,
    iterations: int,
    *,
    causal: bool = False,
    use_razavi_pinverse: bool = True,
    pinverse_original_init: bool = False,
    landmark_pooling: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """xformers.components NystromAttention up to 0.0.28. mask (B, S) is bool, True = keep, or holds 0 and -inf.

    ``causal`` compares the index of a landmark with the index of a token, so that it lets the future through
    and never reads the values of tokens after the first m.
    """
    S, scale = k.shape[-2], q.shape[-1] ** -0.5
    bias: Bias = 0
    if mask is not None:
        mask = mask if mask.is_floating_point() else q.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
        keep, bias = ~mask.isinf()[:, None, :, None], mask[:, None, None]
        q, k = q * keep, k * keep
    if causal:
        bias = bias + q.new_full((min(m, S), S), -torch.inf).triu(1)
    if m >= S:
        return (scale * q @ k.mT + bias).softmax(-1) @ v, v
    pool = landmark_pooling or (lambda x: longer_segments_last(x, m))
    coefficient = "global" if pinverse_original_init else "per_head"
    pinv = (lambda a: pseudo_inverse(a, coefficient, iterations)) if use_razavi_pinverse else torch.linalg.pinv
    return nystrom(scale * q, k, v, scale * pool(q), pool(k), pinv, 0, 0, bias), v


def flashnystrom(
    q: Tensor, k: Tensor, v: Tensor, mask: None, m: int, iterations: int, *, kappa_star: float = 0.0
) -> tuple[Tensor, Tensor]:
    """athrva98/FlashNystrom. The last segment takes the remainder; ``kappa_star`` > 0 adds its Tikhonov ridge."""

    def pinv(a: Tensor) -> Tensor:
        if not kappa_star:
            return pseudo_inverse(a, "per_head", iterations)
        fixed = a.detach().abs()
        ridge = (fixed.sum(-2).amax(-1) * fixed.sum(-1).amax(-1) / kappa_star)[..., None, None]
        gram = a.mT @ a + ridge * torch.eye(m, dtype=a.dtype, device=a.device)
        return pseudo_inverse(gram, "per_head", iterations) @ a.mT

    q = q * q.shape[-1] ** -0.5
    qt, kt = (segment_means(x, m, m - (x.shape[-2] % m > 0)) for x in (q, k))
    return nystrom(q, k, v, qt, kt, pinv, 0, 0, 0), v
