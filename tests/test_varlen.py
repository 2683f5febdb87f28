"""nystrom_attention_varlen: each packed sequence is what a call for it alone gives, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nystrom_ext import nystrom_attention, nystrom_attention_varlen

LENGTHS = (40, 3, 0, 65, 9)  # beyond m = 8 and below; none
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 4, "pinned": 1},
    "window-only": {"window": 2},
    "pins-only": {"pinned": 3},
    "grouped": {"enable_gqa": True},
    "scale": {"scale": 0.3, "pinv_iterations": 4},
}


def offsets(lengths: tuple[int, ...], dtype: torch.dtype = torch.int32, device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def packed(lengths: tuple[int, ...], heads: int, dtype: torch.dtype, device: str = "cpu", d: int = 16) -> Tensor:
    return torch.randn(sum(lengths), heads, d).to(device, dtype).requires_grad_()


def one_by_one(q: Tensor, k: Tensor, v: Tensor, q_lengths: tuple[int, ...], k_lengths: tuple[int, ...], **options: Any):
    """The definition: a call for each sequence."""
    parts = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
    outs = [nystrom_attention(*(x.transpose(0, 1)[None] for x in part), **options)[0] for part in parts]
    return torch.cat([out.transpose(0, 1) for out in outs])


def same_bits(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_packed_self_attention(name: str, dtype: torch.dtype, device: str) -> None:
    options = {"num_landmarks": 8, **OPTIONS[name]}
    kv_heads = 2 if name == "grouped" else 4
    x = [packed(LENGTHS, heads, dtype, device) for heads in (4, kv_heads, kv_heads)]
    cu, longest = offsets(LENGTHS, device=device), max(LENGTHS)
    direction = torch.randn(sum(LENGTHS), 4, 16).to(device, dtype)
    out = nystrom_attention_varlen(*x, cu, cu, longest, longest, **options)
    expected = one_by_one(*x, LENGTHS, LENGTHS, **options)
    assert torch.equal(out, expected)
    assert same_bits(*(list(torch.autograd.grad(y, x, direction)) for y in (out, expected)))


def test_convolution() -> None:
    """Over each sequence by itself; its gradient sums over the sequences, in another order than one by one."""
    x, weight = [packed(LENGTHS, 2, torch.float64) for _ in range(3)], torch.randn(2, 5, dtype=torch.float64)
    weight.requires_grad_()
    cu, longest, options = offsets(LENGTHS), max(LENGTHS), {"num_landmarks": 8, "conv_weight": weight}
    out, expected = (
        nystrom_attention_varlen(*x, cu, cu, longest, longest, **options),
        one_by_one(*x, LENGTHS, LENGTHS, **options),
    )
    assert torch.equal(out, expected)
    gradients = (torch.autograd.grad(y.square().sum(), [*x, weight]) for y in (out, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_cross_attention(dtype: torch.dtype) -> None:
    """A longest length above the longest changes nothing either."""
    q_lengths, k_lengths = (30, 0, 5), (4, 50, 60)
    q = packed(q_lengths, 2, torch.float32)
    k, v = (packed(k_lengths, 2, torch.float32) for _ in range(2))
    out = nystrom_attention_varlen(
        q, k, v, offsets(q_lengths, dtype), offsets(k_lengths, dtype), 30, 77, num_landmarks=8
    )
    assert torch.equal(out, one_by_one(q, k, v, q_lengths, k_lengths, num_landmarks=8))


def test_equal_offsets_in_two_tensors_are_self_attention() -> None:
    x = [packed(LENGTHS, 2, torch.float32) for _ in range(3)]
    out = nystrom_attention_varlen(*x, offsets(LENGTHS), offsets(LENGTHS), 65, 65, num_landmarks=8, window=3)
    assert torch.equal(out, one_by_one(*x, LENGTHS, LENGTHS, num_landmarks=8, window=3))


def test_gradcheck() -> None:
    lengths = (12, 3, 7)
    x = [packed(lengths, 1, torch.float64, d=4) for _ in range(3)]
    cu = offsets(lengths)
    assert torch.autograd.gradcheck(
        lambda q, k, v: nystrom_attention_varlen(q, k, v, cu, cu, 12, 12, num_landmarks=4, window=1, pinned=1), x
    )


def test_compiled_once_for_all_lengths() -> None:
    compiled = torch.compile(nystrom_attention_varlen, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((20, 3), (31, 0, 9)):
        x, cu = [packed(lengths, 2, torch.float32) for _ in range(3)], offsets(lengths)
        out = compiled(*x, cu, cu, max(lengths), max(lengths), num_landmarks=8, window=2, pinned=1)
        assert torch.equal(out, one_by_one(*x, lengths, lengths, num_landmarks=8, window=2, pinned=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 4, 9])}, r"got \[0, 4, 9\] for 10 tokens"),
        ({"cu_seqlens_q": torch.tensor([1, 4, 10])}, "rise from 0"),
        ({"cu_seqlens_q": torch.tensor([0, 12, 10])}, "rise from 0"),
        ({"max_seqlen_q": 5}, "max_seqlen_q = 5"),
        ({"cu_seqlens_q": torch.tensor([0.0, 4, 10])}, "dtype int32 or int64, got .* of torch.float32"),
        ({"cu_seqlens_q": torch.tensor([[0, 10]])}, r"shape \(sequences \+ 1\)"),
        ({"cu_seqlens_k": torch.tensor([0, 10]), "max_seqlen_k": 10}, "as many sequences, got 2 and 1"),
        ({"query": torch.randn(1, 2, 10, 8)}, r"query must have shape \(tokens, heads, features\)"),
        ({"key_padding_mask": torch.zeros(2, 6)}, "no padding, got key_padding_mask"),
        ({"num_landmarks": 0}, "num_landmarks"),
        ({"value": torch.randn(9, 2, 8)}, "same number of tokens, got 10 and 9"),
        ({"max_seqlen_q": 6.0}, r"max_seqlen_q must be an integer, got 6\.0"),
        ({"max_seqlen_k": None}, "max_seqlen_k must be an integer, got None"),
        ({"cu_seqlens_q": [0, 4, 10]}, "cu_seqlens_q must be a tensor, got list"),
        ({"window": 2, "max_seqlen_k": 7}, "got max_seqlen_q = 6 and max_seqlen_k = 7; pass the same"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    good = dict.fromkeys(("query", "key", "value"), torch.randn(10, 2, 8))
    cu = torch.tensor([0, 4, 10])
    arguments = {**good, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 6, "max_seqlen_k": 6}
    nystrom_attention_varlen(**arguments)
    with pytest.raises(ValueError, match=message):
        nystrom_attention_varlen(**{**arguments, **change})
