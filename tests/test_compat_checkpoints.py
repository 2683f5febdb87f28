"""Checkpoints of other implementations: what their block computes, and our module after loading its state_dict."""

from __future__ import annotations

import pytest
import torch
from compat_problems import TAPS, B, D, H, f64, ours
from peers.formulas import released
from torch import nn
from torch.testing import assert_close

from nystrom_ext import compat


def rows(*names, bias=True):
    out = {}
    for name in names:
        out[f"{name}.weight"] = torch.randn(H * D, H * D, dtype=f64) / 4
        if bias:
            out[f"{name}.bias"] = torch.randn(H * D, dtype=f64)
    return out


def checkpoint(source):
    """Keys, and the names of q, k, v, out in it (after unpacking)."""
    torch.manual_seed(3)
    conv = torch.randn(H, 1, TAPS, 1, dtype=f64)
    if source == "official":
        return {**rows("W_q", "W_k", "W_v", "ff"), "attn.conv.weight": conv}
    if source == "huggingface":
        norm = {"output.LayerNorm.weight": torch.ones(H * D), "output.LayerNorm.bias": torch.zeros(H * D)}
        return {**rows("self.query", "self.key", "self.value", "output.dense"), "self.conv.weight": conv, **norm}
    if source == "lucidrains":
        packed = {"to_qkv.weight": torch.randn(3 * H * D, H * D, dtype=f64) / 4}
        return {**packed, **rows("to_out.0"), "res_conv.weight": conv}
    if source == "xformers":
        inputs = rows(*(f"in_proj_container.{x}_proj" for x in "qkv"))
        del inputs["in_proj_container.k_proj.bias"]  # each of the four biases is optional there
        return {**inputs, **rows("proj"), "attention.skip_connection.weight": conv}
    return {**rows("q_proj", "k_proj", "v_proj", "out_proj", bias=False), "conv_weight": conv[:, 0, :, 0]}


def block(source, state, x, m):
    """What the block with this checkpoint computes."""
    linear = nn.functional.linear
    names = [key[: -len(".weight")] for key in state if key.endswith(".weight") and "onv" not in key.split(".")[-2]]
    names = [name for name in names if "skip" not in name and "Norm" not in name]
    project = [(state[f"{name}.weight"], state.get(f"{name}.bias")) for name in names]
    if source == "lucidrains":
        project = [(weight, None) for weight in project[0][0].chunk(3)] + project[1:]
    q, k, v = (linear(x, *p).unflatten(-1, (H, D)).transpose(1, 2) for p in project[:3])
    conv = next(value for key, value in state.items() if "conv" in key.split(".")[-2:][0] or "skip" in key)
    out = released(source, q, k, v, m, conv.reshape(H, 1, TAPS, 1))
    return linear(out.transpose(1, 2).flatten(2), *project[3])


SOURCES = ("official", "huggingface", "lucidrains", "xformers", "flashnystrom")


@pytest.mark.parametrize("prefix", ["", "encoder.layer.0.attention."])
@pytest.mark.parametrize("source", SOURCES)
def test_checkpoint_gives_the_results_of_its_block(source, prefix):
    state = checkpoint(source)
    x = torch.randn(B, 40, H * D, dtype=f64)
    module = ours(source)
    others = {"encoder.layer.1.W_q.weight": x, "head": x} if prefix else {}
    compat.load_state_dict(module, {**others, **{prefix + k: v for k, v in state.items()}}, source, prefix=prefix)
    actual = module(x, x, x, need_weights=False)[0]
    assert_close(actual, block(source, state, x, 8), rtol=1e-9, atol=1e-9)


def test_missing_biases_become_zero():
    module = ours("flashnystrom")
    nn.init.ones_(module.in_proj_bias)
    nn.init.ones_(module.out_proj.bias)
    compat.load_state_dict(module, checkpoint("flashnystrom"), "flashnystrom")
    assert not module.in_proj_bias.any() and not module.out_proj.bias.any()
    without = ours("flashnystrom", bias=False)
    compat.load_state_dict(without, checkpoint("flashnystrom"), "flashnystrom")
    assert torch.equal(without.in_proj_weight, module.in_proj_weight)


def test_other_dtypes_widths_and_aliases():
    module = ours("hf", conv_kernel_size=None, kdim=16, vdim=12)
    state = rows("self.query", "self.key", "self.value", "output.dense")
    state["self.key.weight"], state["self.value.weight"] = torch.randn(H * D, 16), torch.randn(H * D, 12)
    parameters = dict(module.named_parameters())
    compat.load_state_dict(module, {key: value.half() for key, value in state.items()}, "hf")
    assert all(p is parameters[key] and p.dtype == f64 for key, p in module.named_parameters())
    assert_close(module.v_proj_weight, state["self.value.weight"].half().double())
    assert_close(module.in_proj_bias[H * D : 2 * H * D], state["self.key.bias"].half().double())


E = H * D
MISFITS = {
    r"missing key ff.weight": (lambda s: s.pop("ff.weight"), {}),
    r"missing key attn.conv.weight": (lambda s: s.pop("attn.conv.weight"), {}),
    r"unexpected key extra of shape \(1,\)": (lambda s: s.update(extra=torch.ones(1)), {}),
    r"attn.conv.weight of shape .*conv_kernel_size=5": (lambda s: None, {"conv_kernel_size": None}),
    r"unexpected key W_q.bias .*construct the module with bias=True": (lambda s: None, {"bias": False}),
    r"size mismatch for attn.conv.weight: expected \(3, 1, 7, 1\), got \(3, 1, 5, 1\)": (
        lambda s: None,
        {"conv_kernel_size": 7},
    ),
    rf"size mismatch for W_k.weight: expected \({E}, {E}\), got \(1, {E}\)": (
        lambda s: s.update({"W_k.weight": torch.ones(1, E)}),
        {},
    ),
    r"size mismatch for W_v.bias": (lambda s: s.update({"W_v.bias": torch.ones(1)}), {}),
    r"bias_k \(1, 1, 24\) of the module has no counterpart": (
        lambda s: s.pop("attn.conv.weight"),
        {"add_bias_kv": True, "conv_kernel_size": None},
    ),
}


@pytest.mark.parametrize("message", MISFITS)
def test_misfitting_checkpoints_change_nothing(message):
    damage, options = MISFITS[message]
    state = checkpoint("official")
    damage(state)
    module = ours("official", **options)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match="(?s)official state_dict.*unchanged.*" + message):
        compat.load_state_dict(module, state, "official")
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_other_checkpoint_errors():
    module = ours("official")
    with pytest.raises(ValueError, match="unknown source 'timm'; known are official, huggingface, lucidrains, "):
        compat.load_state_dict(module, {}, "timm")
    with pytest.raises(RuntimeError, match=r"no key starts with 'mha.'; the first keys are \['W_q.weight', "):
        compat.load_state_dict(module, checkpoint("official"), "official", prefix="mha.")
    with pytest.raises(RuntimeError, match="(?s)missing key to_qkv.weight.*unexpected key W_q.weight"):
        compat.load_state_dict(module, checkpoint("official"), "lucidrains")
    with pytest.raises(RuntimeError, match="model_state_dict is no tensor but dict"):
        compat.load_state_dict(module, {"model_state_dict": checkpoint("official")}, "official")
    with pytest.raises(TypeError, match="expected a NystromMultiheadAttention, got Sequential"):
        compat.load_state_dict(nn.Sequential(module), checkpoint("official"), "official")
    packed = ours("lucidrains", kdim=16)
    with pytest.raises(RuntimeError, match=r"k_proj_weight \(24, 16\) of the module has no counterpart"):
        compat.load_state_dict(packed, checkpoint("lucidrains"), "lucidrains")
