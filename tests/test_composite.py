"""The operator's formula in ATen operations against the reference: results, gradients, graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import DTYPES, Problem, bar, names, relative_rms, run
from test_operator import PROBLEMS
from torch import Tensor
from torch.export import Dim

from nystrom_ext import _columns, reference
from nystrom_ext._composite import attention, factors
from nystrom_ext._problem import Problem as Call
from tests.fuzz.configurations import configuration

SMALL = {
    "self": Problem(B=2, H=2, L=10, m=3, d=3, e=2, taps=3, mask="holes"),
    "cross": Problem(B=1, H=2, L=11, S=7, m=3, d=3, mask="tail"),
    "few queries": Problem(B=2, H=1, L=3, S=9, m=4, d=2),
    "few keys, grouped": Problem(B=2, H=2, L=9, S=4, m=4, d=2, kv_heads=1),
    "every regime": Problem(B=4, H=1, L=12, S=14, m=6, d=2, mask="all"),
    "global": Problem(B=2, H=2, L=8, m=3, d=2, options={"coefficient": "global"}),
    "window": Problem(B=1, H=2, L=14, m=3, d=3, e=2, kv_heads=1, mask="holes", options={"window": 2, "pinned": 1}),
    "pinned": Problem(B=1, H=1, L=14, m=4, d=2, options={"pinned": 5}),
    "window, empty samples": Problem(B=3, H=1, L=14, m=4, d=2, mask="all", options={"window": 1}),
    "dropout": Problem(B=2, H=1, L=12, m=4, d=2, mask="tail", options={"window": 1, "dropout_p": 0.3}),
}
RANDOM = torch.tensor([2**62 + 12345, 7])


def seeded(p: Problem) -> dict[str, Any]:
    return {"rng_state": RANDOM} if p.options.get("dropout_p") else {}


def function(p: Problem) -> Any:
    """The composite of query, key, value and, with taps, conv_weight."""
    keys, queries = p.masks()
    options = {"num_landmarks": p.m, "enable_gqa": p.kv_heads is not None, **p.options, **seeded(p)}

    def call(query: Tensor, key: Tensor, value: Tensor, conv_weight: Tensor | None = None) -> Tensor:
        return attention(query, key, value, keys, query_padding_mask=queries, conv_weight=conv_weight, **options)

    return call


def check(p: Problem, dtype: torch.dtype = torch.float64) -> None:
    x = [t.detach().requires_grad_() for t in p.tensors(dtype)]
    exact = [t.detach().double().requires_grad_() for t in x]
    gradient = torch.randn(*x[0].shape[:3], x[2].shape[3]).to(dtype)
    actual = run(attention, p, x, gradient, **seeded(p))
    expected = run(reference.nystrom_attention, p, exact, gradient, **seeded(p))
    for name, a, e in zip(names(x), actual, expected, strict=True):
        assert a.dtype == dtype and a.shape == e.shape
        assert relative_rms(a, e) <= bar(name, dtype), f"{name} of {p}"


@pytest.mark.parametrize("name", PROBLEMS)
def test_matches_the_reference(name: str) -> None:
    check(PROBLEMS[name])


@pytest.mark.parametrize("name", [name for name, p in PROBLEMS.items() if p.options.get("window", 0) in range(1, 50)])
def test_the_band_matches_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences have no band, as it would be no smaller than they are."""
    monkeypatch.setattr(_columns, "BLOCK", 2)
    check(PROBLEMS[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["holes", "few queries", "few keys", "window and pinned, holes", "grouped queries"])
def test_every_dtype_is_computed_in_float32_at_least(name: str, dtype: torch.dtype) -> None:
    check(PROBLEMS[name], dtype)


@pytest.mark.parametrize("first", range(0, 100, 25))
def test_matches_the_reference_in_configurations_of_the_fuzzer(first: int) -> None:
    for number in range(first, first + 25):
        p = configuration(3, number)
        if p.B * p.H * p.L * p.keys < 3e6:
            check(p)


@pytest.mark.parametrize("name", SMALL)
def test_gradients(name: str) -> None:
    p = SMALL[name]
    assert torch.autograd.gradcheck(function(p), p.tensors(torch.float64), eps=1e-6, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("content", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("name", ["self", "cross", "every regime", "window", "window, empty samples", "dropout"])
def test_ignored_tokens_do_not_leak(name: str, content: float) -> None:
    """Not into results, nor into gradients, nor into gradients of gradients."""
    p = SMALL[name]
    keys, queries = p.masks()
    x = [t.detach() for t in p.tensors(torch.float64)]
    ignored = [queries, keys, keys, None]
    results = []
    for fill in (0.0, content):
        y = [
            t.clone() if mask is None else t.masked_fill(mask[:, None, :, None], fill)
            for t, mask in zip(x, ignored, strict=False)
        ]
        y = [t.requires_grad_() for t in y]
        out = function(p)(*y)
        first = torch.autograd.grad(out.square().sum(), y, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), y)
        results.append([out, *first, *second])
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"window": 7, "pinned": 1}, {"num_landmarks": 512}], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_infinity_and_nan_in_valid_tokens_show(bad: float, options: dict[str, int]) -> None:
    x = torch.randn(1, 1, 200, 8)
    x[0, 0, 77, 3] = bad
    assert not attention(x, x, x, **{"num_landmarks": 16, **options}).isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 2, 0, 4)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"window": 2, "pinned": 1}, {"coefficient": "global", "num_landmarks": 2}], ids=str
)
def test_empty_batches_and_sequences(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    x = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    out = attention(*x, conv_weight=torch.randn(2, 5), **options)
    assert out.shape == shape
    assert all(g.shape == shape for g in torch.autograd.grad(out.sum(), x))


@pytest.mark.parametrize("name", SMALL)
def test_factors_are_the_matrix(name: str) -> None:
    """left @ right and the columns that are keys make what the reference does to the identity."""
    p = SMALL[name]
    query, key = (t.detach() for t in p.tensors(torch.float64)[:2])
    keys, queries = p.masks()
    options = {"query_padding_mask": queries, "num_landmarks": p.m, **p.options, **seeded(p)}
    f = factors(Call(query, key, keys, **options), query, key)
    weights = f.left @ f.right
    for columns, probabilities in f.columns:
        weights = columns.add(probabilities, weights)
    weights = weights if queries is None else weights.masked_fill(queries[:, None, :, None], 0)
    identity = torch.eye(p.keys, dtype=torch.float64).expand(p.B, key.shape[1], -1, -1)
    expected = reference.nystrom_attention(query, key, identity, keys, **options, enable_gqa=p.kv_heads is not None)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("name", SMALL)
def test_no_data_is_read(name: str) -> None:
    """Tensors without data suffice."""
    p = SMALL[name]
    keys, queries = (None if mask is None else mask.to("meta") for mask in p.masks())
    x = [t.detach().to("meta") for t in p.tensors(torch.float64)[:3]]
    more = {name: tensor.to("meta") for name, tensor in seeded(p).items()}
    out = attention(*x, keys, query_padding_mask=queries, num_landmarks=p.m, **p.options, **more)
    assert out.is_meta and out.shape[:3] == x[0].shape[:3]


class Exported(torch.nn.Module):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
        return attention(query, key, value, keys, query_padding_mask=queries, **self.options)


GRAPHS = {
    "cross": {"num_landmarks": 8},
    "one landmark": {"num_landmarks": 1, "coefficient": "global"},
    "self": {"num_landmarks": 8, "conv_weight": torch.ones(2, 4)},
    "window": {"num_landmarks": 8, "window": 5, "pinned": 2},
    "pinned": {"num_landmarks": 8, "pinned": 3},
    "window over everything": {"num_landmarks": 8, "window": 10**9},
    "every token a landmark": {"num_landmarks": 10**9, "window": 3},
    "dropout": {"num_landmarks": 8, "window": 5, "dropout_p": 0.3, "rng_state": RANDOM},
}


@pytest.mark.parametrize("name", GRAPHS)
def test_one_graph_for_all_lengths(name: str) -> None:
    """Exported at one batch and length, it is right at others, short and long; and grows with them, not with L S."""
    B, L, S = Dim("B"), Dim("L", max=4096), Dim("S", max=4096)
    itself = name not in ("cross", "one landmark")
    S = L if itself else S

    def inputs(batch: int, queries: int, keys: int) -> list[Tensor]:
        torch.manual_seed(queries)
        x = [torch.randn(batch, 2, n, 4) for n in (queries, keys, keys)]
        masks = [torch.rand(batch, n) < 0.3 for n in (keys, queries)]
        return [*x, masks[0], masks[0] if itself else masks[1]]

    sizes = {0: B, 2: L}, {0: B, 2: S}, {0: B, 2: S}, {0: B, 1: S}, {0: B, 1: L}
    example = tuple(inputs(3, 40, 40 if itself else 30))
    program = torch.export.export(Exported(GRAPHS[name]), example, dynamic_shapes=sizes, strict=False)
    for batch, queries, keys in [(2, 40, 30), (3, 150, 77), (2, 5, 60), (4, 60, 6), (2, 8, 9), (2, 2, 2)]:
        *x, mask, query_mask = inputs(batch, queries, queries if itself else keys)
        expected = reference.nystrom_attention(*x, mask, query_padding_mask=query_mask, **GRAPHS[name])
        torch.testing.assert_close(program.module()(*x, mask, query_mask), expected, atol=2e-5, rtol=1e-4)
    shapes = [getattr(node.meta.get("val"), "shape", ()) for node in program.graph.nodes]
    dense = any(sum(isinstance(size, torch.SymInt) for size in shape[1:]) > 1 for shape in shapes)
    assert dense == (name in ("window over everything", "every token a landmark"))


def test_dropout_needs_a_state() -> None:
    x = torch.randn(1, 1, 30, 4)
    with pytest.raises(ValueError, match="needs rng_state"):
        attention(x, x, x, num_landmarks=4, dropout_p=0.1)


def test_autocast_casts_inputs_only() -> None:
    x = torch.randn(1, 2, 80, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(x, x, x, num_landmarks=8)
    low = x.bfloat16()
    assert torch.equal(out, attention(low, low, low, num_landmarks=8))
