"""Conversion among what users have around their models: adapters, pruning, parametrizations, sharding, compilation."""

import copy
import os
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.distributed
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from nystrom_ext import NystromMultiheadAttention, convert_, nystrom, revert_

E, H, N, L, M = 8, 2, 4, 24, 4

PADDING = torch.arange(L) >= torch.tensor([24, 9, 17, 3])[:, None]

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),
    pytest.mark.filterwarnings("ignore:NystromMultiheadAttention. need_weights=True costs"),
]
regimes = pytest.mark.parametrize("num_landmarks", [L, M], ids=["exact", "nystrom"])


def randomise(module):
    for p in module.parameters():  # biases start at zero, which would hide mistakes
        nn.init.uniform_(p, -0.7, 0.7)
    return module


class Net(nn.Module):
    def __init__(self, attention=None):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=True) if attention is None else attention
        self.head = nn.Linear(E, 2)

    def forward(self, x, padding=None):
        return self.head(self.attention(x, x, x, padding, need_weights=False)[0].square().mean(1))


def stock(seed=0):
    torch.manual_seed(seed)
    return randomise(Net())


def converted(model, num_landmarks=M):
    convert_(model, num_landmarks=num_landmarks)
    return model


def constructed(num_landmarks=M, state=None):
    model = Net(NystromMultiheadAttention(E, H, batch_first=True, num_landmarks=num_landmarks))
    model.load_state_dict(stock().state_dict() if state is None else state, strict=True)
    return model


def encoder():
    torch.manual_seed(0)
    return randomise(nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True), 2))


def inputs():
    return torch.randn(N, L, E, generator=torch.Generator().manual_seed(2))


def gradients(model, out):
    """Of a loss that no normalisation makes constant, by parameter name."""
    model.zero_grad()
    (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def effective(model):
    """The state_dict of a plain Net with the weights that ``model`` computes with."""
    a = model.attention
    weights = {"in_proj_weight": a.in_proj_weight, "in_proj_bias": a.in_proj_bias}
    weights |= {"out_proj.weight": a.out_proj.weight, "out_proj.bias": a.out_proj.bias}
    state = {f"attention.{name}": w.detach().clone() for name, w in weights.items()}
    return state | {f"head.{name}": p for name, p in model.head.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------- PEFT


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


# ----------------------------------------------------------------------------------------- pruning and parametrizations


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


# ---------------------------------------------------------------------------------------------------------- distributed


@regimes
@pytest.mark.parametrize(
    "kwargs", [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 5, "vdim": 7}, {"conv_kernel_size": 3}], ids=str
)
@pytest.mark.parametrize("static_graph", [False, True])
def test_ddp_meets_no_unused_parameters(kwargs, num_landmarks, static_graph, process_group):
    attention = NystromMultiheadAttention(E, H, batch_first=True, num_landmarks=num_landmarks, **kwargs)
    model = DistributedDataParallel(randomise(attention), static_graph=static_graph)
    query, key, value = inputs(), torch.randn(N, L, kwargs.get("kdim", E)), torch.randn(N, L, kwargs.get("vdim", E))
    for need_weights in (False, True, False):  # DDP complains one step late
        out, _ = model(query, key, value, need_weights=need_weights)
        assert {*gradients(model, out)} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("order", ["converted first", "sharded first"])
def test_fsdp_of_the_attention_itself(order, process_group):
    """FSDP2 derives a class for the module it shards. A layer around the attention: test_encoder.py."""
    model, x = stock(), inputs().requires_grad_()
    if order == "converted first":
        convert_(model, num_landmarks=M)
    fully_shard(model.attention)
    fully_shard(model)
    convert_(model, num_landmarks=M)
    assert isinstance(model.attention, NystromMultiheadAttention) and isinstance(model.attention, FSDPModule)
    out, reference = model(x, PADDING), constructed()
    expected = reference(x, PADDING)
    assert_close(out, expected)
    grads = {name: g.full_tensor() for name, g in gradients(model, out).items()}
    assert_close(grads, gradients(reference, expected))
    revert_(model)
    assert not isinstance(model.attention, NystromMultiheadAttention) and isinstance(model.attention, FSDPModule)
    assert_close(model(x), stock()(x))


def two_processes(rank, path):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    reference, x = converted(encoder()), inputs()
    mine = slice(rank * N // 2, (rank + 1) * N // 2)
    cotangent = torch.linspace(-1, 2, N * L * E).view(N, L, E)

    def grads_of(model, samples):
        out = model(x[samples], src_key_padding_mask=PADDING[samples])
        (out * cotangent[samples]).sum().backward()
        grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
        return out, {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}

    def sharded(model):
        for layer in model.layers:
            fully_shard(layer.self_attn)
            fully_shard(layer)
        return fully_shard(model)

    everything, sums = grads_of(reference, slice(None))
    for wrap in (DistributedDataParallel, sharded):
        for model in (wrap(converted(encoder())), converted(wrap(encoder()))):
            for _ in range(2):
                model.zero_grad()
                out, averages = grads_of(model, mine)
                assert_close(out, everything[mine])
                assert_close({name: 2 * g for name, g in averages.items()}, sums)
            with torch.no_grad():
                out = model.eval()(x[mine], src_key_padding_mask=PADDING[mine])
                assert_close(out, everything[mine])
    torch.distributed.destroy_process_group()
    # Gloo's worker threads may still release a tensor's Python object, which aborts an interpreter that is going down.
    os._exit(0)


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(two_processes, (str(tmp_path / "store"),), nprocs=2)


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
        model(x, x, memory_mask=torch.zeros(L, L))
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
