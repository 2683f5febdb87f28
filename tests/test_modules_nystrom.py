"""NystromMultiheadAttention against its definition, beyond num_landmarks tokens."""

import itertools
import warnings

import pytest
import torch
from module_problems import INF, E, H, L, M, N, S, compose, f64, gradients, make, make_pair, outcome, padding
from torch import nn
from torch.testing import assert_close

from nystrom_ext import _packed, _projection, _warnings
from nystrom_ext.modules import NystromMultiheadAttention

NYSTROM_VARIANTS = [
    {},
    {"bias": False, "pinv_iterations": 3},
    {"kdim": 5, "vdim": 7},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    {"coefficient": "global"},
    {"conv_kernel_size": 4},
    {"window": 3, "pinned": 1},
]


@pytest.mark.parametrize("variant", [v for v in NYSTROM_VARIANTS if "kdim" not in v], ids=str)
@pytest.mark.parametrize("mask", [None, "bool", "-inf", "-1e4"])
def test_self_attention_is_the_definition(variant, mask):
    m = make(batch_first=True, **variant)
    x = torch.randn(N, L, E, dtype=f64)
    ignored = None if mask is None else padding(L, 20, 13, 5)  # 5 valid tokens: exact for that sample
    kpm = ignored if mask in (None, "bool") else torch.zeros(N, L, dtype=f64).masked_fill(ignored, float(mask))
    out, none = m(x, x, x, key_padding_mask=kpm, need_weights=False)
    assert none is None
    expected, _ = compose(m, x, x, x, ignored, ignored, None if m.conv is None else m.conv.weight)
    assert_close(out, expected)
    assert_close(gradients(m, out), gradients(m, expected))


@pytest.mark.parametrize("variant", NYSTROM_VARIANTS[:-2], ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_cross_attention_is_the_definition(variant, masked):
    m = make(batch_first=True, **variant)
    q = torch.randn(N, L, E, dtype=f64)
    k, v = (torch.randn(N, S, variant.get(name, E), dtype=f64) for name in ("kdim", "vdim"))
    kpm = padding(S, 17, 13, 5) if masked else None
    out, _ = m(q, k, v, key_padding_mask=kpm, need_weights=False)
    expected, _ = compose(m, q, k, v, kpm)
    assert_close(out, expected)
    assert_close(gradients(m, out), gradients(m, expected))


def test_self_attention_means_the_same_query_and_key():
    m, x, kpm = make(batch_first=True), torch.randn(N, L, E, dtype=f64), padding(L, 20, 13, 9)
    apart = m(x, x.clone(), x.clone(), key_padding_mask=kpm, need_weights=False)[0]
    assert_close(apart, compose(m, x, x, x, kpm)[0])
    long = torch.randn(N, 2 * L, E, dtype=f64)  # views of one tensor that are not the same view
    for query, key in ((long[:, :L], long[:, L:]), (long[:, :L], long[:, : L + 3]), (long[:, :L], long[:, ::2])):
        mask = padding(key.shape[1], 20, 13, 9)
        out = m(query, key, key, key_padding_mask=mask, need_weights=False)[0]
        assert_close(out, compose(m, query, key, key, mask)[0])
    shared = m(x, x, x.clone(), key_padding_mask=kpm, need_weights=False)[0]  # as with positions in query and key only
    assert_close(shared, compose(m, x, x, x, kpm, kpm)[0])
    assert_close(shared[1, 13:], m.out_proj.bias.expand(7, E))


@pytest.mark.parametrize("need_weights", [True, False])
def test_layouts_agree(need_weights):
    m, x, kpm = make(batch_first=True), torch.randn(N, L, E, dtype=f64), padding(L, 20, 13, 9)
    out, weights = m(x, x, x, key_padding_mask=kpm, need_weights=need_weights)
    m.batch_first = False
    y = x.transpose(0, 1)
    other, other_weights = m(y, y, y, key_padding_mask=kpm, need_weights=need_weights)
    assert other.is_contiguous()  # as stock
    assert_close(other.transpose(0, 1), out)
    single, single_weights = m(x[1], x[1].view_as(x[1]), x[1], need_weights=need_weights)
    alone, alone_weights = m(y[:, 1:2], y[:, 1:2], y[:, 1:2], need_weights=need_weights)
    assert_close(single, alone[:, 0])
    if need_weights:
        assert_close(other_weights, weights)
        assert_close(single_weights, alone_weights[0])


@pytest.mark.parametrize("variant", [NYSTROM_VARIANTS[i] for i in (0, 5, 7)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_weights_give_the_output(variant, dropout):
    m = make(batch_first=True, dropout=dropout, **variant)
    x, kpm = torch.randn(N, L, E, dtype=f64), padding(L, 20, 13, 9)
    out, weights = m(x, x, x, key_padding_mask=kpm, average_attn_weights=False)
    _, v = compose(m, x, x, x, kpm, kpm)
    assert weights.shape == (N, H, L, v.shape[2])
    assert not weights[1, :, :, 13:20].any() and not weights[1, :, 13:].any()
    if dropout:  # of the output, not of the weights
        assert not torch.equal(out, m(x, x, x, key_padding_mask=kpm)[0])
        m.eval()
        out = m(x, x, x, key_padding_mask=kpm)[0]
    heads = weights @ v
    if m.conv is not None:
        heads = heads + m.conv(v, kpm, kpm)
    assert_close(out, m.out_proj(heads.transpose(1, 2).flatten(2)))
    assert torch.equal(out, m(x, x, x, key_padding_mask=kpm, need_weights=False)[0])
    assert_close(m(x, x, x, key_padding_mask=kpm)[1], weights.mean(1))


def test_weights_warn_once():
    m, x = make(), torch.randn(L, E, dtype=f64)
    _warnings._given.clear()
    with pytest.warns(UserWarning, match=r"O\(L \* S\)") as caught:
        m(x, x, x)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m(x, x, x)


def test_dropout():
    m, x = make(dropout=0.5), torch.randn(L, N, E, dtype=f64)
    run = lambda seed: (torch.manual_seed(seed), m(x, x, x, need_weights=False)[0])[1]  # noqa: E731
    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    mean = torch.stack([run(seed) for seed in range(400)]).mean(0)
    m.eval()
    assert torch.equal(run(1), run(2))
    assert (mean - run(1)).abs().max() < 0.25  # unbiased; the standard error is about 0.05


# ---------------------------------------------------------------------------------------------------------------- masks


def test_unsupported_masks():
    m, x = make(batch_first=True), torch.randn(N, L, E, dtype=f64)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    for options in ({"attn_mask": causal}, {"attn_mask": causal, "is_causal": True}):
        with pytest.raises(NotImplementedError, match=r'L=20, S=20 > num_landmarks=6 .*unsupported_mask="exact"'):
            m(x, x, x, **options)
    stock, _ = make_pair(batch_first=True)
    exact = make(batch_first=True, unsupported_mask="exact")
    kpm = padding(L, 20, 13, 9)
    for options in itertools.chain(
        ({"attn_mask": causal, "is_causal": True, "need_weights": False},),
        ({"attn_mask": causal, "key_padding_mask": kpm, "need_weights": w} for w in (True, False)),
    ):
        assert_close(outcome(exact, (x, x, x), **options), outcome(stock, (x, x, x), **options))
    assert_close(exact(x, x, x, kpm, False)[0], m(x, x, x, kpm, False)[0])  # without attn_mask: still Nyström


@pytest.mark.parametrize("bad", [1.0, -1.0, -9999.0, INF, float("nan")])
def test_finite_biases_are_refused(bad):
    m, x = make(), torch.randn(L, N, E, dtype=f64)
    kpm = torch.zeros(N, L, dtype=f64)
    kpm[1, 3] = bad
    with pytest.raises(RuntimeError, match=r"must hold 0 \(keep\) or values <= -1e4"):
        m(x, x, x, key_padding_mask=kpm, need_weights=False)


@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32, f64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, f64])
@pytest.mark.parametrize("num_landmarks", [64, M], ids=["exact", "nystrom"])
def test_float_masks_of_every_dtype(num_landmarks, dtype, mask_dtype):
    m, x = make(num_landmarks, batch_first=True).to(dtype), torch.randn(N, L, E, dtype=dtype)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    kinds = {"key_padding_mask": padding(L, 20, 13, 0)} | ({"attn_mask": causal} if num_landmarks == 64 else {})
    for (name, mask), need_weights in itertools.product(kinds.items(), (True, False)):
        additive = torch.zeros(mask.shape, dtype=mask_dtype).masked_fill(mask, -INF)
        expected = m(x, x, x, need_weights=need_weights, **{name: mask})
        out = m(x, x, x, need_weights=need_weights, **{name: additive})
        assert_close(out, expected)
        assert out[0].dtype == dtype and out[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_customary_mask_values(dtype):
    m, x, ignored = make(), torch.randn(L, N, E, dtype=f64), padding(L, 20, 13, 9)
    expected = m(x, x, x, ignored, False)[0]
    for value in (torch.finfo(dtype).min, -1e4, -INF):
        kpm = torch.zeros(N, L, dtype=dtype).masked_fill(ignored, value)
        assert torch.equal(m(x, x, x, kpm, False)[0], expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_padding_does_not_matter(need_weights):
    m, n = make(batch_first=True, conv_kernel_size=5), 13
    x = torch.randn(N, L, E, dtype=f64)
    q = x[1:2, :n]
    alone, weights = m(q, q, q, need_weights=need_weights)
    for length, content, mates in itertools.product((n + 1, L, 2 * L), (0.0, 1e30, float("nan"), INF), (0, 2)):
        batch = torch.full((1 + mates, length, E), content, dtype=f64)
        batch[0, :n] = x[1, :n]
        batch[1:, : n - 4] = torch.randn(mates, n - 4, E, dtype=f64)
        kpm = padding(length, n, *[n - 4] * mates)
        out, w = m(batch, batch, batch, key_padding_mask=kpm, need_weights=need_weights)
        assert_close(out[0, :n], alone[0])
        assert out.isfinite().all()
        if need_weights:
            assert_close(w[0, :n, :n], weights[0])


# ---------------------------------------------------------------------------------------------------------- convolution


def test_convolution_parameter():
    m = NystromMultiheadAttention(E, H, conv_kernel_size=9)
    assert {*m.state_dict()} - {*nn.MultiheadAttention(E, H).state_dict()} == {"conv.weight"}
    assert m.conv.weight.shape == (H, 9) and 0 < m.conv.weight.abs().max() <= 1 / 3
    before = m.conv.weight.clone()
    m._reset_parameters()
    assert not torch.equal(m.conv.weight, before)
    with pytest.raises(ValueError, match="L=20, S=17"):
        make(conv_kernel_size=3)(torch.randn(L, E, dtype=f64), *[torch.randn(S, E, dtype=f64)] * 2)


@pytest.mark.parametrize("taps", [1, 4, 5])
def test_convolution_in_the_exact_regime(taps):
    m, stock = make(64, batch_first=True, conv_kernel_size=taps), make_pair(batch_first=True)[0]
    stock.load_state_dict(m.state_dict(), strict=False)
    x, kpm = torch.randn(N, L, E, dtype=f64), padding(L, 20, 13, 9)
    expected = compose(m, x, x, x, kpm, kpm, m.conv.weight)[0]
    additive = torch.zeros(N, L, dtype=f64).masked_fill(kpm, -INF)
    for need_weights, mask in itertools.product((True, False), (kpm, additive)):
        out = m(x, x, x, key_padding_mask=mask, need_weights=need_weights)[0]
        assert_close(out[~kpm], expected[~kpm])
        assert_close(out[kpm], stock(x, x, x, key_padding_mask=kpm)[0][kpm])


# --------------------------------------------------------------------------------------------------------- NestedTensor


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("num_landmarks", [64, M], ids=["exact", "nystrom"])
@pytest.mark.parametrize("training", [True, False])
def test_nested(num_landmarks, training):
    m = make(num_landmarks, batch_first=True).train(training)
    sequences = [torch.randn(n, E, dtype=f64) for n in (20, 13, 5)]
    nested = torch.nested.nested_tensor(sequences, requires_grad=True)
    out, weights = m(nested, nested, nested)
    assert out.is_nested and out.layout == torch.strided
    for i, x in enumerate(sequences):
        alone, w = m(x, x, x)
        assert_close(out[i], alone)
        assert_close(weights[i, : len(x), : len(x)], w)
        assert not weights[i, len(x) :].any() and not weights[i, :, len(x) :].any()
    out.to_padded_tensor(0.0).square().sum().backward()
    assert nested.grad.is_nested and m.in_proj_weight.grad.any()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("num_landmarks", [64, M], ids=["exact", "nystrom"])
@pytest.mark.parametrize("variant", [{}, {"window": 2, "pinned": 1}, {"conv_kernel_size": 3}], ids=str)
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_runs_packed(num_landmarks, variant, layout, monkeypatch):
    m = make(num_landmarks, batch_first=True, **variant)
    sequences = [torch.randn(n, E, dtype=f64) for n in (20, 0, 13, 5)]
    nested = torch.nested.nested_tensor(sequences, layout=layout, requires_grad=True)
    monkeypatch.setattr(torch.Tensor, "to_padded_tensor", None)
    out, weights = m(nested, nested, nested, need_weights=False)
    assert weights is None and out.is_nested and out.layout == layout
    parts = out.unbind()
    for part, x in zip(parts, sequences, strict=True):
        if len(x):
            assert_close(part, m(x, x, x, need_weights=False)[0])
    torch.autograd.grad(sum(part.square().sum() for part in parts), [nested, m.in_proj_weight])


# ---------------------------------------------------------------------------------------------------------------- unpad


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("variant", [{}, {"window": 2, "pinned": 1}, {"conv_kernel_size": 3}, {"bias": False}], ids=str)
@pytest.mark.parametrize("tensors", [1, 3])
def test_unpad_changes_nothing_but_time(batch_first, variant, tensors):
    m = make(batch_first=batch_first, self_attention=None if tensors == 1 else True, **variant)
    x = torch.randn(N, L, E, dtype=f64)
    kpm = padding(L, 20, 13, 5)
    run = lambda kpm: (  # noqa: E731
        out := m(*(x if tensors == 1 else x.clone() for _ in range(3)), key_padding_mask=kpm, need_weights=False)[0],
        gradients(m, out),
    )
    if not batch_first:
        x = x.transpose(0, 1)
    expected = run(kpm)
    m.unpad = True
    for mask in (kpm, torch.zeros(N, L, dtype=f64).masked_fill(kpm, -INF)):
        assert_close(run(mask), expected)
    everything = run(torch.ones_like(kpm))[0]
    assert_close(everything, m.out_proj(torch.zeros_like(everything)))


def test_unpad_drops_tokens_before_the_projections(monkeypatch):
    m, x, kpm = make(batch_first=True, unpad=True), torch.randn(N, L, E, dtype=f64), padding(L, 20, 13, 5)
    rows, inner = [], _projection.in_projection
    for place in (_packed, _projection):
        spy = lambda module, *x: (rows.append(x[0].shape), inner(module, *x))[1]  # noqa: E731
        monkeypatch.setattr(place, "in_projection", spy)
    m(x, x, x, key_padding_mask=kpm, need_weights=False)
    m(x, x, x, key_padding_mask=kpm)  # weights
    m(x[:, :M], x[:, :M], x[:, :M], key_padding_mask=kpm[:, :M], need_weights=False)  # exact
    assert rows == [(38, E), (N, L, E), (N, M, E)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_that_is_refused():
    m = make(batch_first=True)
    sequences = [torch.randn(n, E, dtype=f64) for n in (5, 3)]
    nested = torch.nested.nested_tensor(sequences)
    jagged = torch.nested.nested_tensor(sequences, layout=torch.jagged)
    dense = torch.randn(2, 5, E, dtype=f64)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    for args in ((jagged,) * 3, (nested, dense, dense), (dense, nested, nested), (nested, nested, nested, mask)):
        with pytest.raises(AssertionError, match="does not support NestedTensor outside of .*pass key_padding_mask"):
            m(*args)
    m.batch_first = False
    with pytest.raises(AssertionError, match="does not support NestedTensor outside of .*batch_first=False"):
        m(nested, nested, nested)
