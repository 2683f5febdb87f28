"""flash-attn's function names and signatures."""

import functools
import inspect

import pytest
import torch

from nystrom_ext import nystrom_attention, nystrom_attention_varlen
from nystrom_ext.integrations.flash import flash_attn_func, flash_attn_varlen_func

B, L, H, D, M = 2, 40, 4, 8, 8
OFFSETS = torch.tensor([0, 25, 40], dtype=torch.int32)

# Positions count: flash-attn's callers pass dropout_p and softmax_scale without names.
POSITIONS = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs".split()
VARLEN = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return [torch.randn(B, L, heads, D, requires_grad=True) for heads in (H, 2, 2)]


def test_signatures():
    assert list(inspect.signature(flash_attn_func).parameters)[:-1] == ["q", "k", "v", *POSITIONS]
    names = list(inspect.signature(flash_attn_varlen_func).parameters)[:-1]
    assert names == ["q", "k", "v", *VARLEN, *POSITIONS, "block_table"]


def test_batches(qkv):
    out = functools.partial(flash_attn_func, num_landmarks=M, pinned=1)(*qkv, 0.0, 0.2, False, (3, 3))
    heads = [x.transpose(1, 2) for x in qkv]
    options = {"num_landmarks": M, "scale": 0.2, "enable_gqa": True, "window": 3, "pinned": 1}
    assert torch.equal(out, nystrom_attention(*heads, **options).transpose(1, 2))
    assert out.shape == (B, L, H, D)
    out.sum().backward()
    assert all(x.grad.any() for x in qkv)


def test_packed(qkv):
    packed = [x[0].detach() for x in qkv]
    out = flash_attn_varlen_func(*packed, OFFSETS, OFFSETS, 25, 25, num_landmarks=M)
    options = {"num_landmarks": M, "enable_gqa": True}
    assert torch.equal(out, nystrom_attention_varlen(*packed, OFFSETS, OFFSETS, 25, 25, **options))
    alone = flash_attn_func(*(x[None, 25:] for x in packed), num_landmarks=M)
    assert torch.equal(out[25:], alone[0])


@pytest.mark.parametrize(
    "name, value",
    [("causal", True), ("softcap", 30.0), ("alibi_slopes", torch.ones(H)), ("return_attn_probs", True)],
)
def test_what_is_refused(qkv, name, value):
    with pytest.raises(NotImplementedError, match=f"cannot honour flash-attn's {name}"):
        flash_attn_func(*qkv, **{name: value})
    with pytest.raises(NotImplementedError, match=f"cannot honour flash-attn's {name}"):
        flash_attn_varlen_func(*(x[0] for x in qkv), OFFSETS, OFFSETS, 25, 25, **{name: value})


def test_windows_with_two_sides_and_tables_are_refused(qkv):
    with pytest.raises(NotImplementedError, match=r"one window for both sides, got window_size=\(3, 0\)"):
        flash_attn_func(*qkv, window_size=(3, 0))
    with pytest.raises(NotImplementedError, match="block_table"):
        flash_attn_varlen_func(*(x[0] for x in qkv), OFFSETS, OFFSETS, 25, 25, block_table=torch.zeros(1))
