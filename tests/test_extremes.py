"""Values at the ends of what a dtype holds. The rule: no NaN that exact attention in PyTorch would not give there too,
and none hidden: what a valid token holds shows in the result."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from problems import DTYPES, Problem, run
from torch import Tensor

from nystrom_ext import nystrom_attention

REGIMES = {
    "plain": Problem(B=1, L=100, m=16, d=16),
    "convolution": Problem(B=1, L=100, m=16, d=16, taps=3),
    "exact": Problem(B=1, L=20, m=32, d=16),
    "few queries": Problem(B=1, L=5, S=100, m=16, d=16),
    "few keys": Problem(B=1, L=100, S=5, m=16, d=16),
    "one key": Problem(B=1, L=100, S=1, m=16, d=16),
    "one landmark": Problem(B=1, L=100, m=1, d=16),
    "window": Problem(B=1, L=100, m=16, d=16, options={"window": 5, "pinned": 2}),
    "pinned": Problem(B=1, L=100, m=16, d=16, options={"pinned": 20}),
    "global": Problem(B=1, L=100, m=16, d=16, options={"coefficient": "global"}),
}


def exact_attention(x: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Exact attention in the operator's precision, and its gradients. Not SDPA: its CPU kernel hides some NaN."""
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    query, key, value = (t.detach().to(dtype).requires_grad_() for t in x[:3])
    out = (query.shape[3] ** -0.5 * query @ key.mT).softmax(-1) @ value
    return [t.to(grad.dtype) for t in (out.detach(), *torch.autograd.grad(out, (query, key, value), grad.to(dtype)))]


def results(p: Problem, values: list[Tensor], device: str) -> tuple[list[Tensor], list[Tensor]]:
    """The operator's and exact attention's outputs and gradients, on the CPU."""
    x = [t.detach().to(device).requires_grad_() for t in values]
    grad = torch.ones(*x[0].shape[:3], x[2].shape[3], dtype=x[0].dtype, device=device)
    ours = run(nystrom_attention, p, x, grad)
    return [t.cpu() for t in ours], [t.cpu() for t in exact_attention(x, grad)]


def scaled(p: Problem, dtype: torch.dtype, query: float, key: float, value: float) -> list[Tensor]:
    x = [t.detach() for t in p.tensors(torch.float64)]
    return [(t * factor).to(dtype) for t, factor in zip(x, (query, key, value, 1.0), strict=False)]


def no_new_nan(ours: list[Tensor], exact: list[Tensor]) -> None:
    """Result by result: a NaN in exact attention is one row's, and in the landmarks everybody's."""
    for name, a, e in zip(("out", "dquery", "dkey", "dvalue"), ours, exact, strict=False):
        assert e.isnan().any() or not a.isnan().any(), f"NaN in {name}; in exact attention there is none"


@pytest.mark.parametrize("size", [1e2, 1e4, 3e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", REGIMES)
def test_large_logits(name: str, dtype: torch.dtype, size: float, device: str) -> None:
    """Logits of up to `size`: each softmax is one-hot."""
    p = REGIMES[name]
    query, key, *rest = scaled(p, torch.float64, 1, 1, 1)
    factor = (size / (query @ key.mT).abs().max().item() * p.d**0.5) ** 0.5
    x = [t.to(dtype) for t in (query * factor, key * factor, *rest)]
    ours, exact = results(p, x, device)
    no_new_nan(ours, exact)
    assert all(t.isfinite().all() for t in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_pass_finds_the_windows_scores_again(dtype: torch.dtype, device: str) -> None:
    """With a scale that is no power of two and logits of 1e7, another order of rounding changes exponents by 1.
    Every token attends to itself alone."""
    p = Problem(B=1, H=1, L=300, m=16, d=24, options={"window": 8})
    query, _, value = (t.detach() for t in p.tensors(torch.float64))
    query = 7e3 * torch.nn.functional.normalize(query, dim=-1)
    ours, exact = results(p, [t.to(dtype) for t in (query, 1.37 * query, value)], device)
    torch.testing.assert_close(exact[3], torch.ones_like(exact[3]))
    torch.testing.assert_close(ours[3], exact[3])


@pytest.mark.parametrize("first", [50, 95, 96, 120, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, p in REGIMES.items() if p.keys >= 100 and p.m > 1])
def test_keys_that_score_minus_infinity(name: str, dtype: torch.dtype, first: int, device: str) -> None:
    """Have weight zero, also where they fill the first blocks or the first chunk of the keys. In bfloat16 the keys are
    finite and the scores overflow: tensor cores take a landmark as a sum of two terms, and infinity is none."""
    p = REGIMES[name]
    keys = first + 80
    p = replace(p, L=keys if p.S is None else p.L, S=p.S and keys, H=1)
    query, key, value, *rest = scaled(p, dtype, 1, 1, 1)
    key[:, :, :first] = -torch.finfo(dtype).max / 128 if dtype == torch.bfloat16 else -torch.inf
    ours, exact = results(p, [100 * query.abs() + 50, key, value, *rest], device)
    assert exact[0].isfinite().all() and ours[0].isfinite().all()


@pytest.mark.parametrize("m", [2**31, 2**32 + 3, 2**59, 2**60, sys.maxsize], ids=str)
def test_more_landmarks_than_any_sequence_has_tokens(m: int, device: str) -> None:
    """The way to say "exact, whatever the length"."""
    p = Problem(B=2, L=150, mask="tail", m=150)
    x, grad = [t.detach().to(device).requires_grad_() for t in p.tensors(torch.float64)], torch.ones(2, 2, 150, 8)
    grad = grad.to(x[0])
    for ours, exact in zip(*(run(nystrom_attention, q, x, grad) for q in (replace(p, m=m), p)), strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("sample", range(3))
def test_the_global_coefficient_of_a_sample_without_numbers_is_everybodys(sample: int, device: str) -> None:
    """Whichever sample it is."""
    p = replace(REGIMES["global"], B=3)
    x = scaled(p, torch.float32, 1, 1, 1)
    x[1][sample, 0, 50, 3] = torch.nan
    ours, _ = results(p, x, device)
    assert ours[0].isnan().all()


@pytest.mark.parametrize("factor", [1e-30, 1e-10, 1e-4, 1e4, 1e8, 1e15, 1e18, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", REGIMES)
def test_scales(name: str, dtype: torch.dtype, factor: float, device: str) -> None:
    """Of query and key, then of the value; denormals and zeros in the smaller dtypes."""
    p = REGIMES[name]
    for factors in ((factor, factor, 1.0), (1.0, 1.0, factor), (factor, 1 / factor, 1.0), (1.0, factor, factor)):
        x = scaled(p, dtype, *factors)
        if all(t.isfinite().all() for t in x):
            no_new_nan(*results(p, x, device))


@pytest.mark.parametrize("role", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize("name", REGIMES)
def test_the_end_of_float16(name: str, role: int, device: str) -> None:
    """Sums, of landmarks for one, leave the range of float16 although their means do not. Of values at the very end
    the approximation may overshoot, as its rows sum to 1 only approximately, and then it is infinite."""
    p = REGIMES[name]
    x = scaled(p, torch.float16, 1, 1, 1)
    x[role] = torch.full_like(x[role], 65504) if role == 2 else 65504 * x[role].sign()
    ours, exact = results(p, x, device)
    no_new_nan(ours, exact)
    assert not ours[0].isnan().any()
    assert role == 2 or ours[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", REGIMES)
def test_denormals(name: str, dtype: torch.dtype, device: str) -> None:
    """Attention of values that are all the smallest number is that number or zero, and nothing else."""
    p = REGIMES[name]
    x = scaled(p, dtype, 1, 1, 1)
    tiny = torch.finfo(dtype).smallest_normal / 4
    x[0], x[1], x[2] = x[0] * tiny, x[1] * tiny, torch.full_like(x[2], tiny)
    x = x[:3] + [torch.zeros_like(t) for t in x[3:]]
    ours, exact = results(p, x, device)
    no_new_nan(ours, exact)
    assert (ours[0].double().abs() <= 1.1 * tiny).all()


@pytest.mark.parametrize("which", ["query", "key", "value", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", REGIMES)
def test_identical_tokens(name: str, dtype: torch.dtype, which: str, device: str) -> None:
    """A has rank 1, or U does; equal scores everywhere make the mean of the values."""
    p = REGIMES[name]
    x = scaled(p, dtype, 1, 1, 1)
    for i, role in enumerate(("query", "key", "value")):
        if which in (role, "all"):
            x[i] = x[i][:, :, :1].expand_as(x[i])
    ours, exact = results(p, x, device)
    assert all(t.isfinite().all() for t in ours)
    if which == "key" and not p.taps and not p.options.get("window"):
        torch.testing.assert_close(ours[0], exact[0], atol=2e-2 if dtype.itemsize == 2 else 1e-4, rtol=2e-2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("role", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", REGIMES)
def test_what_valid_tokens_hold_shows(name: str, dtype: torch.dtype, role: int, bad: float, device: str) -> None:
    """Wherever it shows in exact attention: a row without a number there is one here."""
    p = REGIMES[name]
    x = scaled(p, dtype, 1, 1, 1)
    x[role][0, 0, x[role].shape[2] // 2, 3] = bad
    ours, exact = results(p, x, device)
    assert not (ours[0].isfinite() & ~exact[0].isfinite()).any()
    assert ours[0][0, 1].isfinite().all() or p.options.get("coefficient"), "another head is not concerned"
