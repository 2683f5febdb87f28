"""The definition of Nyström attention in plain PyTorch: the truth every kernel is tested against.

Slow and dense on purpose. Invalid tokens are removed before anything is computed, so padding cannot matter, and each
sample is computed by itself, so its batch mates cannot matter either. Gradients come from autograd. Any floating dtype;
tests use float64. Formulas: Nyströmformer (arXiv 2102.03902); the four stages carry the same names in ``csrc``.

Shapes in the stages (one sample): q (H, L, d), k (H, S, d), v (H, S, e), landmarks (H, m, d).
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor


def offsets(n: int, m: int) -> list[int]:
    """Segment j of n tokens holds ranks offsets[j] .. offsets[j + 1] - 1; with n <= m every token is its own."""
    m = min(n, m)
    return [j * n // m for j in range(m + 1)]


def landmarks(x: Tensor, m: int, pinned: int = 0) -> Tensor:
    """Qt, Kt: means over m balanced segments without the pinned tokens; zero where none is left."""
    ends = offsets(x.shape[1], m)
    parts = [x[:, max(a, pinned) : max(b, pinned)] for a, b in itertools.pairwise(ends)]
    return torch.stack([part.sum(1) / max(part.shape[1], 1) for part in parts], 1)


def key_pass(qt: Tensor, k: Tensor, v: Tensor, scale: float, drop: Tensor | float = 1.0) -> Tensor:
    """U = softmax(s Qt K^T) V."""
    return (scale * qt @ k.mT).softmax(-1).mul(drop) @ v


def similarity(qt: Tensor, kt: Tensor, scale: float, count: Tensor) -> Tensor:
    """A = softmax(s Qt Kt^T) over the landmarks that stand for any token."""
    return (scale * qt @ kt.mT).masked_fill(count == 0, -torch.inf).softmax(-1)


def core(a: Tensor, u: Tensor, c: Tensor, iterations: int) -> Tensor:
    """W = Z U, Z by Newton-Schulz from A^T / c. Six iterations filter the spectrum of A; they do not invert it."""
    z, eye = a.mT / c, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        x = a @ z
        z = 0.25 * z @ (13 * eye - x @ (15 * eye - x @ (7 * eye - x)))
    return z @ u


def query_pass(q: Tensor, kt: Tensor, w: Tensor, scale: float, drop: Tensor | float = 1.0) -> Tensor:
    """O = softmax(s Q Kt^T) W."""
    return (scale * q @ kt.mT).softmax(-1).mul(drop) @ w


def counts(n: int, m: int, pinned: int, device: torch.device) -> Tensor:
    """c_J: tokens that are not pinned in each of the m segments."""
    ends = [max(b, pinned) for b in offsets(n, m)]
    return torch.tensor([b - a for a, b in itertools.pairwise(ends)], device=device)


def missed_mass(qt: Tensor, k: Tensor, kt: Tensor, scale: float, count: Tensor) -> Tensor:
    """delta (H, m): log of the mass of the keys over that of the landmarks, each counted for all of its tokens."""
    scores = scale * qt @ kt.mT + count.to(qt.dtype).log()
    return (scale * qt @ k.mT).logsumexp(-1) - scores.logsumexp(-1)


def window_query_pass(
    q: Tensor, k: Tensor, v: Tensor, kt: Tensor, w: Tensor, missed: Tensor, scale: float, window: int, pinned: int
) -> tuple[Tensor, Tensor]:
    """One softmax over landmarks, pinned tokens and the window -> probabilities (H, n, m + pinned + n), values of the
    columns. The last n columns are the tokens; those outside the window have probability 0."""
    n, m = q.shape[1], kt.shape[1]
    i = torch.arange(n, device=q.device)
    near = (i[:, None] - i).abs() <= window if window else torch.zeros(n, n, dtype=torch.bool, device=q.device)
    near = near & (i >= pinned)  # a pinned token is the pinned column, wherever it is
    segment = torch.bucketize(i, torch.tensor(offsets(n, m)[1:], device=q.device), right=True)
    inside = torch.zeros(n, m, dtype=torch.long, device=q.device).index_add_(1, segment, near.long())
    log_count = (counts(n, m, pinned, q.device) - inside).to(q.dtype).log()  # -inf where the window holds the segment
    exact = scale * q @ k.mT
    logits = [scale * q @ kt.mT + log_count + missed[:, segment, None], exact[..., :pinned]]
    p = torch.cat([*logits, exact.masked_fill(~near, -torch.inf)], -1).softmax(-1)
    return p, torch.cat([w, v[:, :pinned], v], 1)


def convolution(v: Tensor, weight: Tensor) -> Tensor:
    """y_i = sum_t w_t v_{i + t - T//2}, zero outside; v (H, n, e), weight (H, T)."""
    taps, n = weight.shape[1], v.shape[1]
    padded = torch.nn.functional.pad(v, (0, 0, taps // 2, taps - 1 - taps // 2))
    return sum((weight[:, t, None, None] * padded[:, t : t + n] for t in range(taps)), torch.zeros_like(v))


def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    query_padding_mask: Tensor | None = None,
    num_landmarks: int = 64,
    pinv_iterations: int = 6,
    scale: float | None = None,
    dropout_p: float = 0.0,
    conv_weight: Tensor | None = None,
    coefficient: str = "per_head",
    enable_gqa: bool = False,
    window: int = 0,
    pinned: int = 0,
    self_attention: bool | None = None,
    rng_state: Tensor | None = None,
) -> Tensor:
    """As :func:`nystrom_ext.nystrom_attention`; dropout needs ``rng_state``, int64 (2,): seed and offset."""
    if query is key if self_attention is None else self_attention:
        key_padding_mask, query_padding_mask = (
            query_padding_mask if key_padding_mask is None else key_padding_mask,
            key_padding_mask if query_padding_mask is None else query_padding_mask,
        )
    (B, H, L, d), S, m = query.shape, key.shape[2], num_landmarks
    scale = d**-0.5 if scale is None else scale
    if enable_gqa:
        key, value = (x.repeat_interleave(H // x.shape[1], 1) for x in (key, value))
    k_valid = [_valid(key_padding_mask, b, S, key.device) for b in range(B)]
    q_valid = [_valid(query_padding_mask, b, L, key.device) for b in range(B)]
    qkv = [(query[b, :, q_valid[b]], key[b, :, k_valid[b]], value[b, :, k_valid[b]]) for b in range(B)]

    A = {}  # of the samples in the Nyström regime
    for b, (q, k, _) in enumerate(qkv):
        if min(q.shape[1], k.shape[1]) > m and k.shape[1] > pinned:
            count = counts(k.shape[1], m, pinned, key.device)
            A[b] = similarity(landmarks(q, m), landmarks(k, m, pinned), scale, count)
    c = {b: (a.sum(-1).amax(-1) * a.sum(-2).amax(-1))[:, None, None] for b, a in A.items()}
    if coefficient == "global" and c:
        rows = torch.stack([a.sum(-1).max() for a in A.values()]).max()
        columns = torch.stack([a.sum(-2).max() for a in A.values()]).max()
        c = {b: rows * columns for b in c}

    out = []
    for b, (q, k, v) in enumerate(qkv):
        rows, keys = q_valid[b].nonzero()[:, 0], k_valid[b].nonzero()[:, 0]
        heads = torch.arange(b * H, (b + 1) * H, device=key.device)
        drop = functools.partial(_dropout, rng_state, dropout_p, heads, rows, q.dtype)
        if b not in A:  # exact softmax attention; zeros without keys
            columns = keys if q.shape[1] <= m < k.shape[1] else torch.arange(k.shape[1], device=key.device)
            o = query_pass(q, k, v, scale, drop(columns))
        else:
            qt, kt = landmarks(q, m), landmarks(k, m, pinned)
            w = core(A[b], key_pass(qt, k[:, pinned:], v[:, pinned:], scale), c[b], pinv_iterations)
            if window or pinned:
                missed = missed_mass(qt, k[:, pinned:], kt, scale, counts(k.shape[1], m, pinned, key.device))
                p, values = window_query_pass(q, k, v, kt, w, missed, scale, window, pinned)
                o = p * drop(window_columns(len(rows), m, window, pinned, key.device)) @ values
            else:
                o = query_pass(q, kt, w, scale, drop(torch.arange(m, device=key.device)))
        y = q.new_zeros(H, L, v.shape[-1]).index_copy(1, rows, o)
        if conv_weight is not None:
            masked = v.new_zeros(H, S, v.shape[-1]).index_copy(1, keys, v)
            y = y + convolution(masked, conv_weight) * q_valid[b][:, None]
        out.append(y)
    return torch.stack(out) if out else query.new_zeros(B, H, L, value.shape[-1])


def _valid(mask: Tensor | None, b: int, n: int, device: torch.device) -> Tensor:
    return torch.ones(n, dtype=torch.bool, device=device) if mask is None else ~mask[b]


def window_columns(n: int, m: int, window: int, pinned: int, device: torch.device) -> Tensor:
    """Dropout's numbers of the columns of :func:`window_query_pass`, (n, columns): landmarks and pinned tokens are
    counted, and the window goes on from token i - w. Numbers of tokens outside the window do not matter."""
    w, i = min(window, n - 1), torch.arange(n, device=device)
    near = (m + pinned + w + i - i[:, None]).clamp(min=0)
    return torch.cat([torch.arange(m + pinned, device=device).expand(n, -1), near], 1)


def _dropout(
    rng_state: Tensor | None, p: float, heads: Tensor, rows: Tensor, dtype: torch.dtype, columns: Tensor
) -> Tensor | float:
    return dropout_multiplier(rng_state, p, heads, rows, columns).to(dtype) if p > 0 else 1.0


def dropout_multiplier(rng_state: Tensor | None, p: float, heads: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(heads, rows, columns) of 0 or 1 / (1 - p), in float64, from the counter-based generator Philox.

    columns: numbers that all rows share, or (rows, columns).

    key = seed (64 bits) with the offset's high word xored into its high word; counter = (column // 4, row,
    sample * H + head, offset's low word); word column % 4 of the result drops the entry if below p 2^32. rows are
    positions in the sequence; columns are landmark indices, or key positions where L' <= m < S', or
    :func:`window_columns`.
    """
    assert rng_state is not None, "dropout in the reference needs rng_state"
    seed, offset = (int(x) for x in rng_state)
    shape = (len(heads), len(rows), columns.shape[-1])
    counter = columns.expand(shape) // 4, rows[None, :, None], heads[:, None, None], heads.new_tensor(offset & WORD)
    words = philox([c.expand(shape) for c in counter], seed & WORD, (seed >> 32 ^ offset >> 32) & WORD)
    bits = torch.stack(words, -1).gather(-1, (columns % 4).expand(shape)[..., None])[..., 0]
    return (bits >= int(p * 2**32)).double() / (1 - p) if p < 1 else torch.zeros(shape, dtype=torch.float64)


WORD = 0xFFFFFFFF


def philox(counter: list[Tensor], k0: int | Tensor, k1: int | Tensor) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # products of 64 bits, wrapped: only their bits matter
        c0, c1, c2, c3 = (b >> 32 & WORD) ^ c1 ^ k0, b & WORD, (a >> 32 & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return [c0, c1, c2, c3]
