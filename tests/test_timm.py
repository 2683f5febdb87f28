"""timm's vision transformers: our attention as attn_layer, and conversion."""

import pytest
import torch
from optional import import_timm
from torch import nn

timm = import_timm()
from timm.layers import Attention  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from nystrom_ext import reference  # noqa: E402
from nystrom_ext.convert import convert_, nystrom, revert_  # noqa: E402
from nystrom_ext.integrations import timm as integration  # noqa: E402
from nystrom_ext.integrations.timm import NystromTimmAttention  # noqa: E402
from nystrom_ext.modules import Options  # noqa: E402

M, DEPTH = 8, 2
BLOCKS = [f"blocks.{i}.attn" for i in range(DEPTH)]
VARIANTS = {
    "plain": {},
    "norms": {"qk_norm": True, "scale_attn_norm": True},
    "dropout": {"attn_drop_rate": 0.3, "proj_drop_rate": 0.2},
    "bare": {"qkv_bias": False},
}


class Attention8(NystromTimmAttention):
    nystrom_options = Options(num_landmarks=M)


def build(attn_layer=Attention, variant="plain"):
    """24 x 24 pixels in patches of 4 and a class token: 37 tokens."""
    torch.manual_seed(0)
    sizes = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": DEPTH, "num_heads": 2, "num_classes": 5}
    model = VisionTransformer(**sizes, **VARIANTS[variant], attn_layer=attn_layer).eval()
    for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
        nn.init.normal_(linear.weight, std=0.2)  # far from uniform attention
    return model


def images():
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch):
    made = []
    stock = integration.nystrom_attention
    monkeypatch.setattr(integration, "nystrom_attention", lambda *a, **k: made.append(k) or stock(*a, **k))
    return made


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [False, True])
def test_up_to_m_tokens_it_is_timms_module(variant, training, calls):
    outputs = []
    for layer in (Attention, NystromTimmAttention):
        model = build(layer, variant).train(training)
        torch.manual_seed(2)
        outputs.append(model(images()))
    assert torch.equal(*outputs) and not calls


@pytest.mark.parametrize("variant", VARIANTS)
def test_beyond_m_tokens_every_block_runs_the_operator(variant, calls, monkeypatch):
    model = build(Attention8, variant)
    out = model(images())
    assert len(calls) == DEPTH and not torch.allclose(out, build(Attention, variant)(images()), atol=1e-4)
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())
    monkeypatch.setattr(integration, "nystrom_attention", reference.nystrom_attention)
    torch.testing.assert_close(model(images()), out, atol=1e-5, rtol=1e-4)


def test_everything_around_the_attention_is_timms(monkeypatch):
    """With exact attention in place of the operator, the result is timm's."""

    def exact(q, k, v, *, dropout_p, **options):
        return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)

    monkeypatch.setattr(integration, "nystrom_attention", exact)
    x = torch.randn(2, 12, 32)
    for options in ({}, {"gated": True}, {"qk_norm": True, "scale_norm": True}, {"attn_head_dim": 8, "dim_out": 16}):
        torch.manual_seed(0)
        stock = Attention(32, 2, norm_layer=nn.LayerNorm, attn_drop=0.3, proj_drop=0.2, **options)
        ours = Attention8(32, 2, norm_layer=nn.LayerNorm, attn_drop=0.3, proj_drop=0.2, **options)
        ours.load_state_dict(stock.state_dict())
        outputs = []
        for module in (stock, ours):
            torch.manual_seed(3)
            outputs.append(module(x))
        torch.testing.assert_close(*outputs)


def test_masks():
    x, mask = torch.randn(2, 12, 32), torch.ones(12, 12, dtype=torch.bool).tril()
    attention = Attention8(32, 2).eval()
    for arguments in ({"attn_mask": mask}, {"is_causal": True}):
        with pytest.raises(NotImplementedError, match="not supported with 12 tokens > num_landmarks=8"):
            attention(x, **arguments)
        expected = Attention.forward(attention, x, **arguments)
        for options in (Options(num_landmarks=M, unsupported_mask="exact"), Options(num_landmarks=12)):
            attention.configure(options)
            assert torch.equal(attention(x, **arguments), expected)
        attention.configure(Options(num_landmarks=M))


def test_create_model():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, attn_layer=NystromTimmAttention)
    assert type(model.blocks[0].attn) is NystromTimmAttention


def test_conversion(calls):
    model = build()
    before = str(model)
    state, parameters, exact = list(model.state_dict()), list(model.parameters()), model(images())
    report = convert_(model, num_landmarks=M)
    assert report.converted == BLOCKS and not report.skipped
    assert torch.equal(model(images()), build(Attention8)(images())) and len(calls) == 2 * DEPTH
    assert list(model.state_dict()) == state and all(map(lambda a, b: a is b, model.parameters(), parameters))
    convert_(model, num_landmarks=5, include="*.0.*")
    assert [m.attn.nystrom_options.num_landmarks for m in model.blocks] == [5, M]
    with nystrom(model, num_landmarks=64):
        assert torch.equal(model(images()), exact)
    assert [m.attn.nystrom_options.num_landmarks for m in model.blocks] == [5, M]
    revert_(model)
    assert str(model) == before and torch.equal(model(images()), exact)
    assert not any("nystrom" in key or "converted" in key for m in model.modules() for key in vars(m))


def test_constructed_modules_stay_what_they_are():
    model = build(Attention8)
    with nystrom(model, num_landmarks=64):
        assert model.blocks[0].attn.nystrom_options == Options()
    assert "nystrom_options" not in vars(model.blocks[0].attn)
    convert_(model, num_landmarks=5)
    assert model.blocks[0].attn.nystrom_options.num_landmarks == 5
    revert_(model)
    assert type(model.blocks[0].attn) is Attention8 and "nystrom_options" not in vars(model.blocks[0].attn)


def test_other_attention_is_refused_by_name():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, embed_dim=16, depths=(1,), num_heads=(1,))
    with pytest.raises(
        ValueError, match="(?s)nothing to convert in SwinTransformer.*WindowAttention is not timm.layers"
    ):
        convert_(model)


def test_options_are_checked_before_anything_changes():
    model = build()
    with pytest.raises(ValueError, match="num_landmarks must be"):
        convert_(model, num_landmarks=0)
    assert {type(block.attn) for block in model.blocks} == {Attention}
