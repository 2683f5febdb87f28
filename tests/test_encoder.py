"""The encoder trap: nn.TransformerEncoderLayer must never compute stock attention instead of calling our module.

In eval mode without gradients the layer runs a fused exact attention on the weights of ``self_attn`` without calling
it, and nn.TransformerEncoder replaces the padding mask by a NestedTensor: a model trained with one attention would
silently infer with another.
"""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from nystrom_ext.convert import convert_
from nystrom_ext.modules import HOOK_KEY, NystromMultiheadAttention

E, H, N, L, M = 8, 2, 3, 24, 4

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.usefixtures("process_group"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of our forward, with a tensor and with a NestedTensor."""
    seen = {"dense": 0, "nested": 0}
    forward = NystromMultiheadAttention.forward

    def counted(self, query, *args, **kwargs):
        seen["nested" if query.is_nested else "dense"] += 1
        return forward(self, query, *args, **kwargs)

    monkeypatch.setattr(NystromMultiheadAttention, "forward", counted)
    return seen


def stock_layer(**kwargs):
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True, **kwargs)
    for p in layer.self_attn.parameters():
        nn.init.uniform_(p, -1, 1)
    return layer


def converted(module):
    convert_(module, num_landmarks=M)
    return module


def compiled(module):
    return torch.compile(module, backend="eager", fullgraph=True)


def pickled(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def with_lora(module):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(module, peft.LoraConfig(target_modules=["self_attn"], r=2, init_lora_weights=False))


def sharded(encoder):
    for layer in encoder.layers:
        fully_shard(layer)
    return fully_shard(encoder)


FORMS = {
    "layer": lambda: converted(stock_layer()),
    "norm first": lambda: converted(stock_layer(norm_first=True, activation="gelu")),
    "encoder converted": lambda: converted(nn.TransformerEncoder(stock_layer(), 2)),
    "encoder of a converted layer": lambda: nn.TransformerEncoder(converted(stock_layer()), 2),
    "deepcopy": lambda: copy.deepcopy(converted(nn.TransformerEncoder(stock_layer(), 2))),
    "pickle": lambda: pickled(converted(nn.TransformerEncoder(stock_layer(), 2))),
    "compile": lambda: compiled(converted(nn.TransformerEncoder(stock_layer(), 2))),
    "DDP": lambda: DistributedDataParallel(converted(nn.TransformerEncoder(stock_layer(), 2))),
    "DDP converted": lambda: converted(DistributedDataParallel(nn.TransformerEncoder(stock_layer(), 2))),
    "FSDP2": lambda: sharded(converted(nn.TransformerEncoder(stock_layer(), 2))),
    "FSDP2 converted": lambda: converted(sharded(nn.TransformerEncoder(stock_layer(), 2))),
    "LoRA": lambda: with_lora(converted(nn.TransformerEncoder(stock_layer(), 2))),
    "LoRA converted": lambda: converted(with_lora(nn.TransformerEncoder(stock_layer(), 2))),
}
MODES = {
    "train": (True, nullcontext),
    "eval": (False, nullcontext),
    "no_grad": (False, torch.no_grad),
    "inference_mode": (False, torch.inference_mode),
    "autocast": (False, nullcontext),
    "autocast, no_grad": (False, torch.no_grad),
    "frozen": (False, nullcontext),
}
MASKS = {
    "none": None,
    "left": torch.arange(L) >= torch.tensor([24, 17, 9])[:, None],
    "ragged": torch.rand(N, L, generator=torch.Generator().manual_seed(1)) < 0.3,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", MASKS)
def test_our_forward_runs_everywhere(form, mode, mask, calls):
    autocast = "autocast" in mode
    torch.set_default_dtype(torch.float32 if autocast else torch.float64)
    model, x, padding = FORMS[form](), torch.randn(N, L, E), MASKS[mask]
    layers = 1 if form in ("layer", "norm first") else 2
    valid = torch.ones(N, L, dtype=torch.bool) if padding is None else ~padding
    expected = model.train()(x, src_key_padding_mask=padding)[valid]  # no dropout: any path must give this

    training, context = MODES[mode]
    model.train(training).requires_grad_(mode != "frozen")
    calls.update(dense=0, nested=0)
    with context(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x, src_key_padding_mask=padding)[valid]
    assert calls["dense"] + calls["nested"] == layers
    assert (out - expected).norm() < (0.03 if autocast else 1e-12) * expected.norm()


def test_nested_conversion_is_off_after_conversion_and_harmless_without(calls):
    encoder = converted(nn.TransformerEncoder(stock_layer(), 2)).eval()
    own = nn.TransformerEncoder(converted(stock_layer()), 2).eval()  # the user's own: convert_ has not seen the encoder
    own.load_state_dict(encoder.state_dict())
    x, padding = torch.randn(N, L, E), MASKS["left"]
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        assert calls == {"dense": 2, "nested": 0}
        out = own(x, src_key_padding_mask=padding)
    assert calls == {"dense": 2, "nested": 2}  # else this test does not test what it says
    assert_close(out[~padding], expected[~padding])


# --------------------------------------------------------------------------------------------------------- the controls


class Unprotected(nn.MultiheadAttention):
    calls = 0

    def forward(self, *args, **kwargs):
        Unprotected.calls += 1
        return super().forward(*args, **kwargs)


def test_the_trap_exists():
    """A subclass without our hook is bypassed. When this fails, torch has changed and the hook may be superfluous."""
    layer = stock_layer().eval()
    layer.self_attn.__class__ = Unprotected
    x = torch.randn(N, L, E)
    layer(x)
    assert Unprotected.calls == 1
    with torch.no_grad():
        layer(x)
    assert Unprotected.calls == 1


def test_without_the_hook_it_raises_instead_of_bypassing():
    layer = converted(stock_layer()).eval()
    del layer.self_attn._forward_pre_hooks[HOOK_KEY]
    x = torch.randn(N, L, E)
    with torch.no_grad(), pytest.raises(RuntimeError, match="fused encoder fast path was about to bypass"):
        layer(x)
    convert_(layer, num_landmarks=M)  # as the message says
    with torch.no_grad():
        layer(x)


def test_approximation_differs_from_stock():
    """Else the comparisons above could not tell the two attentions apart."""
    layer, x = stock_layer(), torch.randn(N, L, E)
    stock = layer(x)
    assert (converted(layer)(x) - stock).abs().max() > 1e-2


# ----------------------------------------------------------------------------------------------------------- neighbours


def test_short_sequences_equal_stock_in_every_mode():
    encoder = nn.TransformerEncoder(stock_layer(), 2)
    x, padding = torch.randn(N, L, E), MASKS["left"]
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    inputs = [{"src_key_padding_mask": padding}, {"mask": causal}, {"mask": causal, "src_key_padding_mask": padding}]
    for training, context in (MODES[mode] for mode in ("train", "eval", "no_grad", "inference_mode")):
        for options in inputs:
            with context():
                expected = encoder.train(training)(x, **options)
                twin = copy.deepcopy(encoder)
                convert_(twin)
                assert_close(twin(x, **options)[~padding], expected[~padding])


def test_causal_mask_is_refused_with_the_way_out():
    encoder, x = converted(nn.TransformerEncoder(stock_layer(), 2)), torch.randn(N, L, E)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    with pytest.raises(NotImplementedError, match='unsupported_mask="exact"'):
        encoder(x, mask=causal)
    convert_(encoder, num_landmarks=M, unsupported_mask="exact")
    stock = copy.deepcopy(encoder)
    for layer in stock.layers:
        layer.self_attn.num_landmarks = L
    assert_close(encoder(x, mask=causal), stock(x, mask=causal))


@pytest.mark.parametrize("training", [True, False])
def test_transformer(training, calls):
    model = nn.Transformer(E, H, 2, 2, 16, dropout=0.0, batch_first=True).train(training)
    report = convert_(model, num_landmarks=M, include="*")
    assert report.converted == [f"encoder.layers.{i}.self_attn" for i in (0, 1)] + [
        f"decoder.layers.{i}.multihead_attn" for i in (0, 1)
    ]
    source, target = torch.randn(N, L, E), torch.randn(N, 10, E)
    causal = nn.Transformer.generate_square_subsequent_mask(10)
    padding = torch.zeros(N, L).masked_fill(MASKS["left"], -torch.inf)
    with nullcontext() if training else torch.no_grad():
        options = {"tgt_mask": causal, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        out = model(source, target, **options)
        assert calls["dense"] == 4
        source[MASKS["left"]] = 3.0
        assert_close(model(source, target, **options), out)  # padding content does not matter
