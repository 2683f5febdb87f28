"""Conversion of pruned and parametrized modules."""

import copy

import pytest
import torch
from small_models import (
    E,
    H,
    L,
    Net,
    constructed,
    converted,
    effective,
    gradients,
    inputs,
    regimes,
    stock,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close

from nystrom_ext import NystromMultiheadAttention, convert_, revert_

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize("when", ["before", "after"])
@regimes
def test_prune(when, num_landmarks):
    model, x = stock(), inputs()
    if when == "before":
        convert_(model, num_landmarks=num_landmarks)
    prune.l1_unstructured(model.attention, "in_proj_weight", 0.5)
    prune.l1_unstructured(model.attention.out_proj, "weight", 0.5)
    if when == "after":
        convert_(model, num_landmarks=num_landmarks)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        out = model(x)
        state = effective(model)
        assert (state["attention.in_proj_weight"] == 0).double().mean() == 0.5
        assert (state["attention.out_proj.weight"] == 0).double().mean() == 0.5
        reference = constructed(num_landmarks, state)
        expected = reference(x)
        assert_close(out, expected)
        grads, full = gradients(model, out), gradients(reference, expected)
        for name in ("attention.in_proj_weight", "attention.out_proj.weight"):
            assert_close(grads[f"{name}_orig"], full[name] * (state[name] != 0))
        optimizer.step()
    out = model(x)
    prune.remove(model.attention, "in_proj_weight")
    prune.remove(model.attention.out_proj, "weight")
    assert_close(model(x), out)
    revert_(model)
    assert type(model.attention) is nn.MultiheadAttention and not model.attention._forward_pre_hooks
    assert {*model.state_dict()} == {*stock().state_dict()}


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized(model):
    parametrizations.weight_norm(model.attention, "in_proj_weight")
    parametrize.register_parametrization(model.attention, "in_proj_bias", Doubled())
    parametrizations.orthogonal(model.attention.out_proj, "weight")
    return model


@pytest.mark.parametrize("when", ["before", "after"])
@regimes
def test_parametrizations(when, num_landmarks):
    torch.manual_seed(3)
    model, x = stock(), inputs()
    model = parametrized(converted(model, num_landmarks)) if when == "before" else parametrized(model)
    keys, values = list(model.state_dict()), copy.deepcopy(model.state_dict())
    if when == "after":
        convert_(model, num_landmarks=num_landmarks)
    attention = model.attention
    assert isinstance(attention, NystromMultiheadAttention) and parametrize.is_parametrized(attention)
    assert list(model.state_dict()) == keys

    out, reference = model(x), constructed(num_landmarks, effective(model))
    expected = reference(x)
    assert_close(out, expected)
    grads, full = gradients(model, out), gradients(reference, expected)
    assert_close(grads["attention.parametrizations.in_proj_bias.original"], 2 * full["attention.in_proj_bias"])
    assert {f"attention.parametrizations.in_proj_weight.original{i}" for i in (0, 1)} <= {*grads}
    with parametrize.cached():
        assert_close(model(x), out)
    assert_close(copy.deepcopy(model)(x), out)

    other = copy.deepcopy(model)  # the way back, under the parametrizations and without them
    revert_(other)
    assert type(other.attention).__mro__[1] is nn.MultiheadAttention
    assert type(other.attention).__name__ == "ParametrizedMultiheadAttention"
    assert_close(other.state_dict(), values)
    with torch.no_grad():
        assert_close(other(x), converted(copy.deepcopy(other), L)(x))
    for name in ("in_proj_weight", "in_proj_bias"):
        for m in (attention, other.attention):
            parametrize.remove_parametrizations(m, name)
    assert type(attention) is NystromMultiheadAttention and type(other.attention) is nn.MultiheadAttention
    assert_close(model(x), out)
    revert_(model)
    assert type(attention) is nn.MultiheadAttention and not attention._forward_pre_hooks


def test_parametrized_subclasses_stay_what_they_are():
    class Special(nn.MultiheadAttention):
        pass

    model = parametrized(Net(Special(E, H, batch_first=True)))
    with pytest.raises(ValueError, match="ParametrizedSpecial is a subclass with its own behaviour"):
        convert_(model)
    assert isinstance(model.attention, Special)
