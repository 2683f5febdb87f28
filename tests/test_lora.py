"""LoRA adapters around and inside a converted attention."""

import copy

import pytest
import torch
from small_models import (
    E,
    H,
    L,
    M,
    constructed,
    converted,
    effective,
    encoder,
    gradients,
    inputs,
    regimes,
    stock,
)
from torch import nn
from torch.testing import assert_close

from nystrom_ext import NystromMultiheadAttention, convert_, nystrom

pytestmark = pytest.mark.usefixtures("fresh")


def with_lora(model, target="attention"):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=[target], r=2, init_lora_weights=False))


LORA = {
    "constructed": lambda m, target="attention": with_lora(constructed(m), target),
    "converted": lambda m, target="attention": with_lora(converted(stock(), m), target),
    "converted after": lambda m, target="attention": converted(with_lora(stock(), target), m),
}
lora_forms = pytest.mark.parametrize("form", LORA)


@lora_forms
def test_lora_up_to_m_tokens_is_lora_of_stock(form):
    reference, model, x = with_lora(stock()), LORA[form](L), inputs()
    assert_close(model(x), reference(x))
    assert_close(gradients(model, model(x)), gradients(reference, reference(x)))


@lora_forms
def test_lora_beyond_m_tokens_is_attention_with_merged_weights(form):
    model, x = LORA[form](M), inputs()
    out, net = model(x), model.base_model.model
    lora = net.attention
    merged = stock().attention.in_proj_weight + lora.scaling["default"] * (
        lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    )
    lora.merge()  # for out_proj this is the definition: some versions of peft add its update twice
    state = effective(net)
    lora.unmerge()
    assert_close(state["attention.in_proj_weight"], merged.detach())
    assert_close(out, constructed(M, state)(x))
    with model.disable_adapter():
        assert_close(model(x), constructed()(x))
    assert (out - constructed()(x)).abs().max() > 1e-2


@lora_forms
@regimes
def test_lora_trains_the_adapters_only(form, num_landmarks):
    model = LORA[form](num_landmarks)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gradients(model, model(inputs()))
    optimizer.step()
    changed = {name for name, p in model.state_dict().items() if not torch.allclose(p, before[name], atol=1e-12)}
    assert changed == {name for name in before if "lora_" in name}


@lora_forms
@regimes
def test_lora_merges_and_unloads(form, num_landmarks):
    model, x = LORA[form](num_landmarks).eval(), inputs()
    out = model(x)
    merged = copy.deepcopy(model).merge_and_unload()
    plain = model.unload()
    for other, expected in ((merged, out), (plain, constructed(num_landmarks)(x))):
        assert type(other.attention) is NystromMultiheadAttention
        assert {*other.state_dict()} == {*stock().state_dict()}
        assert isinstance(other.attention.in_proj_weight, nn.Parameter)
        assert_close(other(x), expected)
    assert_close(plain.state_dict(), stock().state_dict())


@lora_forms
@regimes
def test_lora_of_out_proj_has_an_effect(form, num_landmarks):
    """nn.MultiheadAttention ignores it, because it does not call out_proj."""
    model, x = LORA[form](num_landmarks, "out_proj"), inputs()
    out = model(x)
    assert {name for name in gradients(model, out) if "out_proj.lora_" in name}
    assert_close(model.merge_and_unload()(x), out)
    assert (out - constructed(num_landmarks)(x)).abs().max() > 1e-2
    ignored = with_lora(stock(), "out_proj")
    assert_close(ignored(x), stock()(x))


def test_lora_in_a_decoder_hides_no_causal_attention():
    model = with_lora(nn.Transformer(E, H, 1, 1, 16, batch_first=True), "self_attn")
    report = convert_(model, num_landmarks=M, include="*")
    assert report.converted == [
        "base_model.model.encoder.layers.0.self_attn.base_layer",
        "base_model.model.decoder.layers.0.multihead_attn",
    ]
    (name, reason), *others = report.skipped.items()
    assert name == "base_model.model.decoder.layers.0.self_attn.base_layer" and "causal" in reason and not others


def test_revert_under_wrappers_that_pass_attributes_through():
    model = with_lora(encoder(), "self_attn")
    for wrapper in (model, torch.compile(nn.MultiheadAttention(E, H), backend="eager")):
        before = [(type(m), {*vars(m)}) for m in wrapper.modules()]
        with nystrom(wrapper):
            assert any(isinstance(m, NystromMultiheadAttention) for m in wrapper.modules())
        assert [(type(m), {*vars(m)}) for m in wrapper.modules()] == before
    assert model.base_model.model.use_nested_tensor
