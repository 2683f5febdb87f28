"""nystrom_attention_varlen: each packed sequence is what a call for it alone gives, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from problems import DTYPES, bar, names, new_memory_is_nan, relative_rms
from torch import Tensor
from torch.library import opcheck

from nystrom_ext import nystrom_attention, nystrom_attention_varlen, reference

OPS = torch.ops.nystrom_ext
LENGTHS = (40, 3, 0, 65, 9)  # beyond m = 8 and below; none
LONG = (1030, 1, 0, 2300, 8, 1024)  # several chunks, for m = 8 of 1024 tokens
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 4, "pinned": 1},
    "window-only": {"window": 2},
    "pins-only": {"pinned": 3},
    "everything pinned": {"pinned": 50, "window": 1},
    "grouped": {"enable_gqa": True},
    "grouped, window": {"enable_gqa": True, "window": 3},
    "scale": {"scale": 0.3, "pinv_iterations": 4},
    "exact": {"num_landmarks": 10**6},
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


def pad(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(total, H, d) -> (B, H, longest, d), NaN where there is nothing."""
    batch = torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True, padding_value=torch.nan)
    return batch.transpose(1, 2)


def unpad(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([row.transpose(0, 1)[:n] for row, n in zip(x, lengths, strict=True)])


def as_padded_batch(
    x: list[Tensor], lengths: tuple[int, ...], attention: Any = nystrom_attention, **options: Any
) -> Tensor:
    ignored = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    return unpad(
        attention(*(pad(t, lengths) for t in x), ignored, query_padding_mask=ignored, **options),
        lengths,
    )


def same_bits(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def with_gradients(out: Tensor, x: list[Tensor], direction: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, x, direction)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_packed_self_attention(name: str, dtype: torch.dtype, device: str) -> None:
    options = {"num_landmarks": 8, **OPTIONS[name]}
    kv_heads = 2 if "grouped" in name else 4
    x = [packed(LENGTHS, heads, dtype, device) for heads in (4, kv_heads, kv_heads)]
    cu, longest = offsets(LENGTHS, device=device), max(LENGTHS)
    direction = torch.randn(sum(LENGTHS), 4, 16).to(device, dtype)
    with new_memory_is_nan():
        out = nystrom_attention_varlen(*x, cu, cu, longest, longest, **options)
        actual = with_gradients(out, x, direction)
    expected = with_gradients(one_by_one(*x, LENGTHS, LENGTHS, **options), x, direction)
    assert same_bits(actual, expected)


@pytest.mark.parametrize("name", ["plain", "window", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks(name: str, dtype: torch.dtype) -> None:
    """Sequences of several chunks between short ones, on every number of threads."""
    options = {"num_landmarks": 8, **OPTIONS[name]}
    x = [packed(LONG, heads, dtype, d=8) for heads in (2, 1 if name == "grouped" else 2, 1 if name == "grouped" else 2)]
    cu, direction = offsets(LONG), torch.randn(sum(LONG), 2, 8).to(dtype)
    expected = with_gradients(one_by_one(*x, LONG, LONG, **options), x, direction)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out = nystrom_attention_varlen(*x, cu, cu, **options)
        assert same_bits(with_gradients(out, x, direction), expected)


@pytest.mark.parametrize("lengths", [LENGTHS, LONG], ids=["short", "chunks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolution(dtype: torch.dtype, lengths: tuple[int, ...], device: str) -> None:
    """Over each sequence by itself. Its gradient sums over the sequences: in the order of a padded batch."""
    if max(lengths) > 100 and (device != "cpu" or dtype not in (torch.float32, torch.bfloat16)):
        return
    x = [packed(lengths, 2, dtype, device) for _ in range(3)]
    weight = torch.randn(2, 5).to(device, dtype).requires_grad_()
    cu, options = offsets(lengths, device=device), {"num_landmarks": 8, "conv_weight": weight}
    direction = torch.randn(sum(lengths), 2, 16).to(device, dtype)
    out = nystrom_attention_varlen(*x, cu, cu, max(lengths), max(lengths), **options)
    *actual, dconv = with_gradients(out, [*x, weight], direction)
    expected = with_gradients(one_by_one(*x, lengths, lengths, **options), x, direction)
    assert same_bits(actual, expected)
    if device == "cpu":
        assert torch.equal(dconv, torch.autograd.grad(as_padded_batch(x, lengths, **options), weight, direction)[0])


@pytest.mark.parametrize("options", [{"window": 3, "pinned": 2}, {}], ids=["window", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dropout_is_that_of_a_padded_batch(dtype: torch.dtype, options: dict[str, int]) -> None:
    """Entries are numbered by sequence, head and position in the sequence; the reference draws the same."""
    x, cu = [packed(LENGTHS, 2, dtype) for _ in range(3)], offsets(LENGTHS)
    direction = torch.randn(sum(LENGTHS), 2, 16).to(dtype)
    options, results = {"num_landmarks": 8, "dropout_p": 0.4, **options}, []
    for packed_tokens in (True, False):
        torch.manual_seed(7)
        out = (
            nystrom_attention_varlen(*x, cu, cu, **options) if packed_tokens else as_padded_batch(x, LENGTHS, **options)
        )
        results.append(with_gradients(out, x, direction))
    assert same_bits(*results)
    torch.manual_seed(7)
    rng_state, exact = torch.randint(2**63 - 1, (2,)), [t.detach().double().requires_grad_() for t in x]
    expected = as_padded_batch(
        [torch.nan_to_num(t) for t in exact],
        LENGTHS,
        reference.nystrom_attention,
        rng_state=rng_state,
        **options,
    )
    for name, a, e in zip(names(x), results[0], with_gradients(expected, exact, direction.double()), strict=True):
        assert relative_rms(a, e) <= bar(name, dtype), name


@pytest.mark.parametrize("options", [{"window": 3, "pinned": 2}, {}], ids=["window", "plain"])
def test_global_coefficient_is_that_of_a_padded_batch(options: dict[str, int]) -> None:
    x, cu = [packed(LENGTHS, 2, torch.float32) for _ in range(3)], offsets(LENGTHS)
    options = {"num_landmarks": 8, "coefficient": "global", **options}
    direction = torch.randn(sum(LENGTHS), 2, 16)
    outs = nystrom_attention_varlen(*x, cu, cu, **options), as_padded_batch(x, LENGTHS, **options)
    assert same_bits(*(with_gradients(out, x, direction) for out in outs))
    assert not torch.equal(outs[0], one_by_one(*x, LENGTHS, LENGTHS, **options)), "the control: sequences are coupled"


@pytest.mark.parametrize("name", ["plain", "window", "grouped, window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_neighbours_hold(name: str, dtype: torch.dtype) -> None:
    """NaN and infinity beside a sequence, in the inputs and in the gradient that arrives, change none of its bits."""
    options = {"num_landmarks": 8, "conv_weight": torch.randn(4, 5).to(dtype), **OPTIONS[name]}
    lengths, kv_heads = (20, 40, 3, 30), 2 if "grouped" in name else 4
    x = [packed(lengths, heads, dtype) for heads in (4, kv_heads, kv_heads)]
    cu, direction = offsets(lengths), torch.randn(sum(lengths), 4, 16).to(dtype)

    def call(x: list[Tensor], direction: Tensor) -> list[Tensor]:
        return with_gradients(nystrom_attention_varlen(*x, cu, cu, **options), x, direction)

    expected = call(x, direction)
    for kept, content in itertools.product(range(len(lengths)), (torch.nan, torch.inf)):
        mine = torch.repeat_interleave(torch.arange(len(lengths)) == kept, torch.tensor(lengths))
        spoilt = [t.detach().masked_fill(~mine[:, None, None], content) for t in (*x, direction)]
        actual = call([t.requires_grad_() for t in spoilt[:3]], spoilt[3])
        assert same_bits([a[mine] for a in actual], [e[mine] for e in expected])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_cross_attention(dtype: torch.dtype, device: str) -> None:
    """A longest length above the longest changes nothing either."""
    q_lengths, k_lengths = (30, 0, 5, 20, 0), (4, 50, 60, 0, 0)
    q = packed(q_lengths, 2, torch.float32, device)
    k, v = (packed(k_lengths, 2, torch.float32, device) for _ in range(2))
    cu = [offsets(lengths, dtype, device) for lengths in (q_lengths, k_lengths)]
    direction = torch.randn(sum(q_lengths), 2, 16, device=device)
    with new_memory_is_nan():
        out = nystrom_attention_varlen(q, k, v, *cu, 30, 77, num_landmarks=8)
        actual = with_gradients(out, [q, k, v], direction)
    expected = with_gradients(one_by_one(q, k, v, q_lengths, k_lengths, num_landmarks=8), [q, k, v], direction)
    assert same_bits(actual, expected)


@pytest.mark.parametrize("longest", [(65, 65), (65, 99), (10**9, 65)], ids=str)
def test_equal_offsets_in_two_tensors_are_self_attention(longest: tuple[int, int]) -> None:
    x = [packed(LENGTHS, 2, torch.float32) for _ in range(3)]
    options = {"num_landmarks": 8, "window": 3, "conv_weight": torch.randn(2, 3)}
    out = nystrom_attention_varlen(*x, offsets(LENGTHS), offsets(LENGTHS, torch.int64), *longest, **options)
    direction = torch.randn_like(out)
    expected = with_gradients(one_by_one(*x, LENGTHS, LENGTHS, **options), x, direction)
    assert same_bits(with_gradients(out, x, direction), expected)


@pytest.mark.parametrize("lengths", [(0,), (0, 0), (5,), (100,)], ids=str)
def test_few_tokens(lengths: tuple[int, ...]) -> None:
    x, cu = [packed(lengths, 2, torch.float32) for _ in range(3)], offsets(lengths)
    out = nystrom_attention_varlen(*x, cu, cu, num_landmarks=8)
    direction = torch.randn_like(out)
    expected = with_gradients(one_by_one(*x, lengths, lengths, num_landmarks=8), x, direction)
    assert same_bits(with_gradients(out, x, direction), expected)


def test_thousands_of_short_sequences() -> None:
    lengths = tuple(torch.randint(0, 30, (3000,)).tolist())
    x, cu = [packed(lengths, 1, torch.float32, d=4) for _ in range(3)], offsets(lengths)
    out = nystrom_attention_varlen(*x, cu, cu, num_landmarks=16)
    direction = torch.randn_like(out)
    expected = with_gradients(one_by_one(*x, lengths, lengths, num_landmarks=16), x, direction)
    assert same_bits(with_gradients(out, x, direction), expected)


def test_views_of_one_projection(device: str) -> None:
    """(total, 3, H, d), as a packed projection gives it, is read where it is."""
    qkv = torch.randn(sum(LENGTHS), 3, 2, 16, device=device, requires_grad=True)
    cu = offsets(LENGTHS, device=device)
    out = nystrom_attention_varlen(*qkv.unbind(1), cu, cu, 65, 65, num_landmarks=8)
    assert out.is_contiguous()
    plain = [x.detach().contiguous().requires_grad_() for x in qkv.unbind(1)]
    direction = torch.randn_like(out)
    expected = with_gradients(nystrom_attention_varlen(*plain, cu, cu, 65, 65, num_landmarks=8), plain, direction)
    actual = with_gradients(out, [qkv], direction)
    assert same_bits([actual[0], *actual[1].unbind(1)], expected)


def test_gradcheck() -> None:
    lengths = (12, 3, 7)
    x = [packed(lengths, 1, torch.float64, d=4) for _ in range(3)]
    cu = offsets(lengths)
    assert torch.autograd.gradcheck(
        lambda q, k, v: nystrom_attention_varlen(q, k, v, cu, cu, 12, 12, num_landmarks=4, window=1, pinned=1), x
    )


def test_what_is_saved_for_backward() -> None:
    """The tokens themselves, no padded batch of them: inputs, offsets, m-sized buffers."""
    lengths, saved = (1500, 20, 30, 10), []
    x, cu = [packed(lengths, 2, torch.float32) for _ in range(3)], offsets(lengths)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nystrom_attention_varlen(*x, cu, cu, 1500, 1500, num_landmarks=8)
    inputs = sum(t.data_ptr() in {s.data_ptr() for s in x} for t in saved)
    sizes = sum(t.numel() for t in saved) - 3 * x[0].numel()
    assert inputs == 3 and sizes == 2 * len(cu) + len(lengths) * 2 * 8 * (4 * 16 + 1)


@pytest.mark.parametrize("wanted", [(), (0, 1, 2)], ids=["none", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 3, "pinned": 1}, {"coefficient": "global"}], ids=str)
def test_opcheck(options: dict[str, Any], dtype: torch.dtype, wanted: tuple[int, ...], device: str) -> None:
    x = [packed(LENGTHS, 2, dtype, device).detach().requires_grad_(i in wanted) for i in range(3)]
    cu = offsets(LENGTHS, device=device)
    weight = torch.randn(2, 3).to(device, dtype).requires_grad_(bool(wanted))
    kwargs = {"num_landmarks": 8, "conv_weight": weight, **options}
    opcheck(OPS.attention_varlen.default, (*x, cu, cu, 65, 65), kwargs)


@pytest.mark.parametrize("window", [0, 3])
def test_opcheck_internal(window: int, device: str) -> None:
    x = [packed(LENGTHS, 2, torch.float32, device).detach().transpose(0, 1)[None] for _ in range(3)]
    cu, rng = offsets(LENGTHS, torch.int64, device), torch.tensor([1, 2], device=device)
    options = (8, 6, 0.3, 0.2, False, window, 0)
    inputs = (*x, None, None, None, rng, cu, cu, 65, 65)
    opcheck(OPS._attention_forward.default, (*inputs, *options))
    out, *saved = OPS._attention_forward(*inputs, *options)
    opcheck(OPS._attention_backward.default, (torch.randn_like(out), *inputs, *saved, *options))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_once_for_all_lengths(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(nystrom_attention_varlen, fullgraph=True, dynamic=True, backend=backend)
    options = {"num_landmarks": 8, "window": 2, "pinned": 1}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((20, 3), (31, 0, 9), (7, 8, 5, 4), (100, 2)):
            x, cu = [packed(lengths, 2, torch.float32) for _ in range(3)], offsets(lengths)
            out = compiled(*x, cu, cu, max(lengths), max(lengths), **options)
            direction = torch.randn_like(out)
            expected = with_gradients(one_by_one(*x, lengths, lengths, **options), x, direction)
            assert same_bits(with_gradients(out, x, direction), expected)


def test_export_with_dynamic_lengths() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, cu: Tensor, longest: int) -> Tensor:
            return nystrom_attention_varlen(x, x, x, cu, cu, longest, longest, num_landmarks=8)

    tokens, samples = torch.export.Dim("tokens", min=2, max=10**6), torch.export.Dim("samples", min=3, max=10**4)
    x, cu = packed((20, 3), 2, torch.float32).detach(), offsets((20, 3))
    shapes = {"x": {0: tokens}, "cu": {0: samples}, "longest": torch.export.Dim.DYNAMIC}
    program = torch.export.export(Layer(), (x, cu, 20), dynamic_shapes=shapes)
    assert any("nystrom_ext.attention_varlen" in str(node.target) for node in program.graph.nodes)
    for lengths in ((31, 0, 9), (5, 5)):
        y, cu = packed(lengths, 2, torch.float32).detach(), offsets(lengths)
        assert torch.equal(program.module()(y, cu, max(lengths)), Layer()(y, cu, max(lengths)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    x, cu = [packed(LENGTHS, 2, torch.float32) for _ in range(3)], offsets(LENGTHS)
    weight = torch.randn(2, 3)
    with torch.autocast("cpu", dtype):
        out = nystrom_attention_varlen(*x, cu, cu, conv_weight=weight, num_landmarks=8)
    expected = nystrom_attention_varlen(
        *(t.to(dtype) for t in x), cu, cu, conv_weight=weight.to(dtype), num_landmarks=8
    )
    assert out.dtype == dtype and torch.equal(out, expected)
    assert [g.dtype for g in torch.autograd.grad(out.float().sum(), x)] == [torch.float32] * 3


def test_meta_tensors() -> None:
    x, cu = torch.empty(10, 2, 8, device="meta"), torch.empty(3, dtype=torch.int32, device="meta")
    assert nystrom_attention_varlen(x, x, x[..., :5], cu, cu, 6, 6).shape == (10, 2, 5)


GOOD = {
    **dict.fromkeys(("query", "key", "value"), torch.randn(10, 2, 8)),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, 4, 10])),
    **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), 6),
}


@pytest.mark.parametrize("longest", [6, torch.tensor(6), torch.tensor(6, dtype=torch.int32), None], ids=repr)
def test_longest_lengths(longest: Any) -> None:
    out = nystrom_attention_varlen(**{**GOOD, "max_seqlen_q": longest, "max_seqlen_k": longest}, num_landmarks=2)
    assert torch.equal(out, nystrom_attention_varlen(**GOOD, num_landmarks=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 4, 9])}, "got 9 at place 2 of 2 after 4 for 10 tokens and max_seqlen_q = 6"),
        ({"cu_seqlens_q": torch.tensor([1, 4, 10])}, "rise from 0 .*, got 1 at place 0"),
        ({"cu_seqlens_q": torch.tensor([0, 12, 10])}, "rise from 0 .*, got 12 at place 1"),
        ({"cu_seqlens_k": torch.tensor([0, 5, 4, 10])[[0, 2, 3]].neg()}, "cu_seqlens_k must rise .*, got -4"),
        ({"max_seqlen_q": 5}, "max_seqlen_q = 5"),
        ({"max_seqlen_k": -1}, "max_seqlen_k = -1"),
        ({"cu_seqlens_q": torch.tensor([0.0, 4, 10])}, r"dtype int32 or int64, got \[3\] of Float"),
        ({"cu_seqlens_q": torch.tensor([[0, 10]])}, r"shape \(sequences \+ 1\)"),
        ({"cu_seqlens_q": torch.tensor([0])}, r"shape \(sequences \+ 1\)"),
        ({"cu_seqlens_k": torch.tensor([0, 10]), "max_seqlen_k": 10}, "as many sequences, got 2 and 1"),
        ({"query": torch.randn(1, 2, 10, 8)}, r"query must have shape \(tokens, heads, features\)"),
        ({"key_padding_mask": torch.zeros(2, 6)}, "no padding, got key_padding_mask"),
        ({"query_padding_mask": torch.zeros(2, 6)}, "no padding, got query_padding_mask"),
        ({"num_landmarks": 0}, "num_landmarks"),
        ({"value": torch.randn(9, 2, 8)}, "same number of tokens, got 10 and 9"),
        ({"key": torch.randn(10, 1, 8), "value": torch.randn(10, 1, 8)}, "pass enable_gqa=True"),
        ({"max_seqlen_q": 6.0}, r"max_seqlen_q must be an integer or a tensor of one .*, got 6\.0"),
        ({"max_seqlen_k": torch.tensor([6, 6])}, r"max_seqlen_k must be an integer or a tensor of one .*, got tensor"),
        ({"cu_seqlens_q": [0, 4, 10]}, "cu_seqlens_q must be a tensor, got list"),
        ({"window": 2, "cu_seqlens_k": torch.tensor([0, 5, 10])}, "need self-attention, got cu_seqlens_q and"),
        ({"pinned": 2, "cu_seqlens_k": torch.tensor([0, 5, 10])}, "need self-attention, got cu_seqlens_q and"),
        ({"conv_weight": torch.randn(2, 3), "cu_seqlens_k": torch.tensor([0, 5, 10])}, "conv_weight, window and"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nystrom_attention_varlen(**{**GOOD, **change})
