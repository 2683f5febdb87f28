"""In other people's programs: what conversion must not call converted, and what must go on working."""

import copy
import functools
import json
import math

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.export import Dim, export
from torch.testing import assert_close

from nystrom_ext import convert_, diagnose, nystrom, revert_
from nystrom_ext.modules import NystromMultiheadAttention

E, H, M, L = 8, 2, 5, 24

pytestmark = pytest.mark.filterwarnings("ignore:NystromMultiheadAttention. need_weights=True")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(E), nn.MultiheadAttention(E, H, batch_first=True)

    def forward(self, x, attn_mask=None):
        n = self.norm(x)
        return x + self.attn(n, n, n, need_weights=False, attn_mask=attn_mask)[0]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def x(length=L):
    return torch.randn(2, length, E)


# Patched modules.


class Recorder(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_accelerates_hooks_stay_and_run_what_was_converted():
    model, twin, data, hook = Block(), Block(), x(), Recorder()
    twin.load_state_dict(model.state_dict())
    stock = model(data)
    add_hook_to_module(model.attn, hook)
    assert convert_(model, num_landmarks=M).converted == ["attn"]
    convert_(twin, num_landmarks=M)
    assert torch.equal(model(data), twin(data)) and not torch.equal(model(data), stock)
    assert hook.calls == 2
    revert_(model)
    assert torch.equal(model(data), stock) and hook.calls == 3 and type(model.attn) is nn.MultiheadAttention

    convert_(model, num_landmarks=M)
    remove_hook_from_module(model.attn)  # leaves the method that it kept
    assert torch.equal(model(data), twin(data))
    convert_(model, num_landmarks=M + 1)
    revert_(model)
    assert torch.equal(model(data), stock) and hook.calls == 3
    convert_(model, num_landmarks=M)
    assert torch.equal(model(data), twin(data))


def record_weights(module):
    """The recipe for attention maps."""
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        return inner(*args, **{**kwargs, "need_weights": True})

    module.forward = forward


def checkpoint_with_partial(module):
    """As fairscale's checkpoint_wrapper."""
    module.forward = functools.partial(type(module).forward, module)


@pytest.mark.parametrize("patch", [record_weights, checkpoint_with_partial])
def test_a_patched_forward_is_not_called_converted(patch):
    model = nn.ModuleList([Block(), Block()])
    patch(model[0].attn)
    report = convert_(model, num_landmarks=M)
    assert report.converted == ["1.attn"]
    assert "its forward was replaced by" in report.skipped["0.attn"]
    assert type(model[0].attn) is nn.MultiheadAttention
    with pytest.raises(ValueError, match="its forward was replaced by"):
        convert_(model, include="0.*")


@pytest.mark.parametrize("patch", [record_weights, checkpoint_with_partial])
def test_a_patch_after_conversion_holds_back_revert(patch):
    model, data = Block(), x()
    stock = model(data)
    convert_(model, num_landmarks=M)
    out = model(data)
    patch(model.attn)
    assert torch.equal(model(data), out)
    with pytest.raises(RuntimeError, match="cannot revert 'attn', whose forward was replaced by .*first undo that"):
        revert_(model)
    assert torch.equal(model(data), out)
    del model.attn.forward
    revert_(model)
    assert torch.equal(model(data), stock)


def test_an_integrations_module_that_is_patched():
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    model = BertModel(config)
    add_hook_to_module(model.encoder.layer[0].attention.self, hook := Recorder())
    record_weights(model.encoder.layer[1].attention.self)
    report = convert_(model, num_landmarks=M)
    assert report.converted == ["encoder.layer.0.attention.self"]
    assert "its forward was replaced by" in report.skipped["encoder.layer.1.attention.self"]
    model(torch.arange(20)[None])
    assert hook.calls == 1
    revert_(model)


# Causal by a mask.


class TextTower(nn.Module):
    """As open_clip's: the mask is a buffer, and a method of its own puts it together."""

    def __init__(self, context=L):
        super().__init__()
        self.transformer, self.pool = Block(), Block()
        self.register_buffer("attn_mask", torch.full((context, context), -math.inf).triu(1), persistent=False)

    def embed(self, x):
        mask = self.attn_mask[: x.shape[1], : x.shape[1]]
        return x, mask

    def forward(self, x):
        x, mask = self.embed(x)
        return self.transformer(x, attn_mask=mask)


class TwoTowers(nn.Module):
    """As its CLIP: the buffer lies beside both towers, and only one of them is given it."""

    def __init__(self):
        super().__init__()
        self.visual, self.transformer = Block(), Block()
        self.register_buffer("attn_mask", torch.ones(L, L).triu(1).bool())

    def forward(self, image, text):
        return self.visual(image), self.transformer(text, attn_mask=self.attn_mask)


class LanguageModel(nn.Module):
    """As PyTorch's example: the mask is made at the first call."""

    def __init__(self):
        super().__init__()
        self.mask, self.encoder, self.head = None, Block(), Block()

    def make_causal_mask(self, n):
        return nn.Transformer.generate_square_subsequent_mask(n)

    def forward(self, x):
        if self.mask is None or len(self.mask) != x.shape[1]:
            mask = self.make_causal_mask(x.shape[1]).to(x.device)
            self.mask = mask
        return self.head(self.encoder(x, self.mask))


def test_attention_that_is_causal_by_its_owners_mask():
    model = nn.ModuleDict({"text": TextTower(), "clip": TwoTowers(), "lm": LanguageModel()})
    report = convert_(model, num_landmarks=M)
    assert report.converted == ["clip.visual.attn", "lm.head.attn"]
    for name in ("text.transformer.attn", "clip.transformer.attn", "lm.encoder.attn"):
        assert "causal by the mask that" in report.skipped[name]
    model["text"](x()), model["clip"](x(), x()), model["lm"](x())
    included = convert_(model, num_landmarks=M, include="clip.transformer.*", unsupported_mask="exact")
    assert included.converted == ["clip.transformer.attn"]


def test_a_square_buffer_is_not_a_causal_mask():
    model = TwoTowers()
    model.attn_mask = torch.eye(L).bool()
    assert len(convert_(model, num_landmarks=M).converted) == 2
    assert "attn  converted; refuses attn_mask beyond 5 tokens" in str(convert_(Block(), num_landmarks=M))
    assert "refuses" not in str(convert_(Block(), num_landmarks=M, unsupported_mask="exact"))


@pytest.mark.parametrize("mask", [torch.zeros(L, L), torch.zeros(L, L).bool(), torch.zeros(2 * H, L, L)])
def test_a_mask_that_masks_nothing_is_none(mask):
    model, data = Block(), x()
    convert_(model, num_landmarks=M)
    assert torch.equal(model(data, mask), model(data))
    mask = mask.clone()
    mask[..., 3, 4] = 1
    with pytest.raises(NotImplementedError, match="attn_mask is not supported"):
        model(data, mask)
    with pytest.raises(NotImplementedError):  # the hint says what the mask does not
        model.attn(data, data, data, attn_mask=torch.zeros(L, L), is_causal=True)


# PyTorch's machinery.


class Masked(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = NystromMultiheadAttention(E, H, batch_first=True, num_landmarks=M, **options)

    def forward(self, x, mask):
        return self.attn(x, x, x, key_padding_mask=mask, need_weights=False)[0]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("exported_at", [M - 2, L])
@pytest.mark.parametrize("options", [{}, {"window": 2, "pinned": 1}, {"conv_kernel_size": 3}], ids=str)
def test_exported_at_any_length_runs_at_any_other(strict, exported_at, options):
    model, n = Masked(**options).eval(), Dim("n", min=2, max=4096)
    mask = lambda n: torch.arange(n) >= torch.tensor([[n], [max(2, n // 2)]])  # noqa: E731
    args = x(exported_at), mask(exported_at)
    program = export(model, args, dynamic_shapes=({1: n}, {1: n}), strict=strict).module()
    for length in (2, M - 1, M, M + 1, L, 100):
        data, ignored = x(length), mask(length)
        out = program(data, ignored)
        assert_close(out[~ignored], model(data, ignored)[~ignored])
        assert_close(out[ignored], model.attn.out_proj.bias.expand_as(out[ignored]))


def test_torch_fx_keeps_it_as_a_leaf():
    model, data = Block(), x()
    graph = torch.fx.symbolic_trace(model)
    convert_(model, num_landmarks=M)
    ours = torch.fx.symbolic_trace(model)
    assert [(n.op, n.target) for n in ours.graph.nodes] == [(n.op, n.target) for n in graph.graph.nodes]
    assert torch.equal(ours(data), model(data))
    prepared = prepare_fx(copy.deepcopy(model).eval(), get_default_qconfig_mapping(), (data,))
    assert isinstance(prepared.attn, NystromMultiheadAttention) and prepared(data).isfinite().all()


# Weights that nobody reads.


def test_need_weights_never():
    model, data = nn.MultiheadAttention(E, H, batch_first=True), x()
    report = convert_(model, num_landmarks=M, need_weights="never")
    assert "need_weights='never'" in str(report)
    out, weights = model(data, data, data)
    assert weights is None and model(data[:, :3], data[:, :3], data[:, :3])[1] is None
    convert_(model, num_landmarks=M)
    again, weights = model(data, data, data)
    assert torch.equal(again, out) and weights.shape == (2, L, L)
    with pytest.raises(ValueError, match='need_weights must be "on_request" or "never", got False'):
        convert_(model, need_weights=False)


# Advice.


@pytest.mark.parametrize("call", [convert_, revert_, lambda x: diagnose(x, None), lambda x: nystrom(x).__enter__()])
@pytest.mark.parametrize("given", ["text", None, 3, nn.Linear])
def test_what_is_no_model(call, given):
    with pytest.raises(TypeError, match=f"takes an nn.Module, got {type(given).__name__}"):
        call(given)


# What a stranger tripped over.


def test_patterns_that_mean_nothing_are_refused():
    model = nn.ModuleList([Block(), Block()])
    for arguments in ({"exclude": "lyaer.0.*"}, {"include": ["0.*", "lyaer.*"]}, {"include": nn.Linear}):
        with pytest.raises(ValueError, match="which matches none of the attention modules 0.attn, 1.attn"):
            convert_(model, **arguments)
        convert_(model, strict=False, **arguments)
        revert_(model)


def test_a_shared_module_is_meant_by_any_of_its_names():
    model = nn.ModuleList([Block(), Block()])
    model[1].attn = model[0].attn
    with pytest.raises(ValueError, match="0.attn: in exclude"):
        convert_(model, exclude="1.*")
    assert convert_(model, include="1.*").converted == ["0.attn"]
    assert convert_(model, options_for={"1.*": {"window": 2}}).options["options_for"] == {"0.attn": {"window": 2}}


def test_a_patched_class_is_not_called_converted(monkeypatch):
    inner = nn.MultiheadAttention.forward
    monkeypatch.setattr(nn.MultiheadAttention, "forward", lambda self, *args, **kwargs: inner(self, *args, **kwargs))
    with pytest.raises(ValueError, match="nn.MultiheadAttention.forward was replaced by <lambda>"):
        convert_(Block())


def test_what_was_converted_only_because_it_was_named_says_so():
    model = nn.Transformer(E, H, 1, 1, 16, batch_first=True)
    report = convert_(model, include="*")
    assert "named in include: cross-attention of nn.TransformerDecoderLayer" in str(report)
    assert "multihead_attn" in "".join(report.notes) and json_able(report.to_dict())


def json_able(x):
    return json.loads(json.dumps(x)) == x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_left_alone():
    model = nn.ModuleList([torch.jit.script(nn.MultiheadAttention(E, H, batch_first=True)), Block()])
    assert convert_(model).converted == ["1.attn"]


@pytest.mark.parametrize("need_weights", [True, False])
def test_export_with_a_dynamic_batch(need_weights):
    model = NystromMultiheadAttention(E, H, batch_first=True, num_landmarks=M).eval()
    B, n = Dim("B", min=1, max=64), Dim("n", min=2, max=4096)
    args = (x(), x().bool().new_zeros(2, L))

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = model

        def forward(self, x, mask):
            return self.attn(x, x, x, key_padding_mask=mask, need_weights=need_weights)

    program = export(Program(), args, dynamic_shapes=({0: B, 1: n}, {0: B, 1: n})).module()
    for batch, length in ((1, 3), (5, 40)):
        data, mask = torch.randn(batch, length, E), torch.arange(length).expand(batch, -1) >= length - 1
        actual, expected = program(data, mask), model(data, data, data, mask, need_weights)
        assert_close(actual[0][~mask], expected[0][~mask])
        if need_weights:
            assert_close(actual[1][~mask], expected[1][~mask])
