"""Tensors, masks and modules of the tests of compat."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from nystrom_ext import NystromMultiheadAttention, compat

B, H, D, TAPS = 2, 3, 8, 5
f64 = torch.float64
INF = float("inf")

SELF = ("official", "official_exact", "huggingface", "lucidrains", "t2t", "xformers", "flashnystrom")
MASKED = ("official", "official_exact", "huggingface", "lucidrains", "xformers")


def tensors(L, S=None, seed=0):
    """query, key, value, convolution weight."""
    torch.manual_seed(seed)
    shapes = (B, H, L, D), (B, H, S or L, D), (B, H, S or L, D), (H, 1, TAPS, 1)
    return [torch.randn(shape, dtype=f64, requires_grad=True) for shape in shapes]


def keep_mask(n, kind="holes"):
    torch.manual_seed(1)
    mask = torch.rand(B, n) < 0.7
    if kind == "tail":
        mask = torch.arange(n) < torch.tensor([[n], [n // 2 + 1]])
    if kind == "empty sample":
        mask[1] = False
    return mask


def assert_same(actual, expected, inputs, tolerance=1e-9):
    """Values and gradients."""
    assert torch.isfinite(expected).all()
    assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    grad = torch.linspace(-1, 1, expected.numel(), dtype=f64).view_as(expected)
    pairs = (torch.autograd.grad(out, inputs, grad, allow_unused=True) for out in (actual, expected))
    for a, e in zip(*pairs, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            assert_close(a, e, rtol=tolerance, atol=tolerance * e.abs().max().item() + 1e-300)


def ours(source, m=8, **options):
    torch.manual_seed(4)
    options = {"conv_kernel_size": TAPS, **compat.preset(source, num_landmarks=m), **options}
    return NystromMultiheadAttention(H * D, H, batch_first=True, dtype=f64, **options).eval()
