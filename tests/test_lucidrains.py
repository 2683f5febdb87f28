"""Models around lucidrains' nystrom-attention, the package's or a copy of its file: convert_ and back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from compat_problems import f64, keep_mask
from mil_models import TransMIL, package, vendored
from torch import nn
from torch.testing import assert_close

from nystrom_ext import convert_, nystrom, nystrom_attention, revert_
from nystrom_ext.compat.lucidrains import NystromAttention
from nystrom_ext.integrations import lucidrains as integration

LAYERS = ["layer1.attn", "layer2.attn"]
SIZES = {"dim": 8, "dim_head": 4, "heads": 2, "num_landmarks": 8}


def bag(n=70, features=12):
    torch.manual_seed(5)
    return torch.randn(1, n, features, dtype=f64)


def transmil(attention, **sizes):
    torch.manual_seed(0)
    return TransMIL(attention, **sizes).double().eval()


def state(module):
    return {name: (type(m), set(vars(m)), dict(m._parameters)) for name, m in module.named_modules()}


@pytest.mark.parametrize("source", ["package", "copy"])
def test_transmil(source, fused_calls):
    model = transmil((package() if source == "package" else vendored()).NystromAttention)
    expected, before, keys = model(bag()), state(model), list(model.state_dict())
    expected_weights = model(bag(), return_attn=True)[1]
    report = convert_(model)
    assert report.converted == LAYERS and not report.skipped
    assert "converted (num_landmarks=16, pinv_iterations=6, coefficient='global')" in str(report)
    assert list(model.state_dict()) == keys
    fused_calls.clear()  # of the trials
    assert_close(model(bag()), expected)
    assert len(fused_calls) == 2
    logits, weights = model(bag(), return_attn=True)  # by the module's own forward
    assert_close(logits, expected)
    assert_close(weights, expected_weights)
    for again in (convert_(model), convert_(model, **report.to_dict()["options"])):
        assert again.converted == LAYERS and again.options["options_for"] == report.options["options_for"]
    revert_(model)
    assert state(model) == before
    with nystrom(model):
        assert_close(model(bag()), expected)
    assert state(model) == before


def test_training_steps_are_the_packages():
    models = [transmil(package().NystromAttention).train() for _ in range(2)]
    convert_(models[1])
    for model in models:
        torch.manual_seed(1)  # dropout
        model(bag()).square().sum().backward()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9)


def test_the_layout_of_mil_lab(fused_calls):
    """4 heads of 128 features, 256 landmarks, inside a PreTrainedModel, in float32."""
    transformers = pytest.importorskip("transformers")

    class Wrapped(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.model = TransMIL(package().NystromAttention, features=16, dim=512, heads=4)
            self.forward = self.model.forward

    torch.manual_seed(0)
    model = Wrapped(transformers.PretrainedConfig()).eval()
    x = bag(600, 16).float()
    with torch.no_grad():
        expected = model(x)
        report = convert_(model)
        assert report.converted == [f"model.{name}" for name in LAYERS] and not report.skipped
        fused_calls.clear()  # of the trials
        assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert [call["num_landmarks"] for call in fused_calls] == [256, 256]


def test_options_of_the_user_count():
    module = package().NystromAttention(**SIZES).double()
    x = bag(43, 8)
    convert_(module, num_landmarks=5, pinv_iterations=3)
    theirs = package().NystromAttention(**{**SIZES, "num_landmarks": 5, "pinv_iterations": 3}).double()
    theirs.load_state_dict(module.state_dict())
    assert_close(module(x), theirs(x))
    report = convert_(module, options_for={"": {"num_landmarks": 6}})
    assert report.options["options_for"] == {"": {"num_landmarks": 6, "pinv_iterations": 6, "coefficient": "global"}}
    module.nystrom_options = None  # as before any conversion
    report = convert_(nn.ModuleList([module, nn.MultiheadAttention(8, 2)]))
    assert report.options["num_landmarks"] == 64 and module.nystrom_options.num_landmarks == 8


@pytest.mark.parametrize("options", [{"window": 2}, {"pinned": 1}, {"coefficient": "per_head"}])
def test_what_the_package_lacks_makes_it_this_projects(options):
    """No zeros in front, no effect of padding."""
    module = package().NystromAttention(**SIZES).double()
    x, mask = bag(43, 8), torch.arange(43)[None] < 30
    assert convert_(module, **options).options["options_for"][""]["num_landmarks"] == 8
    out = module(x, mask)
    q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in module.to_qkv(x[:, :30]).chunk(3, -1))
    taps = module.res_conv.weight[:, 0, :, 0]
    options = {"coefficient": "global", **options}
    own = nystrom_attention(q, k, v, num_landmarks=8, conv_weight=taps, **options)
    assert_close(out[:, :30], module.to_out(own.transpose(1, 2).flatten(2)))
    assert_close(out[:, 30:], module.to_out[0].bias.expand(1, 13, -1))


def test_our_own_class_takes_options_too():
    module = NystromAttention(**SIZES, padding="ours").double()
    x = bag(43, 8)
    before = module(x)
    assert convert_(module).options["options_for"][""]["coefficient"] == "per_head"
    assert torch.equal(module(x), before)
    with nystrom(module, window=2):
        assert not torch.equal(module(x), before)
    convert_(module, coefficient="global", num_landmarks=50)
    exact = module(x)
    module.num_landmarks = 50
    revert_(module)
    assert torch.equal(module(x), exact) and module.nystrom_options is None


# Copies that were edited

FIRST_ROW = ("attn = attn1 @ attn2_inv @ attn3", "attn = (attn1[:, :, -n:][:, :, :1] @ attn2_inv @ attn3)[..., -n:]")
REFUSED = {
    "no convolution": ("out = out + self.res_conv(v)", "pass"),
    "other landmarks": (
        "b, n, _, h, m, iters",
        "self.num_landmarks = min(x.shape[1] // 2, self.num_landmarks); b, n, _, h, m, iters",
    ),
    "scores doubled": ("q = q * self.scale", "q = 2 * q * self.scale"),
    "constant of each matrix": ("(torch.max(col) * torch.max(row))", "col.amax(-1)[..., None, None]"),
    "dropout of the weights": ("attn2_inv = moore", "attn1 = F.dropout(attn1, 0.1, self.training); attn2_inv = moore"),
    "padding behind": ("(0, 0, padding, 0)", "(0, 0, 0, padding)"),
}


@pytest.mark.parametrize("edit", REFUSED)
def test_copies_that_compute_something_else_stay(edit):
    model = transmil(vendored(REFUSED[edit]).NystromAttention)
    with pytest.raises(ValueError, match=r"layer1.attn: project.transmil.NystromAttention was edited: it does not"):
        convert_(model)
    model.eval()
    assert convert_(model, strict=False).converted == []
    both = nn.ModuleList([model, transmil(package().NystromAttention)])
    assert convert_(both).converted == [f"1.{name}" for name in LAYERS]


def test_a_copy_that_fails_stays():
    model = vendored(("einops_eq = '... i d, ... j d -> ... i j'", "einops_eq = nowhere")).NystromAttention(**SIZES)
    with pytest.raises(ValueError, match="fails on a few tokens: NameError"):
        convert_(model)


def test_other_results_are_left_to_the_copy():
    """Attention of the class token alone, as many forks return it."""
    model = transmil(vendored(FIRST_ROW).NystromAttention)
    expected = model(bag(), return_attn=True)
    assert expected[1].shape == (1, 4, 1, 82)
    assert convert_(model).converted == LAYERS
    for a, b in zip(model(bag(), return_attn=True), expected, strict=True):
        assert_close(a, b)
    convert_(model, num_landmarks=9)
    model(bag())
    message = (
        r"FusedNystromAttention: return_attn=True is left to the forward of NystromAttention, which has num_landmarks"
    )
    with pytest.raises(NotImplementedError, match=message + r"=16, .* convert without them, or revert_"):
        model(bag(), return_attn=True)
    convert_(model, need_weights="never")
    assert model(bag(), return_attn=True)[1] is None


@pytest.mark.parametrize("masks", ["fail", "mean something else"])
def test_masks_of_a_copy(masks):
    """The copy in MHIM-MIL fails with a mask; another takes True for padding."""
    edits = {
        "fail": ("sim1.masked_fill_(", "nowhere.masked_fill_("),
        "mean something else": ("# pad so that", "mask = None if mask is None else ~mask\n        # pad so that"),
    }
    module = vendored(edits[masks]).NystromAttention(**SIZES).double()
    x, mask = bag(43, 8), keep_mask(43)[:1]
    plain, masked = module(x), None if masks == "fail" else module(x, mask)
    convert_(module)
    assert_close(module(x), plain)
    if masks == "fail":
        with pytest.raises(NameError):
            module(x, mask)
    else:
        assert_close(module(x, mask), masked)
    convert_(module, num_landmarks=9)
    with pytest.raises(NotImplementedError, match="a mask is left to the forward of NystromAttention"):
        module(x, mask)


@pytest.mark.parametrize("first", [True, False])
def test_masks_that_an_attribute_turns_round(first):
    edit = "mask = ~mask if exists(mask) and getattr(self, 'turned', False) else mask\n        # pad so that"
    cls = vendored(("# pad so that", edit)).NystromAttention
    model = nn.ModuleList([cls(**SIZES).double() for _ in range(2)])
    model[0].turned, model[1].turned = first, not first
    x, mask = bag(43, 8), keep_mask(43)[:1]
    expected = [module(x, mask) for module in model]
    convert_(model)
    for module, result in zip(model, expected, strict=True):
        assert_close(module(x, mask), result)


def test_subclasses():
    class Same(package().NystromAttention):
        pass

    class Louder(package().NystromAttention):
        def forward(self, x, mask=None, **arguments):
            return 2 * super().forward(x, mask, **arguments)

    model = nn.ModuleList([cls(**SIZES).double() for cls in (package().NystromAttention, Same, Louder)])
    x = bag(43, 8)
    expected = [module(x) for module in model]
    report = convert_(model)
    assert report.converted == ["0", "1"] and "was edited" in report.skipped["2"]
    for module, result in zip(model, expected, strict=True):
        assert_close(module(x), result)
    revert_(model)
    assert [type(module).__name__ for module in model] == ["NystromAttention", "Same", "Louder"]


def test_the_layout_of_torchmil():
    """As torchmil writes it; the package itself is tested by test_torchmil.py."""

    class Att(vendored().NystromAttention):
        def __init__(self, dim, heads, landmarks, learn):
            nn.Module.__init__(self)
            self.n_heads, self.n_landmarks, self.pinv_iterations, self.eps = heads, landmarks, 6, 1e-8
            self.scale_factor = 4**-0.5
            self.qkv_nn = nn.Linear(dim, 3 * dim, bias=False) if learn else None
            self.out_proj = nn.Identity()

        def forward(self, x, mask=None, return_att=False):
            same = nn.Identity() if self.qkv_nn is not None else lambda x: x.repeat(1, 1, 3)
            names = {"heads": self.n_heads, "num_landmarks": self.n_landmarks, "scale": self.scale_factor}
            inner = copy.copy(self)
            vars(inner).update(names, residual=False)
            inner.__dict__["to_qkv"] = self.qkv_nn if self.qkv_nn is not None else same
            inner.__dict__["to_out"] = self.out_proj
            return super(Att, inner).forward(x, mask, return_att)

    for learn in (True, False):
        module = Att(8, 2, 8, learn).double()
        x, mask = bag(43, 8), keep_mask(43)[:1]
        plain, masked, weights = module(x), module(x, mask), module(x, return_att=True)[1]
        convert_(module)
        assert_close(module(x), plain)
        assert_close(module(x, mask=mask), masked, rtol=1e-6, atol=1e-6)
        assert_close(module(x, return_att=True)[1], weights)


def test_survpath_is_refused_by_name():
    class MMAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_pathways, self.heads = 3, 2
            self.to_qkv = nn.Linear(8, 24, bias=False)

        def forward(self, x, mask=None, return_attn=False):
            return x

    with pytest.raises(ValueError, match=r"exact attention of pathways .* \(SurvPath\), already linear in the patches"):
        convert_(MMAttention())


def test_other_modules_with_such_names_are_none_of_it():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_qkv, self.to_out, self.heads, self.scale = nn.Linear(8, 24), nn.Linear(8, 8), 2, 0.5

        def forward(self, x, mask=None):
            return x

    assert integration.find({"": Attention()}) == {}


# Machinery


def test_copies_and_pickles():
    model = nn.Sequential(package().NystromAttention(**SIZES)).double()
    convert_(model, num_landmarks=5)
    x = bag(43, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is type(model[0]) and other[0].to_qkv is not model[0].to_qkv
        assert torch.equal(other(x), model(x))
        revert_(other)
        assert type(other[0]) is package().NystromAttention and "nystrom_options" not in vars(other[0])


def test_conversion_draws_no_random_numbers_and_asks_no_device():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    module = package().NystromAttention(**SIZES)
    torch.manual_seed(3)
    with torch.device("meta"):
        elsewhere = package().NystromAttention(**SIZES)
        convert_(elsewhere)
    convert_(module)
    assert torch.equal(torch.rand(3), expected)
    assert elsewhere.to_qkv.weight.is_meta and elsewhere.training


def test_parametrized_and_hooked_modules():
    model = nn.Sequential(package().NystromAttention(**SIZES).double())
    nn.utils.parametrizations.weight_norm(model[0].to_qkv)
    nn.utils.parametrizations.weight_norm(model[0].res_conv)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    x = bag(43, 8)
    expected = model(x)
    convert_(model)
    assert_close(model(x), expected)
    assert len(calls) == 2


def test_compiled():
    torch.compiler.reset()
    module = package().NystromAttention(**SIZES).double()
    x, mask = bag(43, 8), keep_mask(43)[:1]
    expected, masked = module(x), module(x, mask)
    convert_(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), expected)
    assert_close(compiled(x, mask=mask), masked, rtol=1e-6, atol=1e-6)


def test_refused_options():
    module = package().NystromAttention(**SIZES)
    with pytest.raises(ValueError, match="lucidrains' attention is always self-attention"):
        convert_(module, self_attention=False)
    assert type(module) is package().NystromAttention
    convert_(module)
    with pytest.raises(NotImplementedError, match="torch.jit.script does not support FusedNystromAttention"):
        torch.jit.script(module)
