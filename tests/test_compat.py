"""The mathematics of other implementations: compat against formulas written independently."""

from __future__ import annotations

import itertools

import pytest
import torch
from compat_problems import MASKED, SELF, B, assert_same, f64, keep_mask, tensors
from peers.formulas import additive, released
from torch import nn
from torch.testing import assert_close

from nystrom_ext import NystromMultiheadAttention, compat, nystrom_attention

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
    """16-bit types cost no more than the rounding of the output. Autocast decides the output's dtype, fused or not."""
    q, k, v, weight = (x.detach().to(dtype) for x in tensors(40))
    expected = released(name, *(x.double() for x in (q, k, v)), 8, weight.double())
    for fused, autocast in ((True, False), (False, False), (False, True), (True, True)):
        with torch.autocast("cpu", enabled=autocast):
            actual = compat.attention(name, q, k, v, num_landmarks=8, conv_weight=weight, fused=fused)
        assert actual.dtype == (torch.bfloat16 if autocast else dtype)
        if not (fused and autocast):  # which rounds the inputs too
            bar = 1e-4 if actual.dtype == torch.float32 else 0.6 * torch.finfo(actual.dtype).eps
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
