"""The reference against formulas written another way, against SDPA, and against published test vectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nystrom_ext import reference


def test_paper_formula_on_equal_segments() -> None:
    """Equation 13 of arXiv 2102.03902, whole batch at once, for n a multiple of m and no mask."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 48, 8, dtype=torch.float64)
    m, s = 6, 8**-0.5
    qt, kt = (x.reshape(2, 3, m, 8, 8).mean(3) for x in (q, k))
    p1, a, p3 = (torch.einsum("bhid,bhjd->bhij", x, y).mul(s).softmax(-1) for x, y in ((q, kt), (qt, kt), (qt, k)))
    z = a.mT / a.abs().sum(-2).amax(-1)[..., None, None]
    eye = torch.eye(m, dtype=a.dtype)
    for _ in range(6):
        az = a @ z
        z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
    torch.testing.assert_close(reference.nystrom_attention(q, k, v, num_landmarks=m), p1 @ z @ p3 @ v)


def columns_of_one_query(i: int, q: Tensor, k: Tensor, v: Tensor, m: int, w: int, p: int) -> tuple[Tensor, Tensor]:
    """Logits and values of query i's columns with a window w and p pinned tokens, token by token, for one head."""
    n, s = len(q), q.shape[1] ** -0.5
    segments = [range(j * n // m, (j + 1) * n // m) for j in range(m)]
    free = [[t for t in segment if t >= p] for segment in segments]
    qt = torch.stack([q[list(segment)].mean(0) for segment in segments])
    alive = [j for j in range(m) if free[j]]
    kt = {j: k[free[j]].mean(0) for j in alive}
    u = torch.stack([(s * k[p:] @ qt[j]).softmax(0) @ v[p:] for j in range(m)])
    a = torch.zeros(m, m, dtype=q.dtype)
    a[:, alive] = torch.stack([torch.stack([s * qt[r] @ kt[j] for j in alive]).softmax(0) for r in range(m)])
    values = reference.core(a, u, a.sum(0).max(), 6)

    near = [t for t in range(p, n) if abs(t - i) <= w] if w else []
    sigma = next(j for j in range(m) if i in segments[j])
    everything = (s * k[p:] @ qt[sigma]).exp().sum()
    landmarks = sum(len(free[j]) * (s * qt[sigma] @ kt[j]).exp() for j in alive)
    weights = [(s * q[i] @ k[t]).exp() for t in [*range(p), *near]]
    rows = [v[t] for t in [*range(p), *near]]
    for j in alive:
        outside = len(set(free[j]) - set(near))
        weights.append(outside * (s * q[i] @ kt[j]).exp() * everything / landmarks)
        rows.append(values[j])
    return torch.stack(weights), torch.stack(rows)


@pytest.mark.parametrize("w, p", [(3, 0), (0, 2), (3, 1), (7, 9), (40, 0), (40, 3), (1, 20)])
def test_window_and_pinned_tokens_query_by_query(w: int, p: int) -> None:
    """Means of the values under weights exp(logit), with sets of tokens instead of masks."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 41, 4, dtype=torch.float64)
    out = reference.nystrom_attention(q[None, None], k[None, None], v[None, None], num_landmarks=6, window=w, pinned=p)
    for i in range(len(q)):
        weights, values = columns_of_one_query(i, q, k, v, 6, w, p)
        torch.testing.assert_close(out[0, 0, i], weights @ values / weights.sum())


@pytest.mark.parametrize(
    "options", [{"window": 30}, {"window": 29, "pinned": 2}, {"pinned": 30}, {"pinned": 90}], ids=str
)
def test_a_window_over_everything_is_exact(options: dict[str, int]) -> None:
    x = torch.randn(3, 1, 2, 30, 8, dtype=torch.float64)
    out = reference.nystrom_attention(*x, num_landmarks=4, **options)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*x))


def test_exact_regime_is_softmax_attention() -> None:
    q, k, v = (torch.randn(2, 2, n, 8, dtype=torch.float64) for n in (30, 9, 9))
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(reference.nystrom_attention(q, k, v, num_landmarks=9), expected)
    expected = F.scaled_dot_product_attention(k, q, q)
    torch.testing.assert_close(reference.nystrom_attention(k, q, q, num_landmarks=9), expected)


def test_converged_iteration_inverts() -> None:
    """With as many landmarks as tokens would give, and many iterations, Z A = I."""
    a = torch.randn(5, 5, dtype=torch.float64).softmax(-1)[None]
    z = reference.core(a, torch.eye(5, dtype=torch.float64), torch.tensor(5.0), 60)
    torch.testing.assert_close(z @ a, torch.eye(5, dtype=torch.float64)[None])


def test_convolution_is_conv1d() -> None:
    v, w = torch.randn(3, 40, 8), torch.randn(3, 5)
    expected = F.conv1d(v.permute(2, 0, 1), w[:, None], padding=2, groups=3).permute(1, 2, 0)
    torch.testing.assert_close(reference.convolution(v, w), expected)


def test_philox_known_answers() -> None:
    """The test vectors of Random123 for philox4x32 with 10 rounds."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    for (counter, key), words in {
        ((0, 0, 0, 0), (0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((ones,) * 4, (ones,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        pi: (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    }.items():
        result = reference.philox([torch.tensor([c]) for c in counter], *key)
        assert tuple(int(x) for x in result) == words


def test_dropout_rate_and_scale() -> None:
    heads, rows, columns = torch.arange(4), torch.arange(200), torch.arange(64)
    drop = reference.dropout_multiplier(torch.tensor([3, 5]), 0.3, heads, rows, columns)
    assert set(drop.unique().tolist()) == {0.0, 1 / 0.7}
    assert abs(drop.mean() - 1) < 0.01
