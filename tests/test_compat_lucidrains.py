"""The classes of the package nystrom-attention, against the package itself."""

from __future__ import annotations

import importlib
import pickle
import sys

import pytest
import torch
from compat_problems import assert_same, f64, keep_mask
from mil_models import package
from torch import nn
from torch.testing import assert_close

from nystrom_ext import compat, nystrom_attention
from nystrom_ext.compat.lucidrains import NystromAttention, Nystromformer, install

DIM, M, B = 12, 8, 2
SIZES = {"dim": DIM, "dim_head": 5, "heads": 3, "num_landmarks": M, "residual_conv_kernel": 5}


def pair(**options):
    """The package's module and ours, each with the initial values of the same seed."""
    modules = []
    for cls in (package().NystromAttention, NystromAttention):
        torch.manual_seed(0)
        modules.append(cls(**{**SIZES, **options}).double())
    return modules


def tokens(n, dim=DIM):
    torch.manual_seed(1)
    return (3 * torch.randn(B, n, dim, dtype=f64)).requires_grad_()


def transformers(**options):
    modules = []
    for cls in (package().Nystromformer, Nystromformer):
        torch.manual_seed(0)
        modules.append(cls(dim=DIM, depth=2, dim_head=4, heads=2, num_landmarks=M, **options).double())
    return modules


def test_parameters_of_the_same_seed_load_both_ways():
    for theirs, ours in (pair(), pair(residual=False), transformers(), transformers(attn_values_residual=False)):
        expected = theirs.state_dict()
        assert list(ours.state_dict()) == list(expected)
        assert all(torch.equal(ours.state_dict()[key], value) for key, value in expected.items())
        assert not ours.load_state_dict(expected).missing_keys and theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("mask", [None, "holes", "tail", "empty sample"])
@pytest.mark.parametrize("n", [5, 8, 9, 40, 43, 47])
def test_results_and_gradients(n, mask, fused_calls):
    x, keep = tokens(n), None if mask is None else keep_mask(n, mask)
    for options in ({}, {"residual": False}, {"pinv_iterations": 3, "eps": 0.1}):
        theirs, ours = pair(**options)
        # The package divides by counts in float32; without any key its weights are rounding.
        tolerance = 1e-9 if mask is None else 1e-5
        inputs = [x, *ours.parameters()]
        actual = ours(x, mask=keep)
        for copy, original in zip(ours.parameters(), theirs.parameters(), strict=True):
            original.data = copy.data
        expected = theirs(x, mask=keep)
        grad = torch.linspace(-1, 1, expected.numel(), dtype=f64).view_as(expected)
        assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
        for a, e in zip(
            torch.autograd.grad(actual, inputs, grad),
            torch.autograd.grad(expected, [x, *theirs.parameters()], grad),
            strict=True,
        ):
            assert_close(a, e, rtol=tolerance, atol=tolerance * e.abs().max().item())
    assert len(fused_calls) == (3 if mask is None and n > M else 0)


@pytest.mark.parametrize("masked", [False, True])
def test_float32_at_the_sizes_of_pathology(masked):
    theirs = package().NystromAttention(64, 32, 4, num_landmarks=64)
    ours = NystromAttention(64, 32, 4, num_landmarks=64)
    ours.load_state_dict(theirs.state_dict())
    x, mask = torch.randn(1, 26 * 26 + 1, 64), torch.rand(1, 26 * 26 + 1) < 0.9 if masked else None
    expected = theirs(x, mask=mask)
    assert (ours(x, mask=mask) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_dropout_of_the_same_seed():
    theirs, ours = pair(dropout=0.5)
    torch.manual_seed(7)
    expected = theirs(tokens(43))
    torch.manual_seed(7)
    assert_close(ours(tokens(43)), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [5, 40, 43])
def test_attention_matrices(n, masked):
    theirs, ours = pair()
    x, mask = tokens(n), keep_mask(n) if masked else None
    for argument in ("return_attn", "return_attn_matrices"):
        (out, expected), (own, actual) = (module(x, mask=mask, **{argument: True}) for module in (theirs, ours))
        assert_close(own, out, rtol=1e-5, atol=1e-6)
        assert_close(actual, expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert_same(ours(x, mask, True)[1], theirs(x, mask, True)[1], [x], 1e-5)
    assert len(ours(x, mask, True, True)[1]) == 3


def test_transformer():
    theirs, ours = transformers()
    for keep in (None, keep_mask(43)):
        assert_close(ours(tokens(43), mask=keep), theirs(tokens(43), mask=keep), rtol=1e-6, atol=1e-6)
    ours = Nystromformer(dim=DIM, depth=1, num_landmarks=M, padding="ours")
    assert ours.layers[0][0].fn.padding == "ours"


def test_attributes_are_read_at_each_call():
    theirs, ours = pair()
    for module in (theirs, ours):
        module.num_landmarks, module.pinv_iterations = 5, 2
    assert_close(ours(tokens(43)), theirs(tokens(43)))


@pytest.mark.parametrize("change", ["biased projection", "hook on the convolution", "wrapped convolution"])
def test_changed_submodules_count(change, fused_calls):
    theirs, ours = pair()
    for module in (theirs, ours):
        torch.manual_seed(2)
        if change == "biased projection":  # the zeros in front are zeros before it
            module.to_qkv = nn.Linear(DIM, 45, dtype=f64)
        elif change == "wrapped convolution":
            module.res_conv = nn.Sequential(module.res_conv, nn.Tanh())
        else:
            module.res_conv.register_forward_hook(lambda module, args, out: 2 * out)
    for mask, tolerance in ((None, 1e-9), (keep_mask(43), 1e-6)):
        assert_close(ours(tokens(43), mask), theirs(tokens(43), mask), rtol=tolerance, atol=tolerance)
    assert len(fused_calls) == 1


def test_16_bit():
    """The package fails with bfloat16 parameters."""
    exact = pair()[1]
    module = pair()[1].bfloat16()
    x = tokens(43).bfloat16()
    for mask in (None, keep_mask(43)):
        out = module(x, mask)
        assert out.dtype == torch.bfloat16 and (out - exact(x.double(), mask)).abs().max() < 0.1
    with torch.autocast("cpu"):
        assert pair()[1].float()(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("n", [43, 40, 5])
def test_compiled(n):
    torch.compiler.reset()
    ours = pair()[1]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_close(compiled(tokens(n)), ours(tokens(n)))
    assert_close(compiled(tokens(n), keep_mask(n)), ours(tokens(n), keep_mask(n)))


# padding="ours"


def ours_of(**options):
    torch.manual_seed(0)
    return NystromAttention(**{**SIZES, "padding": "ours", **options}).double()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("n", [5, 40, 43])
def test_own_padding_changes_no_bit(n, wrapped):
    module = ours_of()
    if wrapped:
        module.res_conv = nn.Sequential(module.res_conv)
    x = tokens(n).detach()
    alone = module(x[:1])
    for before, after in ((0, 9), (4, 3)):
        padded = nn.functional.pad(x, (0, 0, before, after), value=7.0)
        padded[1, n:] = 1e4
        mask = torch.zeros(B, padded.shape[1], dtype=torch.bool)
        mask[:, before : before + n] = True
        mask[1, : before + 2] = False
        out = module(padded, mask=mask)
        assert torch.equal(out[:1, before : before + n], alone)
        assert torch.equal(out[0, before + n :], module.to_out[0].bias.expand(after, -1))


def test_own_padding_is_the_operator():
    module, x = ours_of(), tokens(43)
    q, k, v = (y.unflatten(-1, (3, 5)).transpose(1, 2) for y in module.to_qkv(x).chunk(3, -1))
    out = nystrom_attention(q, k, v, num_landmarks=M, conv_weight=module.res_conv.weight[:, 0, :, 0])
    assert torch.equal(module(x), module.to_out(out.transpose(1, 2).flatten(2)))
    exact = nn.functional.scaled_dot_product_attention(*(y[:, :, :M] for y in (q, k, v)))
    weights = module(x[:, :M], return_attn=True)[1]
    assert weights.shape == (B, 3, M, M)
    assert_close(weights @ v[:, :, :M], exact)
    mask = keep_mask(43)
    out, weights = module(x, mask=mask, return_attn=True)
    plain = ours_of(residual=False)
    plain.load_state_dict(module.state_dict(), strict=False)
    assert_close(plain(x, mask), plain.to_out((weights @ v).transpose(1, 2).flatten(2)))
    with pytest.raises(NotImplementedError, match="return_attn_matrices needs padding"):
        module(x, return_attn_matrices=True)


# Errors and installation


@pytest.mark.parametrize(
    "options, message",
    [
        ({"padding": "zeros"}, 'padding must be "package" or "ours", got \'zeros\''),
        ({"num_landmarks": 0}, "num_landmarks must be an integer of at least 1, got 0"),
        ({"pinv_iterations": -1}, "pinv_iterations must be an integer of at least 0, got -1"),
        ({"residual_conv_kernel": 4}, "residual_conv_kernel must be odd, got 4"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        NystromAttention(**{**SIZES, **options})


def test_bad_masks():
    module = pair()[1]
    for mask, message in (
        (torch.ones(B, 42, dtype=torch.bool), r"takes a torch.bool mask of shape \(2, 48\), got \(2, 47\)"),
        (torch.ones(B, 43), "takes a bool mask, True = keep, got torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            module(tokens(43), mask)


def test_scripting_is_refused_in_one_sentence():
    with pytest.raises(NotImplementedError, match=r"^torch.jit.script does not support NystromAttention"):
        torch.jit.script(nn.Sequential(pair()[1]))


NAMES = ("nystrom_attention", "nystrom_attention.nystrom_attention")


def test_install_in_place_of_the_package(monkeypatch):
    theirs = package().NystromAttention(**SIZES)
    stored = pickle.dumps(theirs)
    for name in NAMES:
        for attribute in ("NystromAttention", "Nystromformer", "Nystromer"):
            monkeypatch.setattr(sys.modules[name], attribute, None, raising=False)
    install()
    from nystrom_attention import NystromAttention as imported
    from nystrom_attention import Nystromer
    from nystrom_attention.nystrom_attention import Nystromformer as inner

    assert imported is NystromAttention and inner is Nystromer is Nystromformer
    loaded = pickle.loads(stored)  # a whole model in a file, of the package's class
    assert type(loaded) is NystromAttention
    x = tokens(43).detach().float()
    assert_close(loaded(x), theirs(x))


def test_install_without_the_package(monkeypatch):
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)  # not to be found, and put back afterwards

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    install()
    from nystrom_attention import NystromAttention as imported
    from nystrom_attention.nystrom_attention import Nystromformer as inner

    assert imported is compat.LucidrainsNystromAttention and inner is Nystromformer
