"""The reference against formulas written another way, against SDPA, and against published test vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

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
