"""The class that xformers removed."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
from compat_problems import TAPS, H, assert_same, keep_mask, tensors
from peers.formulas import additive, released
from torch import nn
from torch.testing import assert_close

from nystrom_ext import _warnings, compat
from nystrom_ext.compat.xformers import NystromAttention, install


def folded(x):
    return x.flatten(0, 1)


@pytest.mark.parametrize("n, m", [(40, 8), (43, 8), (12, 16)])
@pytest.mark.parametrize("mask", ["none", "bool", "additive", "per head"])
@pytest.mark.parametrize("options", [{}, {"pinverse_original_init": True}, {"conv_kernel_size": TAPS}])
def test_xformers_class(n, m, mask, options):
    *qkv, _ = inputs = tensors(n)
    module = NystromAttention(0.0, H, num_landmarks=m, **options).double()
    keep = keep_mask(n)
    forms = {"none": None, "bool": keep, "additive": additive(keep)}
    forms["per head"] = additive(keep).repeat_interleave(H, 0)[:, None]
    actual = module(*map(folded, qkv), forms[mask])
    weight = module.skip_connection.weight if "conv_kernel_size" in options else None
    original = {key: value for key, value in options.items() if key != "conv_kernel_size"}
    expected = released("xformers", *qkv, m, weight, None if mask == "none" else keep, **original)
    assert_same(actual, folded(expected), inputs[:3])


def test_xformers_class_is_fused_where_it_can_be(fused_calls):
    *qkv, _ = tensors(40)
    module = NystromAttention(0.0, H, num_landmarks=8, conv_kernel_size=TAPS).double()
    module(*map(folded, qkv))
    assert len(fused_calls) == 1
    module(*map(folded, qkv), key_padding_mask=keep_mask(40))
    assert len(fused_calls) == 1


def test_xformers_class_across_heads():
    """Users pass (B, n, heads, d): with as many landmarks as heads it is exact attention across the heads."""
    *qkv, _ = tensors(7)
    module = NystromAttention(0.0, 7, num_landmarks=128)
    assert_close(module(*qkv), nn.functional.scaled_dot_product_attention(*qkv))
    with pytest.raises(ValueError, match=r"expected q, k, v of shape \(batch \* heads, tokens, features\)"):
        NystromAttention(0.0, 7, num_landmarks=6)(*qkv)


def test_xformers_class_keeps_modules_and_state():
    *qkv, _ = tensors(40)
    pooling = nn.AdaptiveAvgPool2d((8, None))  # the default of early versions, the same where n % m == 0
    skip = nn.Identity()
    module = NystromAttention(0.0, H, 8, pooling, v_skip_connection=skip, conv_kernel_size=TAPS)
    assert module.landmark_pooling is pooling and module.skip_connection is skip and not module.state_dict()
    expected = released("xformers", *qkv, 8) + qkv[2]
    assert_close(module(*map(folded, qkv)), folded(expected))
    module = NystromAttention(dropout=1.0, num_heads=H, num_landmarks=8, conv_kernel_size=TAPS).double()
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == {
        "skip_connection.weight": (H, 1, TAPS, 1)
    }
    assert not module(*map(folded, qkv)).any() and module.eval()(*map(folded, qkv)).any()
    causal = NystromAttention(0.0, H, 8, causal=True, inv_iterations=3)
    expected = released("xformers", *qkv, 8, causal=True, iterations=3)
    assert_close(causal(*map(folded, qkv)), folded(expected))
    exact = NystromAttention(0.0, H, 8, use_razavi_pinverse=False)
    assert_close(exact(*map(folded, qkv)), folded(released("xformers", *qkv, 8, use_razavi_pinverse=False)))


@pytest.mark.parametrize("by", ["class", "function"])
def test_causal_warns_once_that_it_lets_the_future_through(by, recwarn):
    _warnings._given.clear()
    *qkv, _ = tensors(12)
    module = NystromAttention(0.0, H, causal=True).double()

    def call(m, q, k, v):
        if by == "function":
            return compat.attention("xformers", q, k, v, num_landmarks=m, causal=True)
        module.num_landmarks = m
        return module(*map(folded, (q, k, v))).unflatten(0, q.shape[:2])

    def first_half_moves(m, which):
        later = [x.clone() for x in qkv]
        later[which][:, :, 6:] += torch.randn(later[which][:, :, 6:].shape)
        return not torch.equal(call(m, *later)[:, :, :6], call(m, *qkv)[:, :, :6])

    assert not any(first_half_moves(12, which) for which in range(3)) and not recwarn.list
    assert [first_half_moves(4, which) for which in range(3)] == [True, True, False]
    cut = qkv[2].masked_fill(torch.arange(12)[:, None] >= 4, 0)
    assert torch.equal(call(4, *qkv[:2], cut), call(4, *qkv))  # values after the first m are never read
    assert [str(warning.message).split(":")[0] for warning in recwarn] == [
        "xformers' NystromAttention with causal=True is not causal beyond num_landmarks tokens"
    ]
    _warnings._given.clear()
    NystromAttention(0.0, H, 4).double()(*map(folded, qkv))
    assert len(recwarn) == 1


def test_scripting_is_refused_in_one_sentence():
    with pytest.raises(
        NotImplementedError, match=r"^torch.jit.script does not support NystromAttention; use torch.exp"
    ):
        torch.jit.script(nn.Sequential(NystromAttention(0.0, H)))


@pytest.mark.parametrize("found", ["nothing", "a module without the class", "the class"])
def test_install_serves_the_removed_import(found, monkeypatch):
    name = "xformers.components.attention"
    theirs = ModuleType(name)
    if found == "the class":
        theirs.NystromAttention = object

    def find(_):
        if found == "nothing":
            raise ModuleNotFoundError(name)
        return theirs

    monkeypatch.setitem(sys.modules, name, theirs)
    if found == "nothing":
        del sys.modules[name]
    monkeypatch.setattr(importlib, "import_module", find)
    install()
    from xformers.components.attention import NystromAttention as imported

    assert imported is (object if found == "the class" else compat.XformersNystromAttention)
