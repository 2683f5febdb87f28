"""The operator on a GPU: the CPU's problems and more against the float64 reference, and what must not change a bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from problems import DTYPES, REGIMES, Problem, check, layouts, run
from test_invariance import CASES, call, pad, test_borders_of_the_regimes  # noqa: F401  (collected here too)
from test_operator import PROBLEMS, TILES, random_problems
from torch import Tensor

from nystrom_ext import nystrom_attention, reference

DEVICE = "cuda"
SIZES = {
    "odd head_dim": Problem(L=500, m=64, d=33, e=71, taps=3, mask="holes"),
    "wide value": Problem(L=500, m=32, d=32, e=160),
    "taps beyond a tile": Problem(L=700, m=64, d=64, taps=257, mask="holes"),
    "grouped, long": Problem(H=8, kv_heads=2, L=2500, m=64, d=64, taps=33, mask="holes"),
    "one head, many chunks": Problem(B=1, H=1, L=20_000, m=64, d=64, taps=33, mask="tail"),
}


@pytest.fixture(scope="module", autouse=True)
def new_memory_is_nan() -> Iterator[None]:
    """So that reading what no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(p: Problem, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Inputs and a gradient."""
    x = [t.detach().to(DEVICE).requires_grad_() for t in p.tensors(dtype)]
    return x, torch.randn(*x[0].shape[:3], x[2].shape[3], device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*PROBLEMS, *TILES])
def test_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    check({**PROBLEMS, **TILES}[name], dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_input_regimes(regime: str, dtype: torch.dtype) -> None:
    check(Problem(B=1, H=1, L=1024, m=64, d=64), dtype, REGIMES[regime], DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [16, 49, 64, 100, 128, 256])
@pytest.mark.parametrize("d", [16, 32, 40, 64, 80, 128, 256])
def test_landmarks_and_head_dims(d: int, m: int, dtype: torch.dtype) -> None:
    check(Problem(B=2, H=2, L=777, m=m, d=d, taps=33 if m == 64 else 0, mask="holes"), dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str, dtype: torch.dtype) -> None:
    check(SIZES[name], dtype, device=DEVICE)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(random_problems(longest=300, widest=130, most_landmarks=140, most_taps=40))
def test_random_problems(p: Problem) -> None:
    check(p, torch.float64, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_16_bit_is_never_worse_than_the_eager_composition(regime: str, dtype: torch.dtype) -> None:
    p = Problem(B=1, H=1, L=1024, m=64, d=64)
    x = [t.detach() for t in p.tensors(dtype, REGIMES[regime])]
    grad = torch.randn_like(x[0])
    truth = run(reference.nystrom_attention, p, [t.double().requires_grad_() for t in x], grad)
    there = [t.to(DEVICE).requires_grad_() for t in x]
    ours, eager = (run(f, p, there, grad) for f in (nystrom_attention, reference.nystrom_attention))
    for a, b, t in zip(ours, eager, truth, strict=True):
        error, allowed = ((y.cpu().double() - t).abs().max() for y in (a, b))
        assert error <= allowed.nan_to_num(torch.inf)


@pytest.mark.parametrize("taps", [0, 3])
@pytest.mark.parametrize("S", [12, 7])
def test_gradcheck(S: int, taps: int) -> None:
    p = Problem(B=2, H=2, L=12, S=S, m=3, d=3, e=2, taps=taps if S == 12 else 0, mask="holes")
    x, _ = on_gpu(p, torch.float64)
    keys, queries = (mask.to(DEVICE) for mask in p.masks())

    def f(query: Tensor, key: Tensor, value: Tensor, conv_weight: Tensor | None = None) -> Tensor:
        return nystrom_attention(
            query, key, value, keys, query_padding_mask=queries, conv_weight=conv_weight, num_landmarks=p.m
        )

    assert torch.autograd.gradcheck(f, x, eps=1e-6, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [16, 64, 5])
def test_layouts_change_nothing(dtype: torch.dtype, d: int) -> None:
    p = Problem(L=300, m=16, d=d, mask="holes")
    x, grad = on_gpu(p, dtype)
    expected = run(nystrom_attention, p, x, grad)
    for name in layouts(grad):
        y = [layouts(t.detach())[name].requires_grad_() for t in x]
        for a, b in zip(run(nystrom_attention, p, y, layouts(grad)[name]), expected, strict=True):
            assert torch.equal(a, b), name


def test_expanded_inputs_and_gradients() -> None:
    """Stride 0 in every role: batch of query, heads of key, tokens of value, the whole gradient."""
    query = torch.randn(1, 2, 500, 64, device=DEVICE).expand(3, -1, -1, -1)
    key = torch.randn(3, 1, 500, 64, device=DEVICE).expand(-1, 2, -1, -1)
    value = torch.randn(3, 2, 1, 64, device=DEVICE).expand(-1, -1, 500, -1)
    x = [query, key, value]
    y = [t.contiguous().requires_grad_() for t in x]
    x = [t.requires_grad_() for t in x]
    a, b = (nystrom_attention(*t, num_landmarks=8) for t in (x, y))
    assert torch.equal(a, b)
    for g, h in zip(torch.autograd.grad(a.sum(), x), torch.autograd.grad(b.sum(), y), strict=True):
        assert torch.equal(g, h)


@pytest.mark.parametrize("content", [1e4, torch.nan])
@pytest.mark.parametrize("amount", [1, 37, 2000])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_on_the_right(name: str, dtype: torch.dtype, amount: int, content: float) -> None:
    p = CASES[name]
    x, grad = on_gpu(p, dtype)
    expected = call(p, x, None, grad)
    padded = [pad(t, amount, content) for t in x[:3]] + x[3:]
    mask = torch.arange(p.L + amount, device=DEVICE)[None] >= p.L
    actual = call(p, padded, mask, pad(grad, amount, content))
    for a, e in zip(actual[:4], expected[:4], strict=True):
        assert torch.equal(a[:, :, : p.L], e)
        assert not a[:, :, p.L :].any(), "padding must get zeros"
    if p.taps:
        assert torch.equal(actual[4], expected[4])


@pytest.mark.parametrize("name", ["nystrom, convolution", "exact", "chunks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_mates_and_their_order(name: str, dtype: torch.dtype) -> None:
    p = CASES[name]
    x, grad = on_gpu(p, dtype)
    expected = call(p, x, None, grad)
    others = torch.randn(3, p.H, p.L, p.d, device=DEVICE).to(dtype)
    others[1] = torch.nan
    others[2] *= 100
    lengths = torch.tensor([p.L, 5, p.L, p.L // 2], device=DEVICE)
    mask = torch.arange(p.L, device=DEVICE) >= lengths[:, None]
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        batch = [torch.cat([t.detach(), others])[order] for t in x[:3]] + x[3:]
        actual = call(p, batch, mask[order], torch.cat([grad, others.nan_to_num()])[order])
        place = order.index(0)
        for a, e in zip(actual[:4], expected[:4], strict=True):
            assert torch.equal(a[place], e[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_stay_finite(dtype: torch.dtype) -> None:
    x = [(100 * torch.randn(1, 2, 300, 64, device=DEVICE)).to(dtype).requires_grad_() for _ in range(3)]
    out = nystrom_attention(*x, num_landmarks=16)
    assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.float().mean(), x)))


def test_infinity_and_nan_in_valid_tokens_show() -> None:
    for bad in (torch.nan, torch.inf):
        x = torch.randn(1, 1, 200, 64, device=DEVICE)
        x[0, 0, 77, 3] = bad
        assert not nystrom_attention(x, x, x, num_landmarks=16).isfinite().all()


@pytest.mark.parametrize("L", [12, 3])
def test_more_heads_than_a_grid_dimension_holds(L: int) -> None:
    p = Problem(B=70_000, H=1, L=L, m=4, d=4, taps=3, mask="holes")
    keys, queries = (mask.to(DEVICE) for mask in p.masks())
    x, grad = on_gpu(p, torch.float32)
    results = [nystrom_attention(*x[:3], keys, query_padding_mask=queries, conv_weight=x[3], num_landmarks=p.m)]
    results += torch.autograd.grad(results[0], x[:3], grad)
    for part in (slice(0, 5), slice(-5, None)):
        y = [t[part].detach().requires_grad_() for t in x[:3]]
        masks = {"key_padding_mask": keys[part], "query_padding_mask": queries[part]}
        expected = [nystrom_attention(*y, **masks, conv_weight=x[3], num_landmarks=p.m)]
        expected += torch.autograd.grad(expected[0], y, grad[part])
        assert all(torch.equal(a[part], b) for a, b in zip(results, expected, strict=True))


def test_more_elements_than_32_bits_count() -> None:
    shape = B, H, n, d = 33, 16, 32_768, 128
    if torch.cuda.mem_get_info()[0] < 14 * B * H * n * d * 2:
        pytest.skip("needs 63 GB of free GPU memory")
    x = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    p = Problem(B, H, n, d=d, m=64)
    results = run(nystrom_attention, p, x, x[2].detach())
    last = [t.detach()[-1:].clone().requires_grad_() for t in x]
    for a, b in zip(results, run(nystrom_attention, p, last, x[2].detach()[-1:]), strict=True):
        assert torch.equal(a[-1:], b)


def test_a_million_tokens() -> None:
    x = [torch.randn(1, 1, 1_000_000, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    out = nystrom_attention(*x)
    assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.float().sum(), x)))
