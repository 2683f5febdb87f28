"""Higher derivatives, forward mode and torch.func of the operator, of packed sequences too, and of the module."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Problem, relative_rms
from test_composite import SMALL
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from nystrom_ext import NystromMultiheadAttention, convert_, nystrom_attention, nystrom_attention_varlen, reference
from tests.fuzz.configurations import configuration

every = pytest.mark.parametrize("name", SMALL)


def function(p: Problem, operator: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """The operator of query, key, value and, with taps, conv_weight, with the same dropout at every call."""
    keys, queries = p.masks()
    options = {"num_landmarks": p.m, "enable_gqa": p.kv_heads is not None, **p.options}

    def call(query: Tensor, key: Tensor, value: Tensor, conv_weight: Tensor | None = None) -> Tensor:
        if p.options.get("dropout_p"):
            torch.manual_seed(5)
        return (operator or p.attention)(
            query, key, value, keys, query_padding_mask=queries, conv_weight=conv_weight, **options
        )

    return call


def stacks(p: Problem) -> list[Tensor]:
    return [torch.stack([t, 2 * t, t.flip(-1)]).detach() for t in p.tensors(torch.float64)]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@every
def test_second_derivatives(name: str, packed: bool) -> None:
    p = dataclasses.replace(SMALL[name], packed=packed)
    tolerances = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3}
    assert torch.autograd.gradgradcheck(function(p), p.tensors(torch.float64), fast_mode=True, **tolerances)


def test_third_derivatives() -> None:
    x = torch.randn(1, 1, 9, 2, dtype=torch.float64, requires_grad=True)

    def slope(x: Tensor) -> Tensor:
        out = nystrom_attention(x, x, x, num_landmarks=3)
        return torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(slope, [x], eps=1e-6, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("wanted", range(4))
def test_second_derivatives_of_some(wanted: int) -> None:
    """One input alone needs a gradient, or the gradient of one alone is taken further."""
    p = SMALL["self"]
    x = p.tensors(torch.float64)
    all_first = torch.autograd.grad(function(p)(*x).square().sum(), x, create_graph=True)
    all_second = torch.autograd.grad(all_first[wanted].square().sum(), x)
    first = torch.autograd.grad(function(p)(*x).square().sum(), x[wanted], create_graph=True)[0]
    assert_close(torch.autograd.grad(first.square().sum(), x), all_second)
    alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(x)]
    first = torch.autograd.grad(function(p)(*alone).square().sum(), alone[wanted], create_graph=True)[0]
    assert_close(torch.autograd.grad(first.square().sum(), alone[wanted])[0], all_second[wanted])


def products(p: Problem, operator: Callable[..., Tensor] | None) -> list[Tensor]:
    """Hessian-vector products of a loss, with a gradient penalty's way of making them."""
    x = p.tensors(torch.float64)
    out = function(p, operator)(*x)
    first = torch.autograd.grad((out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum(), x, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), x))


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_configurations_of_the_fuzzer(first: int) -> None:
    """Those that draw no dropout, as the reference takes its numbers from elsewhere."""
    compared = 0
    for number in range(first, first + 20):
        p = configuration(7, number)
        if p.B * p.H * p.L * p.keys > 1e6 or p.options.get("dropout_p") or not p.L * p.keys * p.B:
            continue
        for actual, expected in zip(
            products(p, None), products(dataclasses.replace(p, packed=False), reference.nystrom_attention), strict=True
        ):
            assert relative_rms(actual, expected) < 1e-8 or (actual - expected).abs().max() < 1e-9, p
        compared += 1
    assert compared


@every
def test_transforms(name: str) -> None:
    """Reverse, forward, one over the other, all of them in slices, against .backward() and each other."""
    p = SMALL[name]
    f, x = function(p), [t.detach() for t in p.tensors(torch.float64)]

    def loss(*tensors: Tensor) -> Tensor:
        return f(*tensors).square().sum()

    leaves = p.tensors(torch.float64)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert_close(grad(loss, tuple(range(len(x))))(*x), expected)
    out, pull = vjp(f, *x)
    assert_close(out, f(*x)), assert_close(pull(2 * out), expected)
    direction = torch.randn_like(x[0])
    slope = jvp(lambda query: f(query, *x[1:]), (x[0],), (direction,))[1]
    assert_close(slope, torch.einsum("...bhld,bhld", jacrev(f)(*x), direction))
    with forward_ad.dual_level():
        assert_close(forward_ad.unpack_dual(f(forward_ad.make_dual(x[0], direction), *x[1:])).tangent, slope)
    assert_close(jacfwd(f, randomness="same")(*x), jacrev(f)(*x))
    curvature = torch.autograd.functional.hessian(lambda query: loss(query, *x[1:]), x[0])
    assert_close(jacfwd(jacrev(loss), randomness="same")(*x), curvature, atol=1e-9, rtol=1e-7)


@every
def test_vmap_is_a_larger_batch(name: str) -> None:
    """Bit for bit, without torch's loop, which warns: over everything, over one argument, another dimension, twice."""
    p = SMALL[name]
    f, many = function(p), stacks(p)
    random = {"randomness": "different"} if p.options.get("dropout_p") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapped = vmap(f, **random)(*many)
        keys = vmap(lambda key: f(many[0][1], key, *(t[1] for t in many[2:])), in_dims=2, out_dims=1, **random)(
            many[1].movedim(0, 2)
        )
        twice = vmap(vmap(f, **random), **random)(*(torch.stack([t, t]) for t in many))
        none = vmap(lambda _: f(*(t[1] for t in many)), **random)(torch.ones(2))
    if random:
        assert mapped.shape == (3, *f(*(t[0] for t in many)).shape) and not torch.equal(twice[0], twice[1])
        return
    assert torch.equal(mapped, torch.stack([f(*one) for one in zip(*many, strict=True)]))
    one = [t[1] for t in many]
    assert torch.equal(keys, torch.stack([f(one[0], key, *one[2:]) for key in many[1]], 1))
    assert torch.equal(twice[1], mapped)
    assert torch.equal(none[1], mapped[1])


@every
def test_gradients_through_vmap(name: str) -> None:
    """vmap inside of .backward(), and per-sample gradients, where the slices' gradients are apart."""
    p = dataclasses.replace(SMALL[name], options={k: v for k, v in SMALL[name].options.items() if k != "dropout_p"})
    f, many = function(p), [t.requires_grad_() for t in stacks(p)]

    def loss(*tensors: Tensor) -> Tensor:
        return f(*tensors).square().sum()

    every_one = tuple(range(len(many)))
    expected = torch.autograd.grad(sum(loss(*one) for one in zip(*many, strict=True)), many)
    assert_close(torch.autograd.grad(vmap(f)(*many).square().sum(), many), expected)
    detached = [t.detach() for t in many]
    assert_close(vmap(grad(loss, every_one))(*detached), expected)
    assert_close(grad(lambda *x: vmap(f)(*x).square().sum(), every_one)(*detached), expected)


def test_jacobians_in_one_go() -> None:
    """`is_grads_batched`, as vectorized Jacobians use it."""
    x = torch.randn(1, 2, 10, 3, dtype=torch.float64)
    f = lambda x: nystrom_attention(x, x, x, num_landmarks=4)  # noqa: E731
    assert_close(jacobian(f, x, vectorize=True), jacobian(f, x))


def test_vmap_says_what_it_does_with_dropout() -> None:
    x = torch.randn(3, 1, 2, 30, 4)
    f = lambda x: nystrom_attention(x, x, x, num_landmarks=4, dropout_p=0.5)  # noqa: E731
    for randomness in ("error", "same"):
        with pytest.raises(RuntimeError, match=f"randomness='{randomness}' meets dropout_p=0.5; .*randomness='differ"):
            vmap(f, randomness=randomness)(x)
    same = x[:1].expand(3, -1, -1, -1, -1)
    out = vmap(f, randomness="different")(same)
    assert not torch.equal(out[0], out[1])
    gradients = vmap(grad(lambda x: f(x).sum()), randomness="same")(same)
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("options", [{}, {"coefficient": "global"}], ids=str)
def test_vmap_over_nothing(options: dict[str, str]) -> None:
    f = lambda x, w: nystrom_attention(x, x, x, num_landmarks=4, conv_weight=w, **options)  # noqa: E731
    assert vmap(f)(torch.randn(0, 3, 2, 30, 4), torch.randn(0, 2, 3)).shape == (0, 3, 2, 30, 4)
    assert vmap(f, (0, None))(torch.randn(2, 0, 2, 30, 4), torch.randn(2, 3)).shape == (2, 0, 2, 30, 4)


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "mask"])
def test_short_calls_of_the_module_are_torch_s_own(mask: bool) -> None:
    """As `nn.MultiheadAttention`, the module differentiates further by the mathematical kernel of SDPA."""
    model = NystromMultiheadAttention(8, 2, batch_first=True).double()
    ignored = torch.arange(20) >= torch.tensor([20, 12])[:, None] if mask else None

    def f(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return model(x, x, x, key_padding_mask=ignored, need_weights=False)[0]

    x = torch.randn(2, 20, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(f, x, fast_mode=True)
    assert_close(jvp(f, (x,), (x,))[1], torch.autograd.functional.jvp(f, x, x)[1])


@pytest.mark.parametrize("transform", [grad, vmap], ids=lambda f: f.__name__)
def test_compiled(transform: Callable[..., Any]) -> None:
    x = torch.randn(3, 2, 40, 4, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        x = x if x.dim() == 4 else x[None]
        out = nystrom_attention(x, x, x, num_landmarks=8).square()
        return out.sum() if transform is grad else out

    compiled = torch.compile(transform(f), backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), transform(f)(x))


def per_sample(model: torch.nn.Module, call: Callable[..., Tensor], *batches: Tensor) -> tuple[dict[str, Tensor], Any]:
    """Gradients of every sample by vmap(grad), and one after another."""
    names, parameters = zip(*model.named_parameters(), strict=True)

    def loss(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return call(lambda *a, **k: functional_call(model, parameters, a, k), *(t[None] for t in sample)).square().sum()

    fixed = {name: p.detach() for name, p in model.named_parameters()}
    together = vmap(grad(loss), in_dims=(None, *(0 for _ in batches)))(fixed, *batches)
    alone = []
    for sample in zip(*batches, strict=True):
        out = call(model, *(t[None] for t in sample)).square().sum()
        alone.append(dict(zip(names, torch.autograd.grad(out, parameters), strict=True)))
    return together, {name: torch.stack([g[name] for g in alone]) for name in names}


@pytest.mark.parametrize("three", [False, True], ids=["one tensor", "three views of it"])
@pytest.mark.parametrize("options", [{}, {"window": 2, "pinned": 1}, {"conv_kernel_size": 3}], ids=str)
def test_per_sample_gradients_of_the_module(options: dict[str, int], three: bool) -> None:
    """Also where queries and keys are the same tokens in tensors of their own, behind the wrappers of torch.func."""
    torch.manual_seed(0)
    model = NystromMultiheadAttention(16, 4, batch_first=True, num_landmarks=8, **options).double()
    x = torch.randn(3, 40, 16, dtype=torch.float64)
    ignored = torch.arange(40) >= torch.tensor([40, 25, 5])[:, None]

    def call(model: Callable[..., Any], x: Tensor, mask: Tensor) -> Tensor:
        views = (x.view_as(x) for _ in range(3)) if three else (x, x, x)
        return model(*views, key_padding_mask=mask, need_weights=False)[0]

    assert_close(*per_sample(model, call, x, ignored))


def test_per_sample_gradients_of_a_converted_encoder() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    convert_(model, num_landmarks=8)
    x = torch.randn(3, 40, 16, dtype=torch.float64)
    assert_close(*per_sample(model, lambda model, x: model(x), x))


def test_packed_sequences_in_torch_func() -> None:
    x = [torch.randn(50, 2, 4, dtype=torch.float64) for _ in range(3)]
    offsets = torch.tensor([0, 30, 30, 36, 50])

    def loss(*x: Tensor) -> Tensor:
        return nystrom_attention_varlen(*x, offsets, offsets, 30, 30, num_landmarks=8).square().sum()

    leaves = [t.requires_grad_() for t in x]
    assert_close(grad(loss, (0, 1, 2))(*(t.detach() for t in x)), torch.autograd.grad(loss(*leaves), leaves))
