"""timm's attention with rotary positions (EVA, EVA02, DINOv3, rotary ViT), and NaFlexViT with its padding."""

import copy

import pytest
import torch
from optional import import_timm
from torch import nn

timm = import_timm()
from timm.layers import AttentionRope, LayerNorm  # noqa: E402
from timm.models.eva import Eva, EvaAttention  # noqa: E402
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg  # noqa: E402

from nystrom_ext import reference  # noqa: E402
from nystrom_ext.convert import convert_, nystrom, revert_  # noqa: E402
from nystrom_ext.integrations import timm as integration  # noqa: E402
from nystrom_ext.integrations.timm import NystromTimmAttentionRope, NystromTimmEvaAttention  # noqa: E402
from nystrom_ext.modules import Options  # noqa: E402

M, N, DIM, HEADS = 8, 37, 32, 2
OURS = {AttentionRope: NystromTimmAttentionRope, EvaAttention: NystromTimmEvaAttention}
COMMON = {
    "plain": {},
    "three projections": {"qkv_fused": False},
    "no bias": {"qkv_bias": False},
    "norms": {"qk_norm": True, "scale_norm": True, "norm_layer": LayerNorm},
    "dropout": {"attn_drop": 0.3, "proj_drop": 0.2},
    "gate": {"gated": True},
    "halves": {"rotate_half": True, "num_prefix_tokens": 5},
    "no prefix": {"num_prefix_tokens": 0},
}
VARIANTS = [(cls, name, options) for cls in OURS for name, options in COMMON.items()]
VARIANTS += [
    (EvaAttention, "bias apart", {"qkv_bias_separate": True}),
    (AttentionRope, "sizes", {"attn_head_dim": 8, "dim_out": 16}),
    (AttentionRope, "grouped", {"num_heads": 4, "num_kv_heads": 2, "qkv_fused": False}),
]
pairs = pytest.mark.parametrize("cls, options", [pytest.param(c, o, id=f"{c.__name__}-{n}") for c, n, o in VARIANTS])


def module(cls, options, m=M):
    """A stock module in float64 with weights far from uniform attention, and ours with the same."""
    torch.manual_seed(0)
    stock = cls(DIM, **{"num_heads": HEADS, "scale_norm": False, **options}).double()
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = copy.deepcopy(stock)
    assert convert_(ours, num_landmarks=m).converted == [""] and type(ours) is OURS[cls]
    return stock, ours


def tokens(n=N):
    return torch.randn(2, n, DIM, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def rope_for(attention, form, n=N):
    """Embeddings for all; for every head, where timm can (as many keys' heads); for every sample."""
    heads = attention.num_heads if getattr(attention, "num_kv_groups", 1) == 1 else 1
    shape = {"shared": (), "per head": (heads,), "per sample": (2, 1)}[form]
    angles = torch.randn(*shape, n - attention.num_prefix_tokens, attention.head_dim, dtype=torch.double)
    return torch.cat([angles.sin(), angles.cos()], -1)


def run(attention, *args, **kwargs):
    torch.manual_seed(3)
    return attention(*args, **kwargs)


@pairs
@pytest.mark.parametrize("fused", [True, False])
def test_up_to_m_tokens_it_is_timms_module(cls, options, fused):
    stock, ours = module(cls, options, m=N)
    stock.fused_attn = ours.fused_attn = fused
    rope, mask = rope_for(stock, "shared"), torch.rand(2, 1, N, N) < 0.5
    for arguments in ({}, {"rope": rope}, {"attn_mask": mask | torch.eye(N, dtype=torch.bool)}, {"is_causal": True}):
        assert torch.equal(run(ours, tokens(), **arguments), run(stock, tokens(), **arguments))
    assert list(ours.state_dict()) == list(stock.state_dict())
    revert_(ours)
    assert type(ours) is cls and vars(ours).keys() == vars(stock).keys()
    assert torch.equal(run(ours, tokens(), rope), run(stock, tokens(), rope))


@pairs
@pytest.mark.parametrize("form", [None, "shared", "per head", "per sample"])
def test_everything_around_the_attention_is_timms(cls, options, form, monkeypatch):
    """With exact attention in place of the operator, the result is timm's."""

    def exact(q, k, v, ignored, *, query_padding_mask, dropout_p, enable_gqa, **options):
        assert ignored is query_padding_mask is None
        return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, enable_gqa=enable_gqa)

    monkeypatch.setattr(integration, "nystrom_attention", exact)
    stock, ours = module(cls, options)
    rope = None if form is None else rope_for(stock, form)
    torch.testing.assert_close(run(ours, tokens(), rope), run(stock, tokens(), rope))


@pairs
@pytest.mark.parametrize("extended", [{}, {"window": 2, "pinned": 1}])
def test_beyond_m_tokens_it_is_the_reference(cls, options, extended, monkeypatch):
    stock, ours = module(cls, options)
    ours.configure(Options(num_landmarks=M, **extended))
    rope, ours, stock = rope_for(stock, "shared"), ours.eval(), stock.eval()
    out = ours(tokens(), rope)
    assert not torch.allclose(out, stock(tokens(), rope), atol=1e-4)
    out.square().mean().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())
    monkeypatch.setattr(integration, "nystrom_attention", reference.nystrom_attention)
    torch.testing.assert_close(ours(tokens(), rope), out)


MODELS = {
    "eva02": (Eva, {"use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False}),
    "eva": (Eva, {"use_rot_pos_emb": False}),
    "dinov3": (
        Eva,
        {
            "use_rot_pos_emb": True,
            "use_abs_pos_emb": False,
            "qkv_bias": False,
            "rope_type": "dinov3",
            "rope_rotate_half": True,
            "num_reg_tokens": 4,
            "init_values": 1.0,
            "use_fc_norm": False,
        },
    ),
    "rope mixed": (Eva, {"use_rot_pos_emb": True, "attn_type": "rope", "rope_type": "mixed"}),
}


def build(kind):
    """24 x 24 pixels in patches of 4: 36 tokens and those in front."""
    cls, options = MODELS[kind]
    torch.manual_seed(0)
    model = cls(img_size=24, patch_size=4, embed_dim=DIM, depth=2, num_heads=HEADS, num_classes=5, **options).eval()
    for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
        nn.init.normal_(linear.weight, std=0.2)
    return model.double()


@pytest.mark.parametrize("kind", MODELS)
def test_models(kind, monkeypatch):
    model, images = build(kind), torch.randn(2, 3, 24, 24, dtype=torch.double)
    before, exact = str(model), model(images)
    report = convert_(model, num_landmarks=M, pinned=1)
    assert report.converted == ["blocks.0.attn", "blocks.1.attn"] and not report.skipped
    out = model(images)
    assert not torch.allclose(out, exact, atol=1e-4)
    with nystrom(model, num_landmarks=64):
        assert torch.equal(model(images), exact)
    assert torch.equal(model(images), out)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(images), out)
    monkeypatch.setattr(integration, "nystrom_attention", reference.nystrom_attention)
    torch.testing.assert_close(model(images), out)
    revert_(model)
    assert str(model) == before and torch.equal(model(images), exact)


def test_pretrained_configurations():
    for name in ("eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"):
        assert len(convert_(timm.create_model(name, depth=2)).converted) == 2, name


# NaFlexViT: images of several sizes in one batch, padded, with patch_valid.

GRIDS = [(3, 4), (5, 6), (4, 5), (1, 2)]  # 12, 30, 20 and 2 patches; with the two tokens in front, 14, 32, 22, 4


def naflex(attn_type="standard", **options):
    torch.manual_seed(0)
    cfg = NaFlexVitCfg(
        patch_size=4, embed_dim=DIM, depth=2, num_heads=HEADS, class_token=True, reg_tokens=1, attn_type=attn_type
    )
    model = NaFlexVit(cfg, num_classes=5, **options).eval()
    for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
        nn.init.normal_(linear.weight, std=0.1)
    return model.double()


def patches(grids=GRIDS, filler=0.0, longest=30):
    """What timm's NaFlex loader makes: patches, coordinates and validity."""
    generator = torch.Generator().manual_seed(1)
    batch = {
        "patches": torch.full((len(grids), longest, 48), filler, dtype=torch.double),
        "patch_coord": torch.zeros(len(grids), longest, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(grids), longest, dtype=torch.bool),
    }
    content = {grid: torch.randn(grid[0] * grid[1], 48, dtype=torch.double, generator=generator) for grid in GRIDS}
    for row, (h, w) in enumerate(grids):
        batch["patches"][row, : h * w] = content[h, w]
        batch["patch_coord"][row, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        batch["patch_valid"][row, : h * w] = True
    return batch


NAFLEX = {
    "standard": {},
    "eva": {"attn_type": "eva"},
    "axial rope": {"rope_type": "axial"},
    "mixed rope": {"rope_type": "mixed"},
    "class token": {"global_pool": "token"},
    "average": {"global_pool": "avg"},
    "maximum": {"global_pool": "max"},
}


@pytest.mark.parametrize("kind", NAFLEX)
@pytest.mark.parametrize("extended", [{}, {"window": 2, "pinned": 2}])
def test_naflexvit_padding_is_padding(kind, extended):
    """Results are those of the image alone, whatever the padding holds."""
    model = naflex(**NAFLEX[kind])
    convert_(model, num_landmarks=M, **extended)
    together = model(patches())
    for filler in (0.0, 7.0, -1e3):
        torch.testing.assert_close(model(patches(filler=filler)), together, rtol=0, atol=1e-12)
    for i, (h, w) in enumerate(GRIDS):
        alone = model(patches([(h, w)], longest=h * w))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", NAFLEX)
def test_naflexvit_up_to_m_tokens_and_back(kind):
    model = naflex(**NAFLEX[kind])
    stock, before = model(patches()), {name: dict(vars(m)) for name, m in model.named_modules()}
    convert_(model, num_landmarks=64)
    assert torch.equal(model(patches()), stock)
    convert_(model, num_landmarks=M)
    assert not torch.allclose(model(patches()), stock, atol=1e-4)
    with nystrom(model, num_landmarks=64):
        assert torch.equal(model(patches()), stock)
    assert model.use_key_only_attn_mask is True
    revert_(model.blocks[0])
    assert model.use_key_only_attn_mask is True  # the other block needs it
    revert_(model)
    assert model.use_key_only_attn_mask is False and torch.equal(model(patches()), stock)
    assert {name: vars(m).keys() for name, m in model.named_modules()} == {n: v.keys() for n, v in before.items()}


def test_naflexvit_whose_masks_are_not_known_to_be_padding():
    """Converted without the model around it: the mask has a row for every query."""
    model, whole = naflex(), naflex()
    convert_(model.blocks, num_landmarks=M)
    with pytest.raises(NotImplementedError, match=r"\(4, 1, 32, 32\) .*use_key_only_attn_mask=True"):
        model(patches())
    model.use_key_only_attn_mask = True  # the way out
    convert_(whole, num_landmarks=M)
    assert torch.equal(model(patches()), whole(patches()))


def test_naflexvit_compiles():
    model = naflex()
    convert_(model, num_landmarks=M)
    out = model.forward_features(**patches())
    compiled = torch.compile(model.forward_features, backend="aot_eager")(**patches())
    torch.testing.assert_close(compiled["patches"], out["patches"])
