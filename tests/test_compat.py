"""Other implementations: compat against formulas written independently, and against the peers that are installed."""

from __future__ import annotations

import importlib
import itertools
import sys
from types import ModuleType

import pytest
import torch
from peers import installed
from peers.formulas import additive, released
from torch import nn
from torch.testing import assert_close

from nystrom_ext import NystromMultiheadAttention, compat, nystrom_attention
from nystrom_ext.compat import presets
from nystrom_ext.compat.xformers import NystromAttention, install

B, H, D, TAPS = 2, 3, 8, 5
f64 = torch.float64
INF = float("inf")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fused_calls(monkeypatch):
    """How often compat.attention has called the operator."""
    calls = []

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return nystrom_attention(*args, **kwargs)

    monkeypatch.setattr(presets, "nystrom_attention", spy)
    return calls


def tensors(L, S=None, seed=0):
    """query, key, value, convolution weight."""
    torch.manual_seed(seed)
    shapes = (B, H, L, D), (B, H, S or L, D), (B, H, S or L, D), (H, 1, TAPS, 1)
    return [torch.randn(shape, dtype=f64, requires_grad=True) for shape in shapes]


def keep_mask(n, kind="holes"):
    torch.manual_seed(1)
    mask = torch.rand(B, n) < 0.7
    if kind == "tail":
        mask = torch.arange(n) < torch.tensor([[n], [n // 2 + 1]])
    if kind == "empty sample":
        mask[1] = False
    return mask


def assert_same(actual, expected, inputs, tolerance=1e-9):
    """Values and gradients."""
    assert torch.isfinite(expected).all()
    assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    grad = torch.linspace(-1, 1, expected.numel(), dtype=f64).view_as(expected)
    pairs = (torch.autograd.grad(out, inputs, grad, allow_unused=True) for out in (actual, expected))
    for a, e in zip(*pairs, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            assert_close(a, e, rtol=tolerance, atol=tolerance * e.abs().max().item() + 1e-300)


SELF = ("official", "official_exact", "huggingface", "lucidrains", "t2t", "xformers", "flashnystrom")
MASKED = ("official", "official_exact", "huggingface", "lucidrains", "xformers")


# Results


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("name", SELF)
def test_divisible_lengths(name, conv, fused, fused_calls):
    *qkv, weight = inputs = tensors(40)
    weight = weight if conv else None
    actual = compat.attention(name, *qkv, num_landmarks=8, conv_weight=weight, fused=fused)
    assert_same(actual, released(name, *qkv, 8, weight), inputs)
    assert len(fused_calls) == fused


@pytest.mark.parametrize("n", [8, 41, 43, 47])
@pytest.mark.parametrize("name", ["t2t", "xformers", "flashnystrom", "lucidrains"])
def test_other_lengths(name, n):
    *qkv, weight = inputs = tensors(n)
    actual = compat.attention(name, *qkv, num_landmarks=8, conv_weight=weight)
    assert_same(actual, released(name, *qkv, 8, weight), inputs)


@pytest.mark.parametrize("name", ["lucidrains", "xformers", "official", "huggingface"])
@pytest.mark.parametrize("mask", [None, "holes", "tail"])
def test_fewer_tokens_than_landmarks(name, mask):
    *qkv, weight = inputs = tensors(5)
    mask = None if mask is None else keep_mask(5, mask)
    options = {} if name in ("lucidrains", "xformers") else {"seq_len": 8}
    actual = compat.attention(name, *qkv, mask, num_landmarks=8, conv_weight=weight, **options)
    assert_same(actual, released(name, *qkv, 8, weight, mask, **options), inputs)


MASK_KINDS = [*itertools.product(MASKED, ("holes", "tail")), *((name, "empty sample") for name in MASKED[:-1])]


@pytest.mark.parametrize("n", [40, 43])
@pytest.mark.parametrize("name, kind", MASK_KINDS)
def test_masks(name, n, kind, fused_calls):
    m = 8 if n == 40 or name in ("lucidrains", "xformers") else 43  # the others need n % m == 0; 43 is exact
    *qkv, weight = inputs = tensors(n)
    mask = keep_mask(n, kind)
    actual = compat.attention(name, *qkv, mask, num_landmarks=m, conv_weight=weight)
    # without any key official and lucidrains give uniform weights by rounding, whose gradient is about 1e-7 of noise
    assert_same(actual, released(name, *qkv, m, weight, mask), inputs, 1e-6 if kind == "empty sample" else 1e-9)
    assert not fused_calls


def test_native_masks_equal_bool_masks():
    *qkv, _ = tensors(40)
    mask = keep_mask(40)
    native = {
        "official": [mask.float(), mask.long()],
        "huggingface": [additive(mask, torch.finfo(f64).min)[:, None, None], mask.long()],
        "xformers": [additive(mask), mask.long()],
        "lucidrains": [mask.long()],
    }
    for name, others in native.items():
        expected = compat.attention(name, *qkv, mask, num_landmarks=8)
        for other in others:
            assert_close(compat.attention(name, *qkv, other, num_landmarks=8), expected, rtol=0, atol=0)


def test_fractional_mask_of_the_official_code():
    *qkv, weight = inputs = tensors(40)
    mask = 1 - 1e-10 * torch.rand(B, 40, dtype=f64)  # a penalty of up to 0.1 for a key
    actual = compat.attention("official", *qkv, mask, num_landmarks=8, conv_weight=weight)
    assert_same(actual, released("official", *qkv, 8, weight, mask), inputs)
    assert (actual - compat.attention("official", *qkv, num_landmarks=8, conv_weight=weight)).abs().max() > 1e-4


def test_xformers_without_any_key():
    *qkv, _ = tensors(40)
    mask = keep_mask(40, "empty sample")
    out = compat.attention("xformers", *qkv, mask, num_landmarks=8)
    assert out[1].isnan().all() and out[0].isfinite().all()


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"use_razavi_pinverse": False}, {"pinverse_original_init": True}]
)
@pytest.mark.parametrize("n, m, masked", [(40, 8, False), (43, 8, True), (20, 24, False)])
def test_xformers_options(options, n, m, masked):
    *qkv, weight = inputs = tensors(n)
    mask = keep_mask(n) if masked else None
    if masked:
        mask[:, 0] = True  # else the first landmark of the causal variant sees no key
    actual = compat.attention("xformers", *qkv, mask, num_landmarks=m, conv_weight=weight, **options)
    assert_same(actual, released("xformers", *qkv, m, weight, mask, **options), inputs, 1e-7)


@pytest.mark.parametrize("L, S", [(24, 40), (43, 21), (30, 8), (30, 5), (8, 40)])
def test_xformers_cross_attention(L, S):
    *qkv, _ = tensors(L, S)
    assert_same(compat.attention("xformers", *qkv, num_landmarks=8), released("xformers", *qkv, 8), qkv)


@pytest.mark.parametrize("kappa_star", [5.0, 1e3])
def test_ridge_of_flashnystrom(kappa_star, fused_calls):
    *qkv, weight = inputs = tensors(43)
    actual = compat.attention("flashnystrom", *qkv, num_landmarks=8, conv_weight=weight, kappa_star=kappa_star)
    assert_same(actual, released("flashnystrom", *qkv, 8, weight, kappa_star=kappa_star), inputs)
    assert not fused_calls


def test_scale_of_t2t(fused_calls):
    *qkv, weight = inputs = tensors(40)
    for fused in (True, False):
        actual = compat.attention("t2t", *qkv, num_landmarks=8, conv_weight=weight, scale=0.7, fused=fused)
        assert_same(actual, released("t2t", *qkv, 8, weight, scale=0.7), inputs)
    assert fused_calls[0]["scale"] == 0.7


@pytest.mark.parametrize("iterations", [0, 1, 12])
@pytest.mark.parametrize("name", SELF)
def test_iterations(name, iterations):
    *qkv, _ = tensors(40)
    for fused in (True, False):
        actual = compat.attention(name, *qkv, num_landmarks=8, pinv_iterations=iterations, fused=fused)
        assert_same(actual, released(name, *qkv, 8, iterations=iterations), qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SELF)
def test_dtypes(name, dtype):
    """16-bit types cost no more than the rounding of the output, also under autocast."""
    q, k, v, weight = (x.detach().to(dtype) for x in tensors(40))
    expected = released(name, *(x.double() for x in (q, k, v)), 8, weight.double())
    bar = 1e-4 if dtype == torch.float32 else 0.6 * torch.finfo(dtype).eps
    for fused in (True, False):
        with torch.autocast("cpu", enabled=not fused):
            actual = compat.attention(name, q, k, v, num_landmarks=8, conv_weight=weight, fused=fused)
        assert actual.dtype == dtype
        assert (actual.double() - expected).abs().max() <= bar * expected.abs().max()


def test_second_derivatives_without_fusion():
    inputs = [torch.randn(shape, dtype=f64, requires_grad=True) for shape in 3 * [(1, 1, 5, 2)] + [(1, 3)]]

    def attend(*inputs):
        return compat.attention("lucidrains", *inputs[:3], num_landmarks=3, conv_weight=inputs[3], fused=False)

    assert torch.autograd.gradgradcheck(attend, inputs, atol=1e-4)


# Presets


def presets_agree(name, n, m, options):
    """(whether the operator reproduces the formula, whether preset says so), or None where the implementation fails."""
    *qkv, weight = tensors(n)
    try:
        settings, says = compat.preset(name, num_landmarks=m, length=n, **options), True
    except ValueError:
        settings, says = compat.preset(name, num_landmarks=m, **options), False
    try:
        expected = released(name, *qkv, m, weight, **options)
    except (AssertionError, ZeroDivisionError):
        assert not says
        with pytest.raises(ValueError):
            compat.attention(name, *qkv, num_landmarks=m, **options)
        return None
    actual = nystrom_attention(*qkv, conv_weight=weight.flatten(1), **settings)
    return bool((actual - expected).abs().max() < 1e-9 * expected.abs().max()), says


@pytest.mark.parametrize("name", SELF)
def test_presets_hold_exactly_where_they_say(name):
    """The operator differs wherever preset refuses: the table in its docstring is tight."""
    seen = set()
    for m, n in itertools.product((3, 6), range(2, 26)):
        result = presets_agree(name, n, m, {})
        if result is not None:
            assert result[0] == result[1], f"n={n}, m={m}: (reproduces, preset says) = {result}"
            seen.add(result)
    assert seen == {(True, True), (False, False)} or name in ("official", "official_exact", "huggingface")
    assert (True, True) in seen


@pytest.mark.parametrize("n", [3, 6, 13])
@pytest.mark.parametrize("name", ["official", "official_exact", "huggingface"])
def test_configured_length_equal_to_landmarks_is_exact(name, n):
    """The default of Hugging Face's Nyströmformer: num_landmarks == segment_means_seq_len, dense at any length."""
    assert presets_agree(name, n, 6, {"seq_len": 6}) == (True, True)
    *qkv, _ = tensors(n)
    exact = nn.functional.scaled_dot_product_attention(*qkv)
    assert_close(compat.attention(name, *qkv, num_landmarks=6, seq_len=6), exact)


def test_presets():
    assert compat.preset("official") == {"num_landmarks": 64, "pinv_iterations": 6, "coefficient": "global"}
    assert compat.preset("official_exact")["coefficient"] == "per_head"
    assert compat.preset("lucidrains", length=512)["num_landmarks"] == 256
    assert compat.preset("hf", length=1024, num_landmarks=64) == compat.preset("official")
    assert compat.preset("xformers", pinverse_original_init=True)["coefficient"] == "global"
    assert compat.preset("t2t", scale=0.5)["scale"] == 0.5
    NystromMultiheadAttention(8, 2, **compat.preset("lucidrains"))


@pytest.mark.parametrize("L, S, same", [(24, 40, True), (25, 47, True), (27, 40, False), (30, 5, True), (8, 40, False)])
def test_preset_for_cross_attention(L, S, same):
    *qkv, _ = tensors(L, S)
    if same:
        settings = compat.preset("xformers", num_landmarks=8, length=L, key_length=S)
        assert_close(nystrom_attention(*qkv, **settings), released("xformers", *qkv, 8), rtol=1e-9, atol=1e-9)
    else:
        with pytest.raises(ValueError, match="use compat.attention"):
            compat.preset("xformers", num_landmarks=8, length=L, key_length=S)


def test_left_padding_of_lucidrains_is_fused(fused_calls):
    """n % m != 0 without a mask, as in pathology: the operator on the padded sequence is the same thing."""
    *qkv, weight = inputs = tensors(43)
    actual = compat.attention("lucidrains", *qkv, num_landmarks=8, conv_weight=weight)
    assert_same(actual, released("lucidrains", *qkv, 8, weight), inputs)
    assert len(fused_calls) == 1


REFUSED = {
    "unknown implementation 'flash'; known are official, ": ("flash", 40, {}),
    "t2t has no option 'causal'; it has scale": ("t2t", 40, {"causal": True}),
    "official has no option 'coefficient'; it has seq_len": ("official", 40, {"coefficient": "per_head"}),
    "needs a multiple of num_landmarks=8 tokens, got 43": ("official", 43, {}),
    "configured for seq_len=80 fails or mixes the samples": ("huggingface", 40, {"seq_len": 80}),
    "has no tokens for some of its 8 segments with 5": ("flashnystrom", 5, {}),
    "has no tokens for some of its 8 segments with 6": ("xformers", (6, 40), {}),
    "t2t is self-attention, got 24 queries and 40 keys": ("t2t", (24, 40), {}),
    "xformers with causal=True is self-attention": ("xformers", (24, 40), {"causal": True}),
    "num_landmarks must be at least 1, got 0": ("xformers", 40, {"num_landmarks": 0}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_facts(message):
    name, length, options = REFUSED[message]
    L, S = length if isinstance(length, tuple) else (length, length)
    options = {"num_landmarks": 8, **options}
    with pytest.raises(ValueError, match=message):
        compat.attention(name, *tensors(L, S)[:3], **options)
    with pytest.raises(ValueError, match=message):
        compat.preset(name, length=L, key_length=S, **options)


def test_refused_presets():
    for name, facts, reason in (
        ("lucidrains", {"masked": True}, "treats padding in its own way"),
        ("xformers", {"causal": True}, "is given causal"),
        ("xformers", {"use_razavi_pinverse": False}, "is given use_razavi_pinverse=False"),
        ("flashnystrom", {"kappa_star": 5.0}, "is given kappa_star"),
        ("t2t", {"length": 64}, "approximates 64 <= num_landmarks=64"),
        ("lucidrains", {"length": 300}, "cuts 300 tokens into other segments"),
    ):
        with pytest.raises(ValueError, match=f"{name} {reason}.*use compat.attention"):
            compat.preset(name, **facts)


def test_bad_tensors():
    q, k, v, weight = tensors(40)
    cross = tensors(24)[0]
    mask = keep_mask(40)
    for name, inputs, options, message in (
        ("official", (q[0, 0, 0], k, v), {}, r"expected query \(B, H, L, d\)"),
        ("official", (q, k[:, :1], v), {}, r"expected query \(B, H, L, d\)"),
        ("official", (q[..., :4], k, v), {}, r"expected query \(B, H, L, d\)"),
        ("t2t", (q, k, v, mask), {}, "t2t takes no mask"),
        ("official", (q, k, v, mask[:, :9]), {}, r"takes a torch.bool mask of shape \(2, 40\), got \(2, 9\)"),
        ("hf", (q, k, v, additive(mask)), {}, r"takes a torch.float64 mask of shape \(2, 1, 1, 40\)"),
        ("lucidrains", (q, k, v, additive(mask)), {}, "takes a bool mask, True = keep"),
        ("xformers", (cross, k, v, mask), {}, "only for as many keys as queries, got 40 and 24"),
        ("xformers", (cross, k, v), {"conv_weight": weight}, "convolution needs L = S, got 24 and 40"),
        ("official", (q, k, v), {"conv_weight": weight[:2]}, r"conv_weight must be \(3, taps\)"),
        ("official", (q, k, v), {"conv_weight": weight[:, :, :4]}, "taps odd"),
    ):
        with pytest.raises(ValueError, match=message):
            compat.attention(name, *inputs, num_landmarks=8, **options)


# Checkpoints: a block's state_dict, what the block computes from it, and our module after loading it


def rows(*names, bias=True):
    out = {}
    for name in names:
        out[f"{name}.weight"] = torch.randn(H * D, H * D, dtype=f64) / 4
        if bias:
            out[f"{name}.bias"] = torch.randn(H * D, dtype=f64)
    return out


def checkpoint(source):
    """Keys, and the names of q, k, v, out in it (after unpacking)."""
    torch.manual_seed(3)
    conv = torch.randn(H, 1, TAPS, 1, dtype=f64)
    if source == "official":
        return {**rows("W_q", "W_k", "W_v", "ff"), "attn.conv.weight": conv}
    if source == "huggingface":
        norm = {"output.LayerNorm.weight": torch.ones(H * D), "output.LayerNorm.bias": torch.zeros(H * D)}
        return {**rows("self.query", "self.key", "self.value", "output.dense"), "self.conv.weight": conv, **norm}
    if source == "lucidrains":
        packed = {"to_qkv.weight": torch.randn(3 * H * D, H * D, dtype=f64) / 4}
        return {**packed, **rows("to_out.0"), "res_conv.weight": conv}
    if source == "xformers":
        inputs = rows(*(f"in_proj_container.{x}_proj" for x in "qkv"))
        del inputs["in_proj_container.k_proj.bias"]  # each of the four biases is optional there
        return {**inputs, **rows("proj"), "attention.skip_connection.weight": conv}
    return {**rows("q_proj", "k_proj", "v_proj", "out_proj", bias=False), "conv_weight": conv[:, 0, :, 0]}


def block(source, state, x, m):
    """What the block with this checkpoint computes."""
    linear = nn.functional.linear
    names = [key[: -len(".weight")] for key in state if key.endswith(".weight") and "onv" not in key.split(".")[-2]]
    names = [name for name in names if "skip" not in name and "Norm" not in name]
    project = [(state[f"{name}.weight"], state.get(f"{name}.bias")) for name in names]
    if source == "lucidrains":
        project = [(weight, None) for weight in project[0][0].chunk(3)] + project[1:]
    q, k, v = (linear(x, *p).unflatten(-1, (H, D)).transpose(1, 2) for p in project[:3])
    conv = next(value for key, value in state.items() if "conv" in key.split(".")[-2:][0] or "skip" in key)
    out = released(source, q, k, v, m, conv.reshape(H, 1, TAPS, 1))
    return linear(out.transpose(1, 2).flatten(2), *project[3])


def ours(source, m=8, **options):
    torch.manual_seed(4)
    options = {"conv_kernel_size": TAPS, **compat.preset(source, num_landmarks=m), **options}
    return NystromMultiheadAttention(H * D, H, batch_first=True, dtype=f64, **options).eval()


SOURCES = ("official", "huggingface", "lucidrains", "xformers", "flashnystrom")


@pytest.mark.parametrize("prefix", ["", "encoder.layer.0.attention."])
@pytest.mark.parametrize("source", SOURCES)
def test_checkpoint_gives_the_results_of_its_block(source, prefix):
    state = checkpoint(source)
    x = torch.randn(B, 40, H * D, dtype=f64)
    module = ours(source)
    others = {"encoder.layer.1.W_q.weight": x, "head": x} if prefix else {}
    compat.load_state_dict(module, {**others, **{prefix + k: v for k, v in state.items()}}, source, prefix=prefix)
    actual = module(x, x, x, need_weights=False)[0]
    assert_close(actual, block(source, state, x, 8), rtol=1e-9, atol=1e-9)


def test_missing_biases_become_zero():
    module = ours("flashnystrom")
    nn.init.ones_(module.in_proj_bias)
    nn.init.ones_(module.out_proj.bias)
    compat.load_state_dict(module, checkpoint("flashnystrom"), "flashnystrom")
    assert not module.in_proj_bias.any() and not module.out_proj.bias.any()
    without = ours("flashnystrom", bias=False)
    compat.load_state_dict(without, checkpoint("flashnystrom"), "flashnystrom")
    assert torch.equal(without.in_proj_weight, module.in_proj_weight)


def test_other_dtypes_widths_and_aliases():
    module = ours("hf", conv_kernel_size=None, kdim=16, vdim=12)
    state = rows("self.query", "self.key", "self.value", "output.dense")
    state["self.key.weight"], state["self.value.weight"] = torch.randn(H * D, 16), torch.randn(H * D, 12)
    parameters = dict(module.named_parameters())
    compat.load_state_dict(module, {key: value.half() for key, value in state.items()}, "hf")
    assert all(p is parameters[key] and p.dtype == f64 for key, p in module.named_parameters())
    assert_close(module.v_proj_weight, state["self.value.weight"].half().double())
    assert_close(module.in_proj_bias[H * D : 2 * H * D], state["self.key.bias"].half().double())


E = H * D
MISFITS = {
    r"missing key ff.weight": (lambda s: s.pop("ff.weight"), {}),
    r"missing key attn.conv.weight": (lambda s: s.pop("attn.conv.weight"), {}),
    r"unexpected key extra of shape \(1,\)": (lambda s: s.update(extra=torch.ones(1)), {}),
    r"attn.conv.weight of shape .*conv_kernel_size=5": (lambda s: None, {"conv_kernel_size": None}),
    r"unexpected key W_q.bias .*construct the module with bias=True": (lambda s: None, {"bias": False}),
    r"size mismatch for attn.conv.weight: expected \(3, 1, 7, 1\), got \(3, 1, 5, 1\)": (
        lambda s: None,
        {"conv_kernel_size": 7},
    ),
    rf"size mismatch for W_k.weight: expected \({E}, {E}\), got \(1, {E}\)": (
        lambda s: s.update({"W_k.weight": torch.ones(1, E)}),
        {},
    ),
    r"size mismatch for W_v.bias": (lambda s: s.update({"W_v.bias": torch.ones(1)}), {}),
    r"bias_k \(1, 1, 24\) of the module has no counterpart": (
        lambda s: s.pop("attn.conv.weight"),
        {"add_bias_kv": True, "conv_kernel_size": None},
    ),
}


@pytest.mark.parametrize("message", MISFITS)
def test_misfitting_checkpoints_change_nothing(message):
    damage, options = MISFITS[message]
    state = checkpoint("official")
    damage(state)
    module = ours("official", **options)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(RuntimeError, match="(?s)official state_dict.*unchanged.*" + message):
        compat.load_state_dict(module, state, "official")
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_other_checkpoint_errors():
    module = ours("official")
    with pytest.raises(ValueError, match="unknown source 'timm'; known are official, huggingface, lucidrains, "):
        compat.load_state_dict(module, {}, "timm")
    with pytest.raises(RuntimeError, match=r"no key starts with 'mha.'; the first keys are \['W_q.weight', "):
        compat.load_state_dict(module, checkpoint("official"), "official", prefix="mha.")
    with pytest.raises(RuntimeError, match="(?s)missing key to_qkv.weight.*unexpected key W_q.weight"):
        compat.load_state_dict(module, checkpoint("official"), "lucidrains")
    with pytest.raises(RuntimeError, match="model_state_dict is no tensor but dict"):
        compat.load_state_dict(module, {"model_state_dict": checkpoint("official")}, "official")
    with pytest.raises(TypeError, match="expected a NystromMultiheadAttention, got Sequential"):
        compat.load_state_dict(nn.Sequential(module), checkpoint("official"), "official")
    packed = ours("lucidrains", kdim=16)
    with pytest.raises(RuntimeError, match=r"k_proj_weight \(24, 16\) of the module has no counterpart"):
        compat.load_state_dict(packed, checkpoint("lucidrains"), "lucidrains")


# The class that xformers removed


def folded(x):
    return x.flatten(0, 1)


@pytest.mark.parametrize("n, m", [(40, 8), (43, 8), (12, 16)])
@pytest.mark.parametrize("mask", ["none", "bool", "additive", "per head"])
@pytest.mark.parametrize("options", [{}, {"pinverse_original_init": True}, {"conv_kernel_size": TAPS}])
def test_xformers_class(n, m, mask, options):
    *qkv, _ = inputs = tensors(n)
    module = NystromAttention(0.0, H, num_landmarks=m, **options).double()
    keep = keep_mask(n)
    forms = {"none": None, "bool": keep, "additive": additive(keep)}
    forms["per head"] = additive(keep).repeat_interleave(H, 0)[:, None]
    actual = module(*map(folded, qkv), forms[mask])
    weight = module.skip_connection.weight if "conv_kernel_size" in options else None
    original = {key: value for key, value in options.items() if key != "conv_kernel_size"}
    expected = released("xformers", *qkv, m, weight, None if mask == "none" else keep, **original)
    assert_same(actual, folded(expected), inputs[:3])


def test_xformers_class_is_fused_where_it_can_be(fused_calls):
    *qkv, _ = tensors(40)
    module = NystromAttention(0.0, H, num_landmarks=8, conv_kernel_size=TAPS).double()
    module(*map(folded, qkv))
    assert len(fused_calls) == 1
    module(*map(folded, qkv), key_padding_mask=keep_mask(40))
    assert len(fused_calls) == 1


def test_xformers_class_across_heads():
    """Users pass (B, n, heads, d): with as many landmarks as heads it is exact attention across the heads."""
    *qkv, _ = tensors(7)
    module = NystromAttention(0.0, 7, num_landmarks=128)
    assert_close(module(*qkv), nn.functional.scaled_dot_product_attention(*qkv))
    with pytest.raises(ValueError, match=r"expected q, k, v of shape \(batch \* heads, tokens, features\)"):
        NystromAttention(0.0, 7, num_landmarks=6)(*qkv)


def test_xformers_class_keeps_modules_and_state():
    *qkv, _ = tensors(40)
    pooling = nn.AdaptiveAvgPool2d((8, None))  # the default of early versions, the same where n % m == 0
    skip = nn.Identity()
    module = NystromAttention(0.0, H, 8, pooling, v_skip_connection=skip, conv_kernel_size=TAPS)
    assert module.landmark_pooling is pooling and module.skip_connection is skip and not module.state_dict()
    expected = released("xformers", *qkv, 8) + qkv[2]
    assert_close(module(*map(folded, qkv)), folded(expected))
    module = NystromAttention(dropout=1.0, num_heads=H, num_landmarks=8, conv_kernel_size=TAPS).double()
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == {
        "skip_connection.weight": (H, 1, TAPS, 1)
    }
    assert not module(*map(folded, qkv)).any() and module.eval()(*map(folded, qkv)).any()
    causal = NystromAttention(0.0, H, 8, causal=True, inv_iterations=3)
    expected = released("xformers", *qkv, 8, causal=True, iterations=3)
    assert_close(causal(*map(folded, qkv)), folded(expected))
    exact = NystromAttention(0.0, H, 8, use_razavi_pinverse=False)
    assert_close(exact(*map(folded, qkv)), folded(released("xformers", *qkv, 8, use_razavi_pinverse=False)))


@pytest.mark.parametrize("found", ["nothing", "a module without the class", "the class"])
def test_install_serves_the_removed_import(found, monkeypatch):
    name = "xformers.components.attention"
    theirs = ModuleType(name)
    if found == "the class":
        theirs.NystromAttention = object

    def find(_):
        if found == "nothing":
            raise ModuleNotFoundError(name)
        return theirs

    monkeypatch.setitem(sys.modules, name, theirs)
    if found == "nothing":
        del sys.modules[name]
    monkeypatch.setattr(importlib, "import_module", find)
    install()
    from xformers.components.attention import NystromAttention as imported

    assert imported is (object if found == "the class" else compat.XformersNystromAttention)


# The installed peers themselves


ANY_PEER = [(40, 8, None), (40, 8, "holes"), (40, 8, "tail"), (40, 40, "tail")]
LUCIDRAINS = [(43, 8, None), (43, 8, "holes"), (5, 8, None), (5, 8, "tail"), (40, 8, "empty sample")]
PEER_CASES = [*itertools.product(installed.PEERS, ANY_PEER), *(("lucidrains", case) for case in LUCIDRAINS)]


@pytest.mark.parametrize("name, case", PEER_CASES)
def test_installed_peer(name, case):
    pytest.importorskip({"lucidrains": "nystrom_attention", "huggingface": "transformers"}[name])
    n, m, mask = case
    torch.manual_seed(0)
    original = installed.PEERS[name](H * D, H, m, TAPS, n)
    x = 3 * torch.randn(B, n, H * D, dtype=f64)
    x.requires_grad_()
    mask = None if mask is None else keep_mask(n, mask)
    conv = original.conv_weight
    for fused in (True, False):
        actual = compat.attention(name, *original.project(x), mask, num_landmarks=m, conv_weight=conv, fused=fused)
        assert_same(actual, original.attend(x, mask), [x, conv])


def test_checkpoint_of_the_installed_lucidrains():
    peers = pytest.importorskip("nystrom_attention")
    torch.manual_seed(0)
    original = peers.NystromAttention(H * D, D, H, num_landmarks=8, residual_conv_kernel=TAPS).double()
    module = ours("lucidrains")
    compat.load_state_dict(module, original.state_dict(), "lucidrains")
    x = torch.randn(B, 40, H * D, dtype=f64)
    assert_close(module(x, x, x, need_weights=False)[0], original(x))


def test_checkpoint_of_the_installed_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": H * D, "num_attention_heads": H, "intermediate_size": 8, "num_hidden_layers": 2}
    config = transformers.NystromformerConfig(
        **sizes, vocab_size=9, num_landmarks=8, segment_means_seq_len=40, conv_kernel_size=TAPS
    )
    model = transformers.NystromformerModel(config).double().eval()
    module = ours("huggingface")
    compat.load_state_dict(module, model.state_dict(), "huggingface", prefix="encoder.layer.1.attention.")
    layer = model.encoder.layer[1].attention
    x = torch.randn(B, 40, H * D, dtype=f64)
    expected = layer.output.dense(layer.self(x)[0])
    assert_close(module(x, x, x, need_weights=False)[0], expected)


def test_parity_table(capsys):
    pytest.importorskip("rich")
    from peers import __main__ as table

    table.main()
    shown = capsys.readouterr().out
    assert all(name in shown for name in SELF)
    for case in table.CASES:
        *_, fused, pytorch = table.row(case)
        assert float(pytorch) < 1e-12 and (fused == "–" or float(fused) < 1e-12), case
