"""NystromMultiheadAttention against nn.MultiheadAttention, up to num_landmarks tokens."""

import itertools
import re

import numpy as np
import pytest
import torch
from module_problems import INF, E, H, L, M, N, f64, make, make_pair, outcome, padding
from small_models import randomise
from torch import nn
from torch.testing import assert_close
from torch.testing._internal.common_modules import module_inputs_torch_nn_MultiheadAttention

from nystrom_ext.modules import NystromMultiheadAttention


@pytest.mark.parametrize("kwargs", [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 5, "vdim": 7}], ids=str)
def test_initial_values_and_random_stream_of_the_same_seed(kwargs):
    torch.manual_seed(3)
    stock = nn.MultiheadAttention(E, H, **kwargs)
    expected = torch.rand(())
    torch.manual_seed(3)
    ours = NystromMultiheadAttention(E, H, **kwargs)
    assert torch.equal(torch.rand(()), expected)
    assert list(stock.state_dict()) == list(ours.state_dict())
    for name, p in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], p)
    stock.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(stock.state_dict(), strict=True)


@pytest.mark.parametrize("training", [True, False])
def test_samples_of_torch(training):
    for sample in module_inputs_torch_nn_MultiheadAttention(None, "cpu", f64, True, training):
        a, k = sample.constructor_input.args, sample.constructor_input.kwargs
        stock = randomise(nn.MultiheadAttention(*a, **k, dtype=f64)).train(training)
        ours = NystromMultiheadAttention(*a, **k, dtype=f64).train(training)
        ours.load_state_dict(stock.state_dict(), strict=True)
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        assert_close(outcome(ours, args, **kwargs), outcome(stock, args, **kwargs), msg=str(sample))


VARIANTS = [
    {},
    {"bias": False},
    {"kdim": 5, "vdim": 7},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 5, "vdim": 7, "bias": False},
]


def masks(n, L, S):
    """name -> masks for n samples (None: unbatched), with at least one key left in each row."""
    g = torch.Generator().manual_seed(5)
    kpm = padding(S, *range(S, S - 2 * (n or 1), -2))
    bias = torch.randn(kpm.shape, generator=g, dtype=f64)
    square = torch.rand(L, S, generator=g) < 0.4
    square[:, 0] = False
    cube = torch.randn((n or 1) * H, L, S, generator=g, dtype=f64)
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)
    kpm, bias = (x if n else x[0] for x in (kpm, bias))
    return {
        "none": {},
        "kpm bool": {"key_padding_mask": kpm},
        "kpm -inf": {"key_padding_mask": torch.zeros(kpm.shape, dtype=f64).masked_fill(kpm, -INF)},
        "kpm bias": {"key_padding_mask": bias},
        "2-D bool": {"attn_mask": square},
        "2-D float": {"attn_mask": cube[0]},
        "3-D float": {"attn_mask": cube},
        "3-D bool, kpm": {"attn_mask": square.expand(len(cube), L, S), "key_padding_mask": kpm},
        "2-D float, kpm bias": {"attn_mask": cube[0], "key_padding_mask": bias},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal, kpm": {"attn_mask": causal, "is_causal": True, "key_padding_mask": kpm},
    }


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("layout", ["batch first", "sequence first", "unbatched"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_exact_regime_is_stock(variant, layout, training):
    batch_first, n = layout == "batch first", None if layout == "unbatched" else N
    pair = [m.train(training) for m in make_pair(batch_first=batch_first, dropout=0.3, **variant)]
    lead = {"batch first": (N, 9), "sequence first": (9, N), "unbatched": (9,)}[layout]
    query = torch.randn(*lead, E, dtype=f64)
    key, value = (torch.randn(*lead, variant.get(name, E), dtype=f64) for name in ("kdim", "vdim"))
    inputs = [(query, key, value)]
    if "kdim" not in variant:
        inputs += [(query, query, query), (query, key, key)]
    for x, (name, mask), weights in itertools.product(inputs, masks(n, 9, 9).items(), (None, True, False)):
        options = mask | {"need_weights": weights is not None, "average_attn_weights": bool(weights)}
        stock, ours = (outcome(m, x, **options) for m in pair)
        where = f"{name}, weights {weights}, {len({*map(id, x)})} different inputs"
        assert_close(ours, stock, msg=lambda text, where=where: f"{where}: {text}")


def test_exact_regime_by_either_length():
    stock, ours = make_pair(batch_first=True)
    ours.num_landmarks = M
    for n_queries, n_keys in ((M, 40), (40, M)):
        q, kv = torch.randn(N, n_queries, E, dtype=f64), torch.randn(N, n_keys, E, dtype=f64)
        mask = {"attn_mask": torch.randn(n_queries, n_keys, dtype=f64)}
        assert_close(outcome(ours, (q, kv, kv), **mask), outcome(stock, (q, kv, kv), **mask))
    added = make(add_zero_attn=True, batch_first=True)  # the added key counts: 7 > 6
    x = torch.randn(N, 40, E, dtype=f64)
    with pytest.raises(NotImplementedError, match="S=7"):
        added(x, x[:, :M], x[:, :M], attn_mask=torch.ones(40, M))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("num_landmarks", [64, M], ids=["exact", "nystrom"])
def test_rows_without_keys(need_weights, num_landmarks):
    m = make(num_landmarks, batch_first=True)
    x = torch.randn(2, L, E, dtype=f64)
    kpm = padding(L, L, 0)
    out, weights, *gradients = outcome(m, (x, x, x), key_padding_mask=kpm, need_weights=need_weights)
    assert_close(out[1], m.out_proj.bias.expand(L, E))
    assert weights is None or not weights[1].any()
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][1].any()  # of the input
    if num_landmarks == 64:
        mask = torch.zeros(L, L, dtype=torch.bool)
        mask[3] = True
        out, weights, *gradients = outcome(m, (x, x, x), attn_mask=mask, need_weights=need_weights)
        assert_close(out[:, 3], m.out_proj.bias.expand(2, E))
        assert all(g.isfinite().all() for g in gradients)


def test_stock_gives_nan_where_ours_gives_zero():
    """Control of the test above: when this fails, torch has changed and the difference can leave the documentation."""
    stock, _ = make_pair(batch_first=True)
    x = torch.randn(1, 4, E, dtype=f64)
    assert stock(x, x, x, key_padding_mask=torch.ones(1, 4, dtype=torch.bool))[0].isnan().all()


MISTAKES = {
    "1-D query": lambda q: ((q[0, 0],) * 3, {}),
    "4-D query": lambda q: ((q[None], q, q), {}),
    "unbatched 3-D key": lambda q: ((q[0], q, q[0]), {}),
    "2-D key": lambda q: ((q, q[0], q), {}),
    "2-D value": lambda q: ((q, q, q[0]), {}),
    "unbatched 2-D kpm": lambda q: ((q[0], q[0], q[0]), {"key_padding_mask": torch.zeros(N, 5, dtype=torch.bool)}),
    "1-D kpm": lambda q: ((q, q, q), {"key_padding_mask": torch.zeros(5, dtype=torch.bool)}),
    "4-D attn_mask": lambda q: ((q, q, q), {"attn_mask": torch.zeros(1, 1, 5, 5)}),
    "unbatched 3-D attn_mask": lambda q: ((q[0], q[0], q[0]), {"attn_mask": torch.zeros(3, 5, 5)}),
    "unbatched 1-D attn_mask": lambda q: ((q[0], q[0], q[0]), {"attn_mask": torch.zeros(5)}),
    "complex kpm": lambda q: ((q, q, q), {"key_padding_mask": torch.zeros(N, 5, dtype=torch.complex64)}),
    "integer kpm": lambda q: ((q, q, q), {"key_padding_mask": torch.zeros(N, 5, dtype=torch.long)}),
    "integer attn_mask": lambda q: ((q, q, q), {"attn_mask": torch.zeros(5, 5, dtype=torch.long)}),
    "embedding": lambda q: ((q[..., 1:], q, q), {}),
    "key and value": lambda q: ((q, q, q[:4]), {}),
    "key and value, batch": lambda q: ((q, q, q[:, :1]), {}),
    "key and value, unbatched": lambda q: ((q[0], q[0], q[0][:2]), {}),
    "unbatched kpm length": lambda q: ((q[0], q[0], q[0]), {"key_padding_mask": torch.zeros(6, dtype=torch.bool)}),
    "kpm batch": lambda q: ((q, q, q), {"key_padding_mask": torch.zeros(N + 1, 5, dtype=torch.bool)}),
    "kpm length": lambda q: ((q, q, q), {"key_padding_mask": torch.zeros(N, 6, dtype=torch.bool)}),
    "2-D attn_mask": lambda q: ((q, q, q), {"attn_mask": torch.zeros(5, 4)}),
    "3-D attn_mask": lambda q: ((q, q, q), {"attn_mask": torch.zeros(N, 5, 5)}),
    "causal without mask": lambda q: ((q, q, q), {"is_causal": True}),
}


@pytest.mark.parametrize("variant", [{}, {"kdim": 5, "vdim": 7}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_messages_of_stock(mistake, batch_first, variant):
    args, kwargs = MISTAKES[mistake](torch.randn(5, N, E, dtype=f64))
    args = [x[..., : variant.get(name, E)] for x, name in zip(args, ("", "kdim", "vdim"), strict=True)]
    args = [x.transpose(0, 1) if batch_first and x.dim() == 3 else x for x in args]
    errors = []
    for m in make_pair(batch_first=batch_first, **variant):
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            m(*args, **kwargs)
        errors.append((caught.type, str(caught.value)))
    if mistake.startswith("key and value"):  # ours are the shapes of the caller's tensors, whatever the layout
        errors = [(kind, re.sub(r"torch.Size\(.*?\)", "(shape)", text)) for kind, text in errors]
    assert errors[0] == errors[1]


def test_other_messages():
    stock, ours = make_pair(kdim=5, vdim=7)
    q, k, v = (torch.randn(5, N, e, dtype=f64) for e in (E, 5, 7))
    with pytest.raises(AssertionError, match="key's sequence and batch dims .* do not match value's"):
        ours(q, k, v[:4])
    with pytest.raises(RuntimeError, match="same batch size, got 1 and 3"):
        ours(q[:, :1], k, v)  # must not broadcast
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        ours(q, k, v, key_padding_mask=torch.zeros(N, 5, dtype=f64), attn_mask=torch.zeros(5, 5, dtype=torch.bool))
    x = torch.randn(L, N, E, dtype=f64)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        make()(x, x, x, is_causal=True)
    with pytest.raises(AssertionError, match="only bool and floating types of key_padding_mask are supported"):
        make()(x, x, x, key_padding_mask=torch.zeros(N, L, dtype=torch.long))


def test_integers_of_numpy_are_integers():
    m = NystromMultiheadAttention(E, H, num_landmarks=np.int64(7), window=np.int32(3), conv_kernel_size=np.int64(5))
    assert (m.num_landmarks, m.window) == (7, 3) and type(m.num_landmarks) is type(m.window) is int
    assert m.conv.weight.shape == (H, 5)


@pytest.mark.parametrize(
    "option",
    [
        {"num_landmarks": 0},
        {"num_landmarks": 6.0},
        {"num_landmarks": True},
        {"num_landmarks": torch.tensor(6)},
        {"num_landmarks": np.array([8, 8])},
        {"num_landmarks": int},
        {"window": "3"},
        {"pinv_iterations": -1},
        {"coefficient": "batch"},
        {"unsupported_mask": "ignore"},
        {"conv_kernel_size": 0},
        {"conv_kernel_size": 3, "add_bias_kv": True},
        {"conv_kernel_size": 3, "add_zero_attn": True},
        {"window": -1},
        {"pinned": 1.0},
        {"window": 3, "add_bias_kv": True},
        {"pinned": 3, "add_zero_attn": True},
    ],
    ids=str,
)
def test_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        NystromMultiheadAttention(E, H, **option)
