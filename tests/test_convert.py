"""Conversion of models in place, its report, and the way back."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from torch import nn

from nystrom_ext.convert import convert_, nystrom, revert_
from nystrom_ext.modules import NystromMultiheadAttention

E, H = 8, 2

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H)
        self.mlp = nn.Linear(E, E)


class Special(nn.MultiheadAttention):
    pass


def zoo():
    """One of everything that conversion meets."""
    model = nn.ModuleDict(
        {
            "encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, batch_first=True), 2),
            "decoder": nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 16), 1),
            "block": Block(),
            "special": Special(E, H),
        }
    )
    model["tied"] = model["block"]
    return model


ALL = [
    "encoder.layers.0.self_attn",
    "encoder.layers.1.self_attn",
    "block.attention",
]
NEVER = {
    "decoder.layers.0.self_attn": "causal",
    "decoder.layers.0.multihead_attn": "name it in include",
    "special": "Special is a subclass",
}


def snapshot(model):
    """Class and attributes of every module, with parameters, submodules and hooks by identity."""
    return {
        name: (type(m), {key: dict(x) if isinstance(x, dict) else x for key, x in vars(m).items()})
        for name, m in model.named_modules()
    }


def test_converts_in_place_and_changes_nothing_else():
    model = zoo().eval()
    model["block"].attention.train()
    model["block"].attention.register_forward_hook(hook := lambda module, args, out: None)
    model["block"].attention.in_proj_weight.requires_grad_(False)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    report = convert_(model, num_landmarks=5, unsupported_mask="exact")

    assert report.converted == ALL
    assert report.skipped.keys() == NEVER.keys()
    assert all(reason in report.skipped[name] for name, reason in NEVER.items())
    for name, module in model.named_modules():
        assert isinstance(module, NystromMultiheadAttention) == (name in ALL)
    attention = model.get_submodule("block.attention")
    assert (attention.num_landmarks, attention.pinv_iterations, attention.unsupported_mask) == (5, 6, "exact")
    assert attention.training and not model.get_submodule(ALL[0]).training
    assert hook in attention._forward_hooks.values()
    assert model["tied"].attention is attention
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert not model["encoder"].use_nested_tensor


def test_converted_module_computes_what_a_constructed_one_does():
    model = nn.MultiheadAttention(E, H)  # the root itself
    twin = NystromMultiheadAttention(E, H, num_landmarks=4)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert convert_(model, num_landmarks=4).converted == [""]
    x = torch.randn(20, 3, E)
    assert torch.equal(model(x, x, x, need_weights=False)[0], twin(x, x, x, need_weights=False)[0])
    assert repr(model) == repr(twin)


def test_revert_is_exact():
    model = zoo()
    model["block"].attention.register_forward_pre_hook(lambda module, args: None)
    before, values = snapshot(model), copy.deepcopy(model.state_dict())
    convert_(model)
    assert snapshot(model) != before
    revert_(model)
    assert snapshot(model) == before
    assert all(torch.equal(p, values[name]) for name, p in model.state_dict().items())
    revert_(model)  # nothing left to do
    assert snapshot(model) == before


def test_revert_of_copies():
    model = zoo()
    before = str(model)
    convert_(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        revert_(other)
        assert str(other) == before and other["encoder"].use_nested_tensor
        assert not other.get_submodule(ALL[0])._forward_pre_hooks
    assert not model["encoder"].use_nested_tensor


def test_revert_leaves_constructed_modules():
    own = NystromMultiheadAttention(E, H, num_landmarks=7, conv_kernel_size=3)
    model = nn.ModuleList([own, nn.MultiheadAttention(E, H)])
    for options in ({"num_landmarks": 9}, {"num_landmarks": 11, "window": 2}):
        assert convert_(model, **options).converted == ["0", "1"]
    assert own.num_landmarks == 11 and own.window == 2 and own.conv is not None
    revert_(copy.deepcopy(model))
    with nystrom(model, num_landmarks=13):
        assert own.num_landmarks == 13
    assert own.num_landmarks == 11
    revert_(model)
    assert type(own) is NystromMultiheadAttention and type(model[1]) is nn.MultiheadAttention
    assert (own.num_landmarks, own.window) == (7, 0)
    before = snapshot(model)
    with nystrom(model, num_landmarks=13):
        pass
    assert snapshot(model) == before


def test_revert_refuses_what_changed_since():
    model = nn.Sequential(nn.MultiheadAttention(E, H), nn.MultiheadAttention(E, H))
    convert_(model)
    model[1].__class__ = type("Changed", (NystromMultiheadAttention,), {})
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="cannot revert .1., whose class became Changed after conversion"):
        revert_(model)
    assert snapshot(model) == before  # nothing done by half


def test_idempotent_and_updating():
    model = zoo()
    before = snapshot(model)
    convert_(model, num_landmarks=5, coefficient="global", window=3, pinned=1)
    once = snapshot(model)
    report = convert_(model, num_landmarks=5, coefficient="global", window=3, pinned=1)
    assert report.converted == ALL and "window=3, pinned=1" in str(report)
    assert snapshot(model) == once
    convert_(model, num_landmarks=8)
    options = {(m.num_landmarks, m.coefficient, m.window, m.pinned) for m in map(model.get_submodule, ALL)}
    assert options == {(8, "per_head", 0, 0)}
    revert_(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "filters, expected",
    [
        ({"include": "encoder.*"}, ALL[:2]),
        ({"include": ["*.1.self_attn", "block.*"]}, [ALL[1], ALL[2]]),
        ({"include": nn.TransformerEncoder}, ALL[:2]),
        ({"include": (Block, "*.1.self_attn")}, [ALL[1], ALL[2]]),
        ({"exclude": "encoder.*"}, ALL[2:]),
        ({"exclude": [nn.TransformerEncoderLayer, nn.TransformerDecoder]}, [ALL[2]]),
        ({"include": nn.TransformerEncoder, "exclude": "*.0.*"}, [ALL[1]]),
        ({"filter_fn": lambda module, name: module.batch_first and name.endswith("0.self_attn")}, [ALL[0]]),
        ({"include": nn.MultiheadAttention}, [*ALL[:2], "decoder.layers.0.multihead_attn", ALL[2]]),
    ],
)
def test_filters(filters, expected):
    model = zoo()
    report = convert_(model, **filters)
    assert report.converted == expected
    assert {*report.converted} | {*report.skipped} == {*ALL, *NEVER}
    for name in {*ALL} - {*expected}:
        assert report.skipped[name] in ("not in include", "in exclude", "filter_fn returned False")
        assert type(model.get_submodule(name)) is nn.MultiheadAttention
    assert model["encoder"].use_nested_tensor == (not any("encoder" in name for name in expected))


def test_strict():
    model = zoo()
    with pytest.raises(
        ValueError, match="include has 'nothing', which matches none of the attention modules"
    ) as caught:
        convert_(model, include="nothing")
    assert all(name in str(caught.value) for name in (*ALL, *NEVER))
    report = convert_(model, include="nothing", strict=False)
    assert report.converted == [] and len(report.skipped) == 6

    class Unknown(nn.Sequential):
        """A model whose attention is its own."""

    unknown = Unknown(nn.Linear(2, 6), nn.Softmax(-1), nn.Linear(6, 2))
    for model, found in ((unknown, "Unknown, 0"), (nn.Linear(2, 2), "Linear, 0"), (Special(E, H), "Special, 1")):
        before, values = snapshot(model), copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=f"nothing to convert in {found} nn.MultiheadAttention found"):
            convert_(model)
        assert convert_(model, strict=False).converted == []
        assert snapshot(model) == before
        assert all(torch.equal(p, values[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize(
    "bad",
    [
        {"num_landmarks": 0},
        {"coefficient": "x"},
        {"window": -1},
        {"pinned": None},
        {"conv_kernel_size": 3},
        {"landmarks": 3},
        {"options_for": {"block.*": {}, "encoders.*": {}}},
        {"options_for": {"*": 32}},
        {"options_for": lambda module, name: module},
    ],
)
def test_bad_options_change_nothing(bad):
    model = zoo()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        convert_(model, **bad)
    with pytest.raises((ValueError, TypeError)), nystrom(model, **bad):
        pass
    assert snapshot(model) == before


def test_a_window_is_not_for_modules_with_added_keys():
    model = nn.ModuleList([nn.MultiheadAttention(E, H, add_zero_attn=True), nn.MultiheadAttention(E, H)])
    report = convert_(model, window=3)
    assert report.converted == ["1"] and "as many keys as queries" in report.skipped["0"]
    assert convert_(model, num_landmarks=9).converted == ["0", "1"]


def test_the_report_of_numpys_integers_is_json():
    options = {"num_landmarks": np.int64(8), "options_for": {"0": {"window": np.int64(3)}, "1": {"pinned": 2}}}
    model = nn.ModuleList([nn.MultiheadAttention(E, H), nn.MultiheadAttention(E, H, add_zero_attn=True)])
    found = json.loads(json.dumps(convert_(model, **options).to_dict()))
    assert found["options"]["num_landmarks"] == 8 and found["options"]["options_for"] == {"0": {"window": 3}}


def test_an_unknown_option_is_named_with_the_known_ones():
    with pytest.raises(TypeError, match="there is no option 'landmarks'; there are num_landmarks, pinv_iterations, "):
        convert_(zoo(), landmarks=3)


@pytest.mark.parametrize("bad", [{"num_landmarks": 0}, {"conv_kernel_size": 3}, {"landmarks": 3}])
def test_bad_options_of_one_layer_change_nothing(bad):
    model = zoo()
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        convert_(model, options_for={"block.*": bad})
    assert snapshot(model) == before


PER_LAYER = {
    "encoder.layers.0.*": None,
    "encoder.*": {"num_landmarks": 3, "window": 2},
    nn.TransformerEncoder: {"num_landmarks": 1},  # never reached: the first pattern that matches counts
}


@pytest.mark.parametrize(
    "options_for",
    [PER_LAYER, lambda module, name: {ALL[0]: None, ALL[1]: PER_LAYER["encoder.*"]}.get(name, {})],
    ids=["patterns", "function"],
)
def test_options_of_single_layers(options_for):
    model = zoo()
    report = convert_(model, num_landmarks=5, pinned=1, options_for=options_for)
    assert report.converted == ALL[1:] and report.skipped[ALL[0]] == "options_for gives None"
    assert type(model.get_submodule(ALL[0])) is nn.MultiheadAttention
    layer, block = (model.get_submodule(name) for name in ALL[1:])
    assert (layer.num_landmarks, layer.window, layer.pinned) == (3, 2, 1)
    assert (block.num_landmarks, block.window, block.pinned) == (5, 0, 1)

    lines = str(report).splitlines()
    assert any(
        line.endswith(" converted (num_landmarks=3, window=2); refuses attn_mask beyond 3 tokens") for line in lines
    )
    assert "num_landmarks=5" in lines[-1] and "window=0" in lines[-1]
    data, again = json.loads(json.dumps(report.to_dict())), zoo()
    assert convert_(again, **data["options"]).options == data["options"]
    assert str(again) == str(model)
    with nystrom(model, options_for=options_for):
        assert model.get_submodule(ALL[1]).num_landmarks == 3
    assert (layer.num_landmarks, layer.window, layer.pinned) == (3, 2, 1)


def test_report():
    model = zoo()
    report = convert_(model, num_landmarks=5, exclude=nn.TransformerEncoder)
    lines = str(report).splitlines()
    assert len(lines) == 7
    assert "1 converted, 5 skipped (num_landmarks=5" in lines[-1]
    assert any(line.split() == "block.attention converted; refuses attn_mask beyond 5 tokens".split() for line in lines)
    assert any(line.startswith("encoder.layers.0.self_attn ") and "skipped: in exclude" in line for line in lines)
    assert "(the model itself)" in str(convert_(nn.MultiheadAttention(E, H)))

    data = json.loads(json.dumps(report.to_dict()))
    again = zoo()
    repeated = convert_(again, **data["options"])
    assert (repeated.converted, repeated.options) == (data["converted"], data["options"])
    assert {*repeated.skipped} == {*data["skipped"]}  # for another reason: the options select by name
    assert str(again) == str(model)


def test_report_reproduces_odd_names_and_empty_conversions():
    model = nn.ModuleDict({"a[0]*": nn.MultiheadAttention(E, H), "a0": nn.MultiheadAttention(E, H)})
    options = convert_(model, filter_fn=lambda module, name: "[" in name).to_dict()["options"]
    revert_(model)
    assert convert_(model, **options).converted == ["a[0]*"]
    root = nn.MultiheadAttention(E, H)
    options = convert_(root).to_dict()["options"]
    revert_(root)
    assert convert_(root, **options).converted == [""]
    options = convert_(zoo(), include=(), strict=False).to_dict()["options"]
    assert convert_(zoo(), **options).converted == []


def test_context_manager():
    model = zoo()
    before = snapshot(model)
    with nystrom(model, num_landmarks=5, include="encoder.*") as report:
        assert report.converted == ALL[:2]
        assert model.get_submodule(ALL[0]).num_landmarks == 5
    assert snapshot(model) == before
    with pytest.raises(KeyError), nystrom(model):
        raise KeyError
    assert snapshot(model) == before


def test_context_manager_within_a_conversion():
    model = zoo()
    before = snapshot(model)
    convert_(model, num_landmarks=5, include="encoder.*")
    inside = snapshot(model)
    with nystrom(model, num_landmarks=7, coefficient="global"):
        assert model.get_submodule(ALL[0]).num_landmarks == 7
        assert isinstance(model["block"].attention, NystromMultiheadAttention)
    assert snapshot(model) == inside
    revert_(model)
    assert snapshot(model) == before
    with nystrom(model):
        revert_(model)
    assert snapshot(model) == before


def test_optimizer_keeps_working():
    model = nn.Sequential(nn.MultiheadAttention(E, H))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    x = torch.randn(20, E)
    for step in (lambda: None, lambda: convert_(model, num_landmarks=4), lambda: revert_(model)):
        step()
        before = model[0].in_proj_weight.clone()
        model[0](x, x, x, need_weights=False)[0].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(model[0].in_proj_weight, before)


def test_checkpoints_load_either_way():
    stock, converted = zoo(), zoo()
    convert_(converted)
    converted.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(converted.state_dict(), strict=True)


def test_meta_device():
    with torch.device("meta"):
        model = zoo()
    assert convert_(model).converted == ALL
    assert all(p.is_meta for p in model.parameters())


def test_cross_attention_of_a_decoder_is_converted_on_request_only():
    """Beyond m targets it would let a target see later ones: harmless only where the decoder may see those anyway."""
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(E, H, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerDecoder(layer, 1).eval()
    memory, early = torch.randn(1, 40, E), torch.randn(1, 10, E)
    targets = [torch.cat([early, torch.randn(1, 20, E)], 1) for _ in range(2)]
    causal = nn.Transformer.generate_square_subsequent_mask(30)

    def leak():
        one, other = (model(x, memory, tgt_mask=causal)[:, :10] for x in targets)
        return (one - other).abs().max()

    report = convert_(model, num_landmarks=8, strict=False)
    assert not report.converted and "name it in include" in report.skipped["layers.0.multihead_attn"]
    assert leak() < 1e-6
    report = convert_(model, num_landmarks=8, include="*.multihead_attn")
    assert report.converted == ["layers.0.multihead_attn"]
    assert convert_(model, num_landmarks=8).converted == ["layers.0.multihead_attn"]  # idempotent
    assert leak() > 1e-4
