"""Conversion among what users have around their models: compilation, quantisation, hooks, ties, checkpointing."""

import copy
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from small_models import (
    PADDING,
    E,
    H,
    L,
    M,
    N,
    constructed,
    converted,
    encoder,
    gradients,
    inputs,
    regimes,
    stock,
)
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from nystrom_ext import NystromMultiheadAttention, convert_, nystrom, revert_

pytestmark = pytest.mark.usefixtures("fresh")


# ------------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@regimes
def test_compiled_model(backend, num_landmarks):
    model, x = converted(stock(), num_landmarks), inputs()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = gradients(model, model(x, PADDING))
    out = compiled(x, PADDING)
    assert_close(out, model(x, PADDING))
    assert_close(gradients(model, out), expected)


def test_conversion_of_a_compiled_model():
    model, x = stock(), inputs()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(x), stock()(x))
    for step, expected in (
        (lambda: convert_(compiled, num_landmarks=M), constructed()),
        (lambda: convert_(model, num_landmarks=M + 1), constructed(M + 1)),
        (lambda: revert_(compiled), stock()),
    ):
        step()
        assert_close(compiled(x), expected(x))


# ------------------------------------------------------------------------------------------------------- quantisation


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantizable_attention_is_skipped_with_its_reason():
    quantizable = torch.ao.nn.quantizable.MultiheadAttention(E, H)
    model = nn.ModuleDict({"quantizable": quantizable, "stock": nn.MultiheadAttention(E, H)})
    before = str(quantizable)
    report = convert_(model)
    assert report.converted == ["stock"] and str(quantizable) == before
    assert "torch.ao.nn.quantizable" in report.skipped["quantizable"]
    assert "is a subclass with its own behaviour" in report.skipped["quantizable"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("order", ["converted first", "quantised first"])
def test_dynamic_quantisation(order):
    if not torch.backends.quantized.supported_engines[1:]:
        pytest.skip("this build of torch has no engine for quantised layers")
    torch.set_default_dtype(torch.float32)
    model, x = encoder().eval(), inputs()
    expected = converted(copy.deepcopy(model))(x)
    if order == "converted first":
        model = torch.ao.quantization.quantize_dynamic(converted(model), {nn.Linear})
    else:
        model = converted(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}))
    layer = model.layers[0]
    assert type(layer.linear1) is torch.ao.nn.quantized.dynamic.Linear
    assert type(layer.self_attn) is NystromMultiheadAttention
    for context in (nullcontext, torch.no_grad):
        with context():
            out = model(x)
        assert 0 < (out - expected).norm() < 0.05 * expected.norm()


# ---------------------------------------------------------------------------------------------------- kinds of models


class EncoderBlock(nn.Module):
    """The structure of torchvision's: attention called by keywords, without weights."""

    def __init__(self, width):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, 4, dropout=0.0, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, input):
        x = self.ln_1(input)
        x, _ = self.self_attention(query=x, key=x, value=x, need_weights=False)
        x = x + input
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    def __init__(self, width=16, depth=2):
        super().__init__()
        self.conv_proj = nn.Conv2d(3, width, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embedding = nn.Parameter(torch.randn(1, 197, width))
        self.encoder = nn.Sequential(*[EncoderBlock(width) for _ in range(depth)])
        self.heads = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 5))

    def forward(self, images):
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], 1)
        return self.heads(self.encoder(tokens + self.pos_embedding)[:, 0])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_vision_transformer(training):
    model, images = VisionTransformer().train(training), torch.randn(2, 3, 56, 56)
    twin = copy.deepcopy(model)
    for block in twin.encoder:
        block.self_attention = NystromMultiheadAttention(16, 4, batch_first=True, num_landmarks=64)
    twin.load_state_dict(model.state_dict(), strict=True)
    with nullcontext() if training else torch.no_grad():
        expected = model(images)
        with nystrom(model, num_landmarks=197) as report:
            assert report.converted == [f"encoder.{i}.self_attention" for i in (0, 1)]
            assert_close(model(images), expected)
        with nystrom(model, num_landmarks=64):
            out = model(images)
            assert_close(out, twin(images))
            assert 1e-6 < (out - expected).norm() / expected.norm() < 0.1
            if training:
                assert all(g.any() for g in gradients(model, out).values())
        assert torch.equal(model(images), expected)


def test_transformer_refuses_what_is_causal_by_name():
    model = nn.Transformer(E, H, 1, 1, 16, batch_first=True)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn: self-attention of .* causal by use"):
        convert_(model.decoder, include="*self_attn")
    convert_(model, num_landmarks=M, include="*")
    x = inputs()
    with pytest.raises(NotImplementedError, match="attn_mask is not supported with L=24, S=24 > num_landmarks=4"):
        model(x, x, memory_mask=torch.ones(L, L))
    with pytest.raises(NotImplementedError, match="attn_mask is not supported"):
        model(x, x, src_mask=nn.Transformer.generate_square_subsequent_mask(L), src_is_causal=True)


@pytest.mark.parametrize("way", ["to_empty", "assign"])
def test_conversion_on_the_meta_device(way):
    expected, x = converted(encoder()), inputs()
    with torch.device("meta"):
        model = converted(encoder())
    assert model(torch.empty(N, L, E, device="meta")).shape == (N, L, E)
    if way == "to_empty":
        model.to_empty(device="cpu")
    model.load_state_dict(encoder().state_dict(), strict=True, assign=way == "assign")
    for training in (True, False):
        with nullcontext() if training else torch.no_grad():
            assert_close(model.train(training)(x), expected.train(training)(x))
    with torch.device("meta"):
        own = NystromMultiheadAttention(E, H, conv_kernel_size=3)
    own.to_empty(device="cpu")
    own.conv.weight.data.fill_(5.0)
    own._reset_parameters()
    assert 0 < own.conv.weight.abs().max() <= 3**-0.5


def test_tied_modules_and_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.again = stock().attention
            self.other = nn.MultiheadAttention(E, H, batch_first=True)
            self.other.in_proj_weight = self.first.in_proj_weight

        def forward(self, x):
            for attention in (self.first, self.again, self.other):
                x = attention(x, x, x, need_weights=False)[0]
            return x

    model, x = Tied(), inputs()
    twin = copy.deepcopy(model)
    assert convert_(model, num_landmarks=L).converted == ["first", "other"]
    assert model.again is model.first and model.other.in_proj_weight is model.first.in_proj_weight
    assert_close(gradients(model, model(x)), gradients(twin, twin(x)))
    convert_(model, num_landmarks=M)
    assert model.again.num_landmarks == M
    revert_(model)
    assert type(model.again) is nn.MultiheadAttention and model.other.in_proj_weight is model.first.in_proj_weight
    assert Counter(map(type, model.modules()))[nn.MultiheadAttention] == 2


class Checkpointed(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, *tensors, need_weights):
        return checkpoint(self.attention, *tensors, need_weights, use_reentrant=True)


@pytest.mark.parametrize("way", ["full backward hook", "reentrant checkpoint"])
def test_self_attention_passed_on_as_three_tensors(way):
    """Padding is removed from queries where query is key, which these ways of calling hide from the module."""
    model, x, calls = constructed(), inputs().requires_grad_(), []
    expected = model(x, PADDING)
    expected_gradients = [*gradients(model, expected).values(), x.grad]
    x.grad = None
    if way == "full backward hook":
        model.attention.register_full_backward_hook(lambda *args: calls.append(way))
    else:
        model.attention.register_forward_pre_hook(lambda module, args: calls.append(args[0] is args[1]))
        model.attention = Checkpointed(model.attention)
    out = model(x, PADDING)
    assert_close(out, expected)
    assert_close([*gradients(model, out).values(), x.grad], expected_gradients)
    assert calls == ([way] if way == "full backward hook" else [True, False])


def test_hooks_of_the_user_run_in_every_regime():
    model, seen = stock(), []
    model.attention.register_forward_pre_hook(lambda module, args: seen.append("before"))
    convert_(model, num_landmarks=M)
    model.attention.register_forward_hook(lambda module, args, out: seen.append("after"))
    model.attention.out_proj.register_full_backward_hook(lambda module, *grads: seen.append("backward"))
    for length in (M, L):
        gradients(model, model(inputs()[:, :length]))
        assert seen == ["before", "after", "backward"]
        seen.clear()
