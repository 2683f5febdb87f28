"""NystromMultiheadAttention against nn.MultiheadAttention (up to m tokens) and against the definition (beyond)."""

import copy
import io
import itertools
import re
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.testing._internal.common_modules import module_inputs_torch_nn_MultiheadAttention

from nystrom_ext import modules, reference
from nystrom_ext.modules import NystromMultiheadAttention

E, H, N, L, S, M = 8, 2, 3, 20, 17, 6
INF = float("inf")
f64 = torch.float64


def randomise(module):
    for p in module.parameters():  # biases start at zero, which would hide mistakes
        nn.init.uniform_(p, -0.7, 0.7)
    return module


def make(num_landmarks=M, **kwargs):
    torch.manual_seed(0)
    return randomise(NystromMultiheadAttention(E, H, dtype=f64, num_landmarks=num_landmarks, **kwargs))


def make_pair(**kwargs):
    """nn.MultiheadAttention and ours in the exact regime, with the same parameters."""
    ours = make(num_landmarks=64, **kwargs)
    stock = nn.MultiheadAttention(E, H, dtype=f64, **kwargs)
    stock.load_state_dict(ours.state_dict(), strict=True)
    return stock, ours


def outcome(module, inputs, **kwargs):
    """Outputs, and the gradients of inputs and parameters under a fixed random cotangent."""
    torch.manual_seed(1)
    given = {id(x): x.detach().requires_grad_() for x in inputs}
    inputs = [given[id(x)] for x in inputs]  # the same tensor stays the same tensor
    out, weights = module(*inputs, **kwargs)
    loss = (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum()
    if weights is not None:
        loss = loss + (weights * torch.linspace(2, -1, weights.numel(), dtype=out.dtype).view_as(weights)).sum()
    gradients = torch.autograd.grad(loss, [*given.values(), *module.parameters()], allow_unused=True)
    return out, weights, *gradients


def padding(n, *lengths):
    return torch.arange(n) >= torch.tensor(lengths)[:, None]


# ------------------------------------------------------------------------------------------------ up to m tokens: exact


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
        added(x, x[:, :M], x[:, :M], attn_mask=torch.zeros(40, M))


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


@pytest.mark.parametrize(
    "option",
    [
        {"num_landmarks": 0},
        {"num_landmarks": 6.0},
        {"num_landmarks": True},
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


# --------------------------------------------------------------------------------------------- beyond m tokens: Nyström


def compose(m, query, key, value, kpm=None, query_mask=None, conv=None):
    """The module from its definition, batch first: projections, reference operator, output projection."""
    if m._qkv_same_embed_dim:
        weights = m.in_proj_weight.chunk(3)
    else:
        weights = m.q_proj_weight, m.k_proj_weight, m.v_proj_weight
    biases = [0.0] * 3 if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    n = len(q)
    if m.bias_k is not None:
        k, v = torch.cat([k, m.bias_k.expand(n, 1, E)], 1), torch.cat([v, m.bias_v.expand(n, 1, E)], 1)
    if m.add_zero_attn:
        k, v = torch.cat([k, k.new_zeros(n, 1, E)], 1), torch.cat([v, v.new_zeros(n, 1, E)], 1)
    if kpm is not None:
        kpm = torch.cat([kpm, kpm.new_zeros(n, k.shape[1] - kpm.shape[1])], 1)
    q, k, v = (x.view(n, -1, H, E // H).transpose(1, 2) for x in (q, k, v))
    out = reference.nystrom_attention(
        q,
        k,
        v,
        kpm,
        query_padding_mask=query_mask,
        num_landmarks=m.num_landmarks,
        pinv_iterations=m.pinv_iterations,
        coefficient=m.coefficient,
        conv_weight=conv,
        window=m.window,
        pinned=m.pinned,
    )
    return m.out_proj(out.transpose(1, 2).reshape(n, -1, E)), v


def gradients(m, out):
    loss = (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum()
    return torch.autograd.grad(loss, list(m.parameters()))


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
    heads = weights @ v
    if m.conv is not None:
        heads = heads + m.conv(v, kpm, kpm)
    assert_close(out, m.out_proj(heads.transpose(1, 2).flatten(2)))
    if dropout:
        assert not torch.equal(out, m(x, x, x, key_padding_mask=kpm)[0])
        m.eval()
        out = m(x, x, x, key_padding_mask=kpm)[0]
    else:
        average = m(x, x, x, key_padding_mask=kpm)[1]
        assert_close(average, weights.mean(1))
    assert_close(out, m(x, x, x, key_padding_mask=kpm, need_weights=False)[0])


def test_weights_warn_once():
    m, x = make(), torch.randn(L, E, dtype=f64)
    modules._warn_approximate_weights.cache_clear()
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


# ------------------------------------------------------------------------------------------ living with other machinery


def test_copies():
    m, x = make(conv_kernel_size=3), torch.randn(L, E, dtype=f64)
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(m), torch.load(buffer, weights_only=False)):
        assert other._forward_pre_hooks == m._forward_pre_hooks and len(m._forward_pre_hooks) == 1
        assert torch.equal(other(x, x, x)[0], m(x, x, x)[0])
        assert other.in_proj_weight is not m.in_proj_weight


@pytest.mark.parametrize("option", [{"window": 2}, {"pinned": 1}], ids=str)
def test_window_is_for_self_attention(option):
    m = make(batch_first=True, **option)
    x = torch.randn(N, L, E, dtype=f64)
    short = x[:, :M]
    assert m(x, short, short, need_weights=False)[0].shape == x.shape  # exact, whatever the options
    for key in (x.clone(), x[:, :-1]):
        with pytest.raises(ValueError, match="need self-attention.*that is not the query.*window=0, pinned=0"):
            m(x, key, key, need_weights=False)


def test_hook_survives_hooks_of_a_new_process(monkeypatch):
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", 0)  # as in the process that loads a pickle
    m = make()
    m.register_forward_pre_hook(lambda module, args: None).remove()
    assert modules.HOOK_KEY in m._forward_pre_hooks


def test_repr():
    text = repr(make(coefficient="global", conv_kernel_size=3))
    assert (
        "num_landmarks=6, pinv_iterations=6, coefficient='global', unsupported_mask='error', window=0, pinned=0" in text
    )
    assert "taps=3" in text


@pytest.mark.parametrize("num_landmarks", [64, M], ids=["exact", "nystrom"])
def test_weights_that_are_no_parameters(num_landmarks):
    m, x = make(num_landmarks), torch.randn(L, N, E, dtype=f64)
    expected = m(x, x, x, need_weights=False)[0]
    delta = torch.zeros_like(m.in_proj_weight, requires_grad=True)
    merged = m.in_proj_weight.detach() + delta
    del m.in_proj_weight
    m.in_proj_weight = merged
    out = m(x, x, x, need_weights=False)[0]
    assert torch.equal(out, expected)
    out.square().sum().backward()
    assert delta.grad.any()


@pytest.mark.parametrize("num_landmarks", [64, M], ids=["exact", "nystrom"])
def test_hooks_of_out_proj_run(num_landmarks):
    m, x, calls = make(num_landmarks), torch.randn(L, N, E, dtype=f64), []
    m.out_proj.register_forward_hook(lambda *args: calls.append(1))
    m(x, x, x, need_weights=False)
    assert calls


@pytest.mark.parametrize("num_landmarks", [64, M], ids=["exact", "nystrom"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast(num_landmarks, need_weights):
    m, x, kpm = make(num_landmarks, conv_kernel_size=3).float(), torch.randn(L, N, E), padding(L, 20, 13, 9)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = m(x, x, x, key_padding_mask=kpm, need_weights=need_weights)
    assert out.dtype == torch.bfloat16
    expected = m(x, x, x, key_padding_mask=kpm, need_weights=need_weights)[0]
    assert_close(out.float(), expected, atol=0.1, rtol=0.1)
    out.float().sum().backward()
    assert m.in_proj_weight.grad.dtype == torch.float32


@pytest.mark.parametrize("num_landmarks", [64, M], ids=["exact", "nystrom"])
@pytest.mark.parametrize("mask", [None, torch.bool, f64])
def test_compile(num_landmarks, mask):
    m, x = make(num_landmarks, batch_first=True), torch.randn(N, L, E, dtype=f64)
    kpm = padding(L, 20, 13, 9) if mask else None
    kpm = torch.zeros(N, L, dtype=f64).masked_fill(kpm, -INF) if mask == f64 else kpm
    torch.compiler.reset()
    compiled = torch.compile(m, backend="eager", fullgraph=True)
    options = {"key_padding_mask": kpm, "need_weights": False}
    for inputs in ((x, x, x), (x.clone(), x, x)):
        assert_close(outcome(compiled, inputs, **options), outcome(m, inputs, **options))
