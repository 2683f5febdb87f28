"""The released Nyström attentions once more, written to share nothing with `nystrom_ext.compat`: to test it against.

Every step is a matrix: segment means are M x with M (m, n), the convolution is T v with T (n, n) per head. Constants,
masks and the order of operations are taken literally from each implementation. q, k, v are (B, H, n, d) in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax(scores: Tensor) -> Tensor:
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def means(sizes: list[int]) -> Tensor:
    """(m, n) matrix that averages consecutive segments of these sizes."""
    rows = [torch.full((1, size), 1 / size, dtype=torch.float64) for size in sizes]
    return torch.block_diag(*rows)


def equal(n: int, m: int) -> list[int]:
    assert n % m == 0
    return [n // m] * m


def late(n: int, m: int) -> list[int]:
    """T2T-ViT and xformers: the last n % m segments are longer."""
    return [n // m] * (m - n % m) + [n // m + 1] * (n % m)


def last(n: int, m: int) -> list[int]:
    """FlashNystrom: the last segment takes the remainder."""
    return [n // m] * (m - 1) + [n - (m - 1) * (n // m)]


def constant(a: Tensor, kind: str) -> Tensor:
    """c of Z_0 = A^T / c for a (B, H, m, m), as (B, H) or a scalar."""
    one, infinity = a.abs().sum(2).max(2).values, a.abs().sum(3).max(2).values  # |A|_1, |A|_inf
    return {
        "original": one.max(),  # official default, Hugging Face, xformers pinverse_original_init
        "exact": one,  # official exact, T2T-ViT, xformers
        "global norms": one.max() * infinity.max(),  # lucidrains
        "norms": one * infinity,  # FlashNystrom
    }[kind]


def newton_schulz(a: Tensor, kind: str, iterations: int) -> Tensor:
    c = constant(a, kind).expand(a.shape[:2])
    z = a.transpose(2, 3) / c[:, :, None, None]
    for _ in range(iterations):
        x = a @ z
        z = 13 / 4 * z - 15 / 4 * z @ x + 7 / 4 * z @ x @ x - 1 / 4 * z @ x @ x @ x
    return z


def toeplitz(weight: Tensor, n: int) -> Tensor:
    """(H, 1, taps, 1) -> (H, n, n): the zero-padded convolution along the sequence."""
    taps = weight.shape[2]
    offset = torch.arange(n)[None] - torch.arange(n)[:, None] + taps // 2
    inside = (offset >= 0) & (offset < taps)
    return weight[:, 0, :, 0][:, offset.clamp(0, taps - 1)] * inside


def convolved(x: Tensor, v: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x + toeplitz(weight, v.shape[2]) @ v


def official(q, k, v, mask, m, conv=None, seq_len=None, kind="original", iterations=6):
    """mask (B, n), 1 = keep, or None."""
    B, _, n, d = q.shape
    mask = torch.ones(B, n, dtype=q.dtype) if mask is None else mask.to(q.dtype)
    rows = mask.reshape(B, 1, n, 1)
    q, k = q * rows / math.sqrt(math.sqrt(d)), k * rows / math.sqrt(math.sqrt(d))
    penalty = 1e9 * (1 - mask.reshape(B, 1, 1, n))
    if m == (seq_len or n):
        x = softmax(q @ k.transpose(2, 3) - penalty) @ v
    else:
        average = means(equal(n, m))
        ql, kl = average @ q, average @ k
        z = newton_schulz(softmax(ql @ kl.transpose(2, 3)), kind, iterations)
        x = softmax(q @ kl.transpose(2, 3)) @ (z @ (softmax(ql @ k.transpose(2, 3) - penalty) @ v))
    return convolved(x, v * rows, conv)


def huggingface(q, k, v, additive, m, conv=None, seq_len=None, iterations=6):
    """additive (B, 1, 1, n) or None: reaches only the scores over all keys."""
    n, d = q.shape[2:]
    additive = torch.zeros(1, dtype=q.dtype) if additive is None else additive
    q, k = q / d**0.25, k / d**0.25
    if m == (seq_len or n):
        x = softmax(q @ k.transpose(2, 3) + additive) @ v
    else:
        average = means(equal(n, m))
        ql, kl = average @ q, average @ k
        z = newton_schulz(softmax(ql @ kl.transpose(2, 3)), "original", iterations)
        x = softmax(q @ kl.transpose(2, 3)) @ z @ (softmax(ql @ k.transpose(2, 3) + additive) @ v)
    return convolved(x, v, conv)


def t2t(q, k, v, m, conv=None, scale=None, iterations=6):
    n, d = q.shape[2:]
    q = q * (scale or 1 / math.sqrt(d))
    average = means(late(n, m))
    ql, kl = average @ q, average @ k
    z = newton_schulz(softmax(ql @ kl.transpose(2, 3)), "exact", iterations)
    return convolved(softmax(q @ kl.transpose(2, 3)) @ z @ softmax(ql @ k.transpose(2, 3)) @ v, v, conv)


def lucidrains(q, k, v, mask, m, conv=None, iterations=6):
    """mask (B, n) bool, True = keep, or None. Includes the left padding and the cut to the last n rows."""
    B, H, n, d = q.shape
    p = (m - n % m) % m
    q, k, v = (torch.cat([torch.zeros(B, H, p, x.shape[3], dtype=x.dtype), x], 2) for x in (q, k, v))
    length = (n + p) // m
    average = means([length] * m).expand(B, m, n + p)
    token, landmark = torch.ones(B, n + p, dtype=torch.bool), torch.ones(B, m, dtype=torch.bool)
    if mask is not None:
        token = torch.cat([torch.zeros(B, p, dtype=torch.bool), mask], 1)
        q, k, v = (x * token[:, None, :, None] for x in (q, k, v))
        count = (length * average * token[:, None]).sum(2)  # kept tokens of each segment
        landmark = count > 0.5
        average = (
            average * (length / (count.round() + 1e-8).float().double())[:, :, None]
        )  # the original adds in float32
    q = q / math.sqrt(d)
    ql, kl = average[:, None] @ q, average[:, None] @ k

    def attend(rows: Tensor, columns: Tensor, x: Tensor, y: Tensor) -> Tensor:
        pair = (rows[:, :, None] & columns[:, None, :])[:, None]
        lowest = torch.tensor(-torch.finfo(q.dtype).max, dtype=q.dtype)
        return softmax(torch.where(pair, x @ y.transpose(2, 3), lowest))

    z = newton_schulz(attend(landmark, landmark, ql, kl), "global norms", iterations)
    x = attend(token, landmark, q, kl) @ z @ (attend(landmark, token, ql, k) @ v)
    return convolved(x, v, conv)[:, :, p:]


def xformers(
    q,
    k,
    v,
    additive,
    m,
    conv=None,
    causal=False,
    pinverse_original_init=False,
    use_razavi_pinverse=True,
    iterations=6,
):
    """additive (B, n) of 0 and -inf, or None. L and S may differ."""
    (L, d), S = q.shape[2:], k.shape[2]
    bias = torch.zeros(1, 1, 1, S, dtype=q.dtype)
    if additive is not None:
        ignored = (additive == -math.inf)[:, None, :, None]
        q, k, bias = q.masked_fill(ignored, 0), k.masked_fill(ignored, 0), bias + additive[:, None, None]
    rows = S if m >= S else m
    if causal:
        later = torch.arange(S)[None] > torch.arange(rows)[:, None]
        bias = bias + torch.zeros(rows, S, dtype=q.dtype).masked_fill(later, -math.inf)
    s = 1 / math.sqrt(d)
    if m >= S:
        x = softmax(s * q @ k.transpose(2, 3) + bias) @ v
    else:
        ql, kl = means(late(L, m)) @ q, means(late(S, m)) @ k
        a = softmax(s * ql @ kl.transpose(2, 3))
        kind = "original" if pinverse_original_init else "exact"
        z = newton_schulz(a, kind, iterations) if use_razavi_pinverse else torch.linalg.pinv(a)
        x = softmax(s * q @ kl.transpose(2, 3)) @ z @ (softmax(s * ql @ k.transpose(2, 3) + bias) @ v)
    return convolved(x, v, conv)


def flashnystrom(q, k, v, m, conv=None, kappa_star=0.0, iterations=6):
    n, d = q.shape[2:]
    q, k = q * d**-0.25, k * d**-0.25
    average = means(last(n, m))
    ql, kl = average @ q, average @ k
    a = softmax(ql @ kl.transpose(2, 3))
    if kappa_star > 0:
        ridge = (constant(a, "norms") / kappa_star).detach()
        gram = a.transpose(2, 3) @ a + torch.diag_embed(ridge[:, :, None].expand(-1, -1, m))
        z = newton_schulz(gram, "norms", iterations) @ a.transpose(2, 3)
    else:
        z = newton_schulz(a, "norms", iterations)
    x = softmax(q @ kl.transpose(2, 3)) @ (z @ (softmax(ql @ k.transpose(2, 3)) @ v))
    return convolved(x, v, conv)


def additive(mask, low=-math.inf):
    """(B, n) bool, True = keep -> 0 and ``low``."""
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, low)


def released(name, q, k, v, m, conv=None, mask=None, **options):
    """The implementation called ``name`` in compat, with its own options. mask (B, n) bool, True = keep."""
    if name in ("official", "official_exact"):
        return official(q, k, v, mask, m, conv, kind="original" if name == "official" else "exact", **options)
    if name == "huggingface":
        mask = None if mask is None else additive(mask, torch.finfo(torch.float64).min)[:, None, None]
        return huggingface(q, k, v, mask, m, conv, **options)
    if name == "lucidrains":
        return lucidrains(q, k, v, mask, m, conv, **options)
    if name == "xformers":
        return xformers(q, k, v, None if mask is None else additive(mask), m, conv, **options)
    return {"t2t": t2t, "flashnystrom": flashnystrom}[name](q, k, v, m, conv, **options)
