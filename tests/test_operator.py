"""The operator against the float64 reference, forward and backward: shapes, masks, dtypes, layouts, input regimes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPES, REGIMES, TOLERANCES, Problem, check, layouts, relative_rms, run

from nystrom_ext import nystrom_attention, reference

PROBLEMS = {
    "plain": Problem(),
    "segments of two sizes": Problem(L=100, m=16, d=20, e=7),
    "tail mask": Problem(B=3, L=90, m=8, mask="tail"),
    "holes": Problem(B=3, H=3, L=200, m=16, d=32, e=48, mask="holes"),
    "a sample without keys": Problem(B=3, L=60, m=8, mask="all"),
    "cross attention": Problem(L=130, S=75, m=16, mask="holes"),
    "few queries": Problem(L=5, S=300, m=8, mask="holes"),
    "few keys": Problem(L=300, S=7, m=8, mask="tail"),
    "convolution": Problem(L=150, m=16, taps=33),
    "convolution, even taps, holes": Problem(B=3, L=150, m=16, taps=4, mask="holes"),
    "convolution longer than the sequence": Problem(L=20, m=8, taps=65, mask="tail"),
    "convolution, exact": Problem(L=20, m=32, taps=5, mask="holes"),
    "convolution, a sample without keys": Problem(L=60, m=8, taps=3, mask="all"),
    "dropout": Problem(L=150, m=37, mask="holes", options={"dropout_p": 0.3}),
    "dropout, few queries": Problem(L=7, S=150, m=8, mask="holes", options={"dropout_p": 0.3}),
    "dropout, few keys": Problem(L=150, S=7, m=8, mask="holes", options={"dropout_p": 0.3}),
    "dropout of everything": Problem(L=100, options={"dropout_p": 1.0}),
    "global": Problem(B=3, L=100, m=16, mask="holes", options={"coefficient": "global"}),
    "global, exact samples beside": Problem(B=4, L=30, m=16, mask="tail", options={"coefficient": "global"}),
    "grouped queries": Problem(H=6, kv_heads=2, L=130, m=16, taps=3, mask="holes"),
    "one key head": Problem(H=4, kv_heads=1, L=20, m=32),
    "several chunks": Problem(B=1, H=1, L=2500, S=3100, m=16, mask="holes"),
    "several chunks, convolution": Problem(B=2, H=1, L=2100, m=64, d=64, taps=33, mask="tail"),
    "m above 64": Problem(B=1, H=1, L=700, m=200, d=16),
    "m above the packed depth": Problem(B=1, H=1, L=700, m=300, d=16),
    "head_dim above the packed depth": Problem(B=1, H=1, L=70, m=8, d=300, e=280),
    "everything is one": Problem(B=1, H=1, L=1, m=1, d=1),
    "m = 1": Problem(L=50, m=1, d=3),
    "no iterations": Problem(L=50, m=8, options={"pinv_iterations": 0}),
    "iterations": Problem(L=50, m=8, options={"pinv_iterations": 9}),
    "scale": Problem(L=50, m=8, options={"scale": -0.7}),
    "window": Problem(L=100, m=16, d=20, e=7, options={"window": 5}),
    "pinned": Problem(L=100, m=16, options={"pinned": 3}),
    "window and pinned, holes": Problem(
        B=3, L=200, m=16, d=32, e=48, mask="holes", options={"window": 16, "pinned": 1}
    ),
    "window, a sample without keys": Problem(B=3, L=60, m=8, mask="all", options={"window": 2, "pinned": 2}),
    "window, exact samples beside": Problem(B=4, L=30, m=16, mask="tail", options={"window": 3, "pinned": 4}),
    "window over everything": Problem(L=90, m=8, mask="tail", options={"window": 10**9}),
    "window over several segments": Problem(L=120, m=40, mask="holes", options={"window": 17, "pinned": 2}),
    "window of one": Problem(L=90, m=80, options={"window": 1}),
    "whole segments pinned": Problem(L=90, m=16, mask="holes", options={"window": 4, "pinned": 13}),
    "more pinned than landmarks": Problem(B=3, L=90, m=4, mask="tail", options={"window": 4, "pinned": 40}),
    "everything pinned": Problem(L=50, m=4, options={"pinned": 10**9}),
    "window, convolution": Problem(L=150, m=16, taps=9, mask="holes", options={"window": 6, "pinned": 2}),
    "window, dropout": Problem(L=150, m=37, mask="holes", options={"window": 6, "pinned": 5, "dropout_p": 0.3}),
    "pinned, dropout": Problem(L=150, m=8, mask="tail", options={"pinned": 20, "dropout_p": 0.3}),
    "window, dropout of everything": Problem(L=100, options={"window": 3, "dropout_p": 1.0}),
    "window, global": Problem(
        B=3, L=100, m=16, mask="holes", options={"window": 4, "pinned": 1, "coefficient": "global"}
    ),
    "window, grouped queries": Problem(
        H=6, kv_heads=2, L=130, m=16, taps=3, mask="holes", options={"window": 9, "pinned": 2}
    ),
    "window, several chunks": Problem(B=2, H=1, L=2500, m=16, mask="holes", options={"window": 40, "pinned": 1}),
    "a chunk of pinned tokens": Problem(B=1, H=1, L=1500, m=16, options={"window": 3, "pinned": 1100}),
    "window, negative scale": Problem(L=50, m=8, options={"window": 3, "pinned": 1, "scale": -0.7}),
    "window, scale 0": Problem(L=50, m=8, options={"window": 3, "scale": 0.0}),
    "window, no iterations": Problem(L=50, m=8, options={"window": 3, "pinned": 1, "pinv_iterations": 0}),
    "window, m = 1": Problem(L=50, m=1, d=3, options={"window": 3, "pinned": 1}),
    "packed": Problem(B=5, L=150, m=37, d=20, e=7, mask="tail", packed=True),
    "packed, chunks": Problem(B=3, H=1, L=2500, m=16, mask="tail", packed=True, options={"window": 40, "pinned": 1}),
    "packed, cross": Problem(B=4, L=130, S=75, m=16, mask="tail", packed=True),
    "packed, a sample without keys": Problem(B=3, H=4, kv_heads=2, L=60, m=8, taps=3, mask="all", packed=True),
    "packed, everything": Problem(
        B=4,
        H=4,
        kv_heads=2,
        L=130,
        m=16,
        d=32,
        taps=9,
        mask="tail",
        packed=True,
        options={"window": 6, "pinned": 2, "coefficient": "global"},
    ),
    "window, d above the packed depth": Problem(B=1, H=1, L=70, m=8, d=300, e=280, options={"window": 20}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    check(PROBLEMS[name], dtype)


@pytest.mark.parametrize("options", [{}, {"window": 16, "pinned": 1}], ids=["plain", "window"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_input_regimes(regime: str, dtype: torch.dtype, options: dict[str, int]) -> None:
    check(Problem(B=1, H=1, L=1024, m=64, d=64, options=options), dtype, REGIMES[regime])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_of_zero_are_the_plain_operator(dtype: torch.dtype) -> None:
    p = Problem(L=300, m=16, mask="holes")
    x = p.tensors(dtype)
    grad = torch.randn_like(x[0])
    for a, b in zip(
        run(nystrom_attention, p, x, grad), run(nystrom_attention, p, x, grad, window=0, pinned=0), strict=True
    ):
        assert torch.equal(a, b)


# Around the borders of the CUDA kernels' tiles: 64 rows, 16 to 64 columns, 256 and 1024 tokens, head dims 32 to 256.
TILES = {
    "one tile": Problem(B=1, H=1, L=64, m=16, d=64),
    "a row over a tile": Problem(B=1, H=2, L=65, m=17, d=64, mask="holes"),
    "a row over a chunk": Problem(B=1, H=1, L=257, m=64, d=64, taps=33),
    "packed, around a tile": Problem(
        B=4, H=2, L=130, m=16, d=64, taps=5, mask="tail", packed=True, options={"window": 9, "pinned": 2}
    ),
    "packed, over a long chunk": Problem(B=4, H=1, L=1300, m=32, d=32, taps=3, mask="tail", packed=True),
    "packed, a sample without keys": Problem(B=3, H=4, kv_heads=2, L=80, S=70, m=8, mask="all", packed=True),
    "a row over a long chunk": Problem(B=1, H=1, L=1025, m=32, d=32),
    "m over a tile": Problem(B=1, H=1, L=150, m=65, d=64),
    "m of three tiles": Problem(B=1, H=1, L=300, m=130, d=32, mask="holes"),
    "d = 16, e = 40": Problem(B=1, H=2, L=130, m=24, d=16, e=40, taps=5),
    "d = 72": Problem(B=1, H=1, L=130, m=40, d=72, taps=33, mask="holes"),
    "d = 128": Problem(B=1, H=1, L=130, m=40, d=128, taps=33),
    "d = 128, grouped": Problem(B=1, H=4, L=100, m=16, d=128, kv_heads=2, mask="tail"),
    "d = 136, e = 32": Problem(B=1, H=1, L=100, S=130, m=16, d=136, e=32),
    "d = 32, e = 256": Problem(B=1, H=1, L=100, m=16, d=32, e=256, taps=9),
    "d = 256": Problem(B=1, H=1, L=100, m=40, d=256, taps=33, mask="holes"),
    "d = 264": Problem(B=1, H=1, L=70, m=8, d=264),
    "d = 256, dropout": Problem(B=1, H=1, L=70, m=40, d=256, options={"dropout_p": 0.3}),
    "d = 128, few queries, dropout": Problem(B=1, H=1, L=40, S=200, m=64, d=128, options={"dropout_p": 0.3}),
    "d = 64, few keys, convolution": Problem(B=2, H=1, L=70, m=64, d=64, taps=33, mask="holes"),
    "window, d = 64": Problem(B=1, H=2, L=300, m=40, d=64, taps=5, mask="holes", options={"window": 16, "pinned": 1}),
    "window, d = 64, grouped": Problem(
        B=1, H=4, kv_heads=2, L=140, m=70, d=64, options={"window": 70, "pinned": 3, "dropout_p": 0.2}
    ),
    "window, d = 128": Problem(B=1, H=1, L=200, m=24, d=128, mask="tail", options={"window": 33}),
    "window, d = 256": Problem(B=1, H=1, L=150, m=40, d=256, e=72, options={"window": 16, "pinned": 2}),
    "many taps": Problem(B=1, H=2, L=140, m=16, d=64, taps=99, mask="holes"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TILES)
def test_borders_of_tiles(name: str, dtype: torch.dtype) -> None:
    check(TILES[name], dtype)


@pytest.mark.parametrize("options", [{}, {"window": 16, "pinned": 1}], ids=["plain", "window"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_16_bit_is_never_worse_than_the_eager_composition(
    regime: str, dtype: torch.dtype, options: dict[str, int]
) -> None:
    p = Problem(B=1, H=1, L=256, m=32, d=32, options=options)
    x = p.tensors(dtype, REGIMES[regime])
    grad = torch.randn_like(x[0])
    truth = run(reference.nystrom_attention, p, [t.detach().double().requires_grad_() for t in x], grad)
    ours = run(nystrom_attention, p, x, grad)
    eager = run(reference.nystrom_attention, p, x, grad)
    for a, b, t in zip(ours, eager, truth, strict=True):
        assert (a.double() - t).abs().max() <= (b.double() - t).abs().max().nan_to_num(torch.inf)


@st.composite
def random_problems(draw: st.DrawFn, longest: int, widest: int, most_landmarks: int, most_taps: int) -> Problem:
    def upto(most: int, least: int = 1) -> int:
        return draw(st.integers(least, most))

    def one_of(*choices: Any) -> Any:
        return draw(st.sampled_from(choices))

    B, kv_heads, group, L, d, e, m = (upto(most) for most in (3, 3, 3, longest, widest, widest, most_landmarks))
    options = {"coefficient": one_of("per_head", "global"), "dropout_p": one_of(0.0, 0.0, 0.4)}
    S, taps = L if draw(st.booleans()) else upto(longest), upto(most_taps, 0)
    mask = one_of("none", "tail", "holes", "all")
    if L == S:
        options |= {"window": one_of(0, 0, 1, 2, 5, 20, 150), "pinned": one_of(0, 0, 1, 2, 9, 60)}
    return Problem(B, kv_heads * group, L, S, d, e, m, taps if L == S else 0, mask, kv_heads, options)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(random_problems(longest=140, widest=40, most_landmarks=70, most_taps=9))
def test_random_problems(p: Problem) -> None:
    check(p, torch.float64)


@pytest.mark.parametrize("options", [{}, {"window": 7, "pinned": 1}], ids=["plain", "window"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [16, 5])
def test_layouts_change_nothing(dtype: torch.dtype, d: int, options: dict[str, int]) -> None:
    p = Problem(L=120, m=16, d=d, mask="holes", options=options)
    x = [t.detach() for t in p.tensors(dtype)]
    grad = torch.randn_like(x[0])
    expected = run(nystrom_attention, p, [t.requires_grad_() for t in x], grad)
    for name in layouts(x[0].detach()):
        y = [layouts(t.detach())[name].requires_grad_() for t in x]
        for a, b in zip(run(nystrom_attention, p, y, layouts(grad)[name]), expected, strict=True):
            assert torch.equal(a, b), name


def test_expanded_inputs_and_gradients() -> None:
    """Stride 0 in every role: batch of query, heads of key, tokens of value, the whole gradient."""
    query = torch.randn(1, 2, 50, 8).expand(3, -1, -1, -1)
    key = torch.randn(3, 1, 50, 8).expand(-1, 2, -1, -1)
    value = torch.randn(3, 2, 1, 8).expand(-1, -1, 50, -1)
    x = [query, key, value]
    y = [t.contiguous().requires_grad_() for t in x]
    x = [t.requires_grad_() for t in x]
    a, b = (nystrom_attention(*t, num_landmarks=8) for t in (x, y))
    assert torch.equal(a, b)
    for g, h in zip(torch.autograd.grad(a.sum(), x), torch.autograd.grad(b.sum(), y), strict=True):
        assert torch.equal(g, h)


@pytest.mark.parametrize(
    "p",
    [
        Problem(B=2, H=2, L=12, m=3, d=3, e=2, taps=3, mask="holes"),
        Problem(B=1, H=2, L=11, S=7, m=3, d=3, mask="tail"),
        Problem(B=2, H=1, L=3, S=9, m=4, d=2),
        Problem(B=2, H=2, L=9, S=4, m=4, d=2, kv_heads=1),
        Problem(B=2, H=2, L=12, m=3, d=3, options={"coefficient": "global"}),
        Problem(B=1, H=2, L=14, m=3, d=3, e=2, kv_heads=1, mask="holes", options={"window": 2, "pinned": 1}),
        Problem(B=1, H=1, L=14, m=4, d=2, options={"pinned": 5}),
        Problem(B=2, H=1, L=14, m=4, d=2, options={"window": 1, "coefficient": "global"}),
    ],
    ids=["self", "cross", "few queries", "few keys, grouped", "global", "window", "pinned", "window, global"],
)
def test_gradcheck(p: Problem) -> None:
    x = p.tensors(torch.float64)
    keys, queries = p.masks()

    def f(query, key, value, conv_weight=None):
        return nystrom_attention(
            query,
            key,
            value,
            keys,
            query_padding_mask=queries,
            conv_weight=conv_weight,
            num_landmarks=p.m,
            enable_gqa=p.kv_heads is not None,
            **p.options,
        )

    assert torch.autograd.gradcheck(f, x, eps=1e-6, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)], ids=str)
def test_gradients_of_a_subset(wanted: tuple[int, ...]) -> None:
    p = Problem(L=60, taps=3, mask="holes")
    x = p.tensors(torch.float64)
    everything = run(nystrom_attention, p, x, torch.ones(2, 2, 60, 8))[1:]
    keys, queries = p.masks()
    y = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(x)]
    out = nystrom_attention(*y[:3], keys, query_padding_mask=queries, conv_weight=y[3], num_landmarks=p.m)
    for i, g in zip(wanted, torch.autograd.grad(out.sum(), [y[i] for i in wanted]), strict=True):
        assert torch.equal(g, everything[i])


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 2, 0, 4)], ids=str)
def test_empty_batches_and_sequences(shape: tuple[int, ...]) -> None:
    x = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    out = nystrom_attention(*x)
    assert out.shape == shape
    assert all(g.shape == shape for g in torch.autograd.grad(out.sum(), x))


def test_no_keys_at_all_gives_zeros() -> None:
    query = torch.randn(2, 2, 100, 4, requires_grad=True)
    key = torch.randn(2, 2, 0, 4)
    out = nystrom_attention(query, key, key)
    assert torch.equal(out, torch.zeros_like(query))
    assert torch.equal(torch.autograd.grad(out.sum(), query)[0], torch.zeros_like(query))


def test_output_joins_heads_without_a_copy() -> None:
    x = torch.randn(2, 4, 100, 8)
    out = nystrom_attention(x, x, x).transpose(1, 2)
    assert out.flatten(2).data_ptr() == out.data_ptr()


def test_infinity_and_nan_in_valid_tokens_show() -> None:
    for bad in (torch.nan, torch.inf):
        x = torch.randn(1, 1, 200, 8)
        x[0, 0, 77, 3] = bad
        assert not nystrom_attention(x, x, x, num_landmarks=16).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_results_are_rounded_to_even(dtype: torch.dtype) -> None:
    """Equal keys: means of two neighbouring numbers, each a tie, in vectors and in the rest of a row."""
    value = 1 + torch.finfo(dtype).eps * torch.stack([torch.arange(21.0), torch.arange(1.0, 22.0)])
    out = nystrom_attention(
        torch.ones(1, 1, 2, 4).to(dtype), torch.ones(1, 1, 2, 4).to(dtype), value[None, None].to(dtype)
    )
    assert torch.equal(out[0, 0], value.mean(0).to(dtype).expand(2, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identical_tokens(dtype: torch.dtype) -> None:
    """A has rank 1 and attention is the mean of the values."""
    query = torch.randn(1, 1, 1, 8).expand(1, 1, 100, 8).to(dtype)
    value = torch.randn(1, 1, 100, 8).to(dtype)
    out = nystrom_attention(query, query, value, num_landmarks=16)
    mean = value.double().mean(2, keepdim=True).expand(1, 1, 100, 8)
    assert relative_rms(out, mean) < TOLERANCES[dtype][0]


def test_large_logits_stay_finite() -> None:
    x = [100 * torch.randn(1, 2, 300, 16, requires_grad=True) for _ in range(3)]
    out = nystrom_attention(*x, num_landmarks=16)
    assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.sum(), x)))
