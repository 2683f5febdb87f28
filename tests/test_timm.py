"""timm's vision transformers: our attention as attn_layer, and conversion."""

import importlib
import pkgutil

import pytest
import torch
from optional import import_timm
from torch import nn

timm = import_timm()
from timm.layers import Attention, create_feature_extractor  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from nystrom_ext import reference  # noqa: E402
from nystrom_ext.convert import convert_, nystrom, revert_  # noqa: E402
from nystrom_ext.integrations import timm as integration  # noqa: E402
from nystrom_ext.integrations.timm import NystromTimmAttention  # noqa: E402
from nystrom_ext.integrations.timm_others import REASONS, reason  # noqa: E402
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

    def exact(q, k, v, ignored, *, dropout_p, **options):
        assert ignored is options["query_padding_mask"] is None
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


def keep_mask():
    """(2, 12) bool, True = keep; the second sample has nine tokens and a hole."""
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[1, [3, 10, 11]] = False
    return keep


def test_masks():
    x, mask = torch.randn(2, 12, 32), torch.ones(12, 12, dtype=torch.bool).tril()
    per_head = keep_mask()[:, None, None].repeat(1, 2, 1, 1)  # of a size that says it may differ between heads
    per_query = keep_mask()[:, None, None].repeat(1, 1, 12, 1)
    attention = Attention8(32, 2).eval()
    for arguments in (
        {"attn_mask": mask},
        {"attn_mask": torch.randn(12, 12)},
        {"attn_mask": per_head},
        {"attn_mask": per_query},
        {"is_causal": True},
    ):
        with pytest.raises(NotImplementedError, match="is not supported with 12 tokens > num_landmarks=8"):
            attention(x, **arguments)
        expected = Attention.forward(attention, x, **arguments)
        for options in (Options(num_landmarks=M, unsupported_mask="exact"), Options(num_landmarks=12)):
            attention.configure(options)
            assert torch.equal(attention(x, **arguments), expected)
        attention.configure(Options(num_landmarks=M))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_masks_that_are_padding(dtype):
    """(B, 1, 1, N), or expanded: padding by construction. Results are those of the valid tokens alone."""
    x, keep = torch.randn(2, 12, 32).double(), keep_mask()
    attention = Attention8(32, 2, qkv_bias=True).double().eval()
    mask = keep if dtype == torch.bool else torch.zeros(2, 12, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)
    expected = attention(x[1:, keep[1]])
    for form in (
        mask[:, None, None],
        mask[:, None, None].expand(-1, 2, 12, -1),
        mask[:, None, None].expand(-1, 1, 12, -1),
    ):
        out = attention(x, attn_mask=form)
        torch.testing.assert_close(out[1:, keep[1]], expected)
        torch.testing.assert_close(out[:1], attention(x[:1]))
        torch.testing.assert_close(out[1, ~keep[1]], attention.proj.bias.expand(3, -1))
        noise = torch.where(keep[..., None], x, torch.full_like(x, 1e3))
        assert torch.equal(attention(noise, attn_mask=form)[keep], out[keep])
    for form in (mask[1:, None, None], mask[1:], mask[1].expand(12, -1)):  # one for all samples
        torch.testing.assert_close(attention(x, attn_mask=form)[1:, keep[1]], expected)


def test_masks_that_mask_nothing():
    x, attention = torch.randn(2, 12, 32), Attention8(32, 2).eval()
    for mask in (torch.ones(12, 12, dtype=torch.bool), torch.zeros(2, 2, 12, 12)):
        assert torch.equal(attention(x, attn_mask=mask), attention(x))


def test_biases_of_single_keys_are_refused():
    attention, mask = Attention8(32, 2).eval(), torch.zeros(2, 1, 1, 12)
    mask[1, 0, 0, 3] = -0.5
    with pytest.raises(RuntimeError, match="additive attn_mask must hold 0"):
        attention(torch.randn(2, 12, 32), attn_mask=mask)


def test_self_attention_false_is_refused():
    model = build()
    with pytest.raises(ValueError, match="always self-attention, got self_attention=False"):
        convert_(model, self_attention=False)
    assert {type(block.attn) for block in model.blocks} == {Attention}
    with pytest.raises(ValueError, match="always self-attention"):
        type("Cross", (NystromTimmAttention,), {"nystrom_options": Options(self_attention=False)})
    convert_(model, self_attention=True, need_weights="never", num_landmarks=M)
    assert torch.equal(model(images()), build(Attention8)(images()))


def test_other_programs_get_one_sentence_or_a_graph():
    model = build()
    convert_(model, num_landmarks=M)
    out = model(images())
    with pytest.raises(NotImplementedError, match="does not support NystromTimmAttention; use torch.export.export"):
        torch.jit.script(model)
    assert torch.equal(torch.fx.symbolic_trace(model)(images()), out)
    assert torch.equal(torch.jit.trace(model, images())(images()), out)
    assert torch.equal(torch.export.export(model, (images(),)).module()(images()), out)
    block = create_feature_extractor(model, ["blocks.1"])(images())["blocks.1"]
    assert torch.equal(model.head(model.fc_norm(model.pool(model.norm(block)))), out)
    revert_(model)
    torch.jit.script(model)


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


def attention_classes():
    """Every module class of the installed timm that is called attention."""
    packages = (timm.layers, timm.models)
    names = [info.name for p in packages for info in pkgutil.iter_modules(p.__path__, p.__name__ + ".")]
    found = [cls for name in names for cls in vars(importlib.import_module(name)).values() if isinstance(cls, type)]
    found = {cls for cls in found if issubclass(cls, nn.Module) and cls.__module__.startswith("timm.")}
    return {cls for cls in found if "Attention" in cls.__name__ or "Attn" in cls.__name__}


def test_every_attention_of_timm_is_served_or_has_a_reason():
    classes = attention_classes()
    assert len(classes) > 60 and set(integration.SWAPS) < classes
    assert all("stays" in reason(cls) or "nystrom_ext.nystrom_attention" in reason(cls) for cls in classes)
    named = {f"{cls.__module__.rpartition('.')[2]}.{cls.__qualname__}" for cls in classes}
    inline = {name for name in REASONS if "Att" not in name}
    assert set(REASONS) - named == inline  # no row for what timm does not have any more
    for name in inline:
        file, cls = name.split(".")
        package = "layers" if file == "other_pool" else "models"
        assert hasattr(importlib.import_module(f"timm.{package}.{file}"), cls)


MODELS = {
    "swin_tiny_patch4_window7_224": ("layers.0.blocks.0.attn", "WindowAttention may add position biases"),
    "cait_xxs24_224": ("blocks.0.attn", "TalkingHeadAttn mixes the scores"),
    "caformer_s18": ("stages.2.blocks.0.token_mixer", "metaformer.Attention is not timm's"),
    "xcit_nano_12_p16_224": ("blocks.0.attn", "XCA has no softmax over pairs"),
    "beit_base_patch16_224": ("blocks.0.attn", "beit.Attention may add position biases"),
    "mobilenetv4_hybrid_medium": ("blocks.2.4.attn", "MultiQueryAttention2d is not"),
    "pvt_v2_b0": ("stages.0.blocks.0.attn", "pooled or strided keys"),
    "resnest14d": ("layer1.0.conv2", "SplitAttn has no softmax over pairs"),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_attention_is_refused_by_name(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match="nothing to convert in") as error:
        convert_(model)
    where, why = MODELS[name]
    assert f"{where}: timm." in str(error.value) and why in str(error.value)


def test_containers_are_not_listed():
    with torch.device("meta"):
        listed = integration.find(dict(timm.create_model("cait_xxs24_224").named_modules()))
    assert set(listed) == {f"blocks.{i}.attn" for i in range(24)} | {f"blocks_token_only.{i}.attn" for i in range(2)}


def test_options_are_checked_before_anything_changes():
    model = build()
    with pytest.raises(ValueError, match="num_landmarks must be"):
        convert_(model, num_landmarks=0)
    assert {type(block.attn) for block in model.blocks} == {Attention}
