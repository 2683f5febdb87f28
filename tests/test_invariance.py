"""What must not change a result: padding, its amount and content, batch mates, their order, threads, repetition.

Everything here is compared bit by bit, in the output and in every gradient.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from problems import DTYPES, Problem, new_memory_is_nan, run
from torch import Tensor

from nystrom_ext import nystrom_attention

# Regime of a sample of 100 tokens: exact with m = 128, Nyström with 16; several chunks with 2300 tokens.
CASES = {
    "nystrom": Problem(B=1, L=100, m=16, d=16),
    "nystrom, convolution": Problem(B=1, L=100, m=16, d=16, taps=7),
    "exact": Problem(B=1, L=100, m=128, d=16, taps=4),
    "chunks": Problem(B=1, H=1, L=2300, m=8, d=16),
    "dropout": Problem(B=1, L=100, m=16, d=16, options={"dropout_p": 0.4}),
    "window": Problem(B=1, L=100, m=16, d=16, options={"window": 5, "pinned": 2}),
    "window over everything": Problem(B=1, L=100, m=16, d=16, options={"window": 10**6, "pinned": 1}),
    "window, chunks": Problem(B=1, H=1, L=2300, m=8, d=16, options={"window": 16}),
    "window, dropout": Problem(B=1, L=100, m=16, d=16, options={"window": 200, "pinned": 2, "dropout_p": 0.4}),
    "everything pinned": Problem(B=1, L=100, m=16, d=16, taps=3, options={"window": 3, "pinned": 100}),
}


def call(p: Problem, x: list[Tensor], mask: Tensor | None, grad: Tensor) -> list[Tensor]:
    """Output, dquery, dkey, dvalue and, if any, dconv with one mask for both sides."""
    torch.manual_seed(3)  # one dropout mask for all calls
    x = [t.detach().requires_grad_() for t in x]
    conv = x[3] if p.taps else None
    out = nystrom_attention(*x[:3], mask, query_padding_mask=mask, conv_weight=conv, num_landmarks=p.m, **p.options)
    return [out.detach(), *torch.autograd.grad(out, x, grad)]


def alone(p: Problem, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    x = p.tensors(dtype)
    grad = torch.randn_like(x[0])
    return x, grad, call(p, x, None, grad)


def pad(x: Tensor, amount: int, content: float) -> Tensor:
    return torch.nn.functional.pad(x.detach(), (0, 0, 0, amount), value=content)


@pytest.mark.parametrize("content", [0.0, 1e4, torch.nan, torch.inf])
@pytest.mark.parametrize("amount", [1, 37, 2000])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_on_the_right(name: str, dtype: torch.dtype, amount: int, content: float) -> None:
    p = CASES[name]
    if p.L > 2000 and (dtype, content) not in ((torch.float32, 0.0), (torch.bfloat16, torch.nan)):
        return  # two of the twelve are enough for long inputs
    x, grad, expected = alone(p, dtype)
    padded = [pad(t, amount, content) for t in x[:3]] + x[3:]
    mask = torch.arange(p.L + amount)[None] >= p.L
    actual = call(p, padded, mask, pad(grad, amount, content))
    for a, e in zip(actual[:4], expected[:4], strict=True):
        assert torch.equal(a[:, :, : p.L], e)
        assert not a[:, :, p.L :].any(), "padding must get zeros"
    if p.taps:
        assert torch.equal(actual[4], expected[4])


@pytest.mark.parametrize("name", ["nystrom", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_padding_on_the_left_and_holes(dtype: torch.dtype, name: str) -> None:
    """Tokens are packed by rank before anything is summed, so even these are equal to the bit on the CPU."""
    p = CASES[name]
    x, grad, expected = alone(p, dtype)
    mask = torch.rand(1, 2 * p.L, generator=torch.Generator().manual_seed(0)).argsort() < p.L
    places = (~mask[0]).nonzero()[:, 0]

    def spread(t: Tensor) -> Tensor:
        return torch.full((1, p.H, 2 * p.L, p.d), torch.nan, dtype=dtype).index_copy(2, places, t.detach())

    for a, e in zip(call(p, [spread(t) for t in x], mask, spread(grad)), expected, strict=True):
        assert torch.equal(a[:, :, places], e)


@pytest.mark.parametrize("name", ["nystrom, convolution", "exact", "chunks", "window", "window, chunks"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_batch_mates_and_their_order(name: str, dtype: torch.dtype) -> None:
    p = CASES[name]
    x, grad, expected = alone(p, dtype)
    others = torch.randn(3, p.H, p.L, p.d).to(dtype)
    others[1] = torch.nan
    others[2] *= 100
    lengths = torch.tensor([p.L, 5, p.L, p.L // 2])
    mask = torch.arange(p.L) >= lengths[:, None]
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        batch = [torch.cat([t.detach(), others])[order] for t in x[:3]] + x[3:]
        mate_grad = torch.cat([grad, others.nan_to_num()])[order]
        actual = call(p, batch, mask[order], mate_grad)
        place = order.index(0)
        for a, e in zip(actual[:4], expected[:4], strict=True):
            assert torch.equal(a[place], e[0])


def test_the_global_coefficient_does_couple_the_batch() -> None:
    """The control: what the paper's released code does, and why it is not the default."""
    x = torch.randn(2, 1, 100, 8)
    both = nystrom_attention(x, x, x, num_landmarks=16, coefficient="global")
    alone = [nystrom_attention(y, y, y, num_landmarks=16, coefficient="global") for y in x.split(1)]
    assert not torch.equal(both, torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "p",
    [
        Problem(B=1, H=1, L=3000, m=16, d=16, taps=5),
        Problem(B=3, H=2, L=700, m=32, d=32, mask="holes"),
        Problem(B=2, H=4, L=300, m=16, kv_heads=2, mask="tail", options={"coefficient": "global"}),
        Problem(B=2, H=3, L=40, m=64, options={"dropout_p": 0.2}),
        Problem(B=1, H=2, L=3000, m=16, d=16, options={"window": 16, "pinned": 2}),
        Problem(B=5, H=4, L=2500, m=16, kv_heads=2, taps=3, mask="tail", packed=True, options={"window": 9}),
        Problem(B=2, H=4, L=300, m=16, kv_heads=2, mask="holes", options={"window": 9, "dropout_p": 0.2}),
    ],
    ids=["one head", "masked", "grouped, global", "exact, dropout", "window", "packed", "window, grouped"],
)
def test_number_of_threads(p: Problem, dtype: torch.dtype) -> None:
    x = p.tensors(dtype)
    grad = torch.randn(*x[0].shape[:3], x[2].shape[3])
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        results.append(run(p.attention, p, x, grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("options", [{}, {"window": 16, "pinned": 1}], ids=["plain", "window"])
def test_repetition(options: dict[str, int]) -> None:
    p = Problem(B=2, H=2, L=1100, m=16, d=16, taps=3, mask="holes", options=options)
    x = p.tensors(torch.float32)
    grad = torch.randn_like(x[0])
    torch.set_num_threads(2)
    first = run(nystrom_attention, p, x, grad)
    for _ in range(100):
        again = run(nystrom_attention, p, x, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("mask", ["none", "all", "holes"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_new_memory_holds(name: str, dtype: torch.dtype, mask: str, device: str) -> None:
    """NaN in every output and buffer before the kernels write: they write all of what is read, padding too."""
    p = replace(CASES[name], B=2, mask=mask)
    x = [t.detach().to(device).requires_grad_() for t in p.tensors(dtype)]
    grad = torch.randn_like(x[0])
    results = []
    for memory in (nullcontext, new_memory_is_nan):
        torch.manual_seed(3)
        with memory():
            if memory is new_memory_is_nan:
                assert torch.empty(3, device=device).isnan().all(), "the control"
            results.append(run(nystrom_attention, p, x, grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"window": 2, "pinned": 3}, {"pinned": 50}], ids=["plain", "window", "pinned"])
@pytest.mark.parametrize("valid", [0, 1, 7, 8, 9, 49, 50, 51, 100])
def test_borders_of_the_regimes_in_self_attention(valid: int, options: dict[str, int]) -> None:
    """As below with one mask for both sides; with everything pinned attention is exact too."""
    m, n, d = 8, 120, 8
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, n, d, dtype=torch.float64)
    mask = torch.arange(n)[None] >= valid
    out = nystrom_attention(query, key, value, mask, query_padding_mask=mask, num_landmarks=m, **options)
    x = [t[:, :, :valid] for t in (query, key, value)]
    assert torch.equal(out[:, :, :valid], nystrom_attention(*x, num_landmarks=m, **options))
    assert not out[:, :, valid:].any()
    if 0 < valid <= max(m, options.get("pinned", 0)):
        torch.testing.assert_close(out[:, :, :valid], torch.nn.functional.scaled_dot_product_attention(*x))


@pytest.mark.parametrize("valid_queries", [0, 1, 7, 8, 9, 100])
@pytest.mark.parametrize("valid_keys", [0, 1, 7, 8, 9, 100])
def test_borders_of_the_regimes(valid_keys: int, valid_queries: int, device: str) -> None:
    """S' and L' at 0, 1, m - 1, m, m + 1: a padded sample gets what its valid tokens alone would get, and exact softmax
    attention wherever min(L', S') <= m."""
    m, n, d = 8, 120, 8
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, n, d, dtype=torch.float64, device=device)
    tokens = torch.arange(n, device=device)[None]
    key_mask, query_mask = tokens >= valid_keys, tokens >= valid_queries
    out = nystrom_attention(query, key, value, key_mask, query_padding_mask=query_mask, num_landmarks=m)
    q, k, v = query[:, :, :valid_queries], key[:, :, :valid_keys], value[:, :, :valid_keys]
    assert torch.equal(out[:, :, :valid_queries], nystrom_attention(q, k, v, num_landmarks=m))
    assert not out[:, :, valid_queries:].any()
    if min(valid_keys, valid_queries) <= m and valid_keys > 0:
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(out[:, :, :valid_queries], exact)
