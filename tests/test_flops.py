"""FLOPs as torch counts them, and the operator in torch.profiler and torch.utils.benchmark."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from problems import Problem, run
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from nystrom_ext import nystrom_attention, nystrom_attention_varlen, reference

OPS = torch.ops.nystrom_ext


def counted(p: Problem, attention: Any = nystrom_attention, wanted: Sequence[int] = range(4)) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass."""
    x = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(p.tensors(torch.float32))]
    shape = p.B, p.H, p.L, p.e or p.d
    with FlopCounterMode(display=False) as forward:
        run(attention, p, [t.detach() for t in x], torch.ones(shape))
    with FlopCounterMode(display=False) as both:
        run(attention, p, x, torch.ones(shape))
    return forward.get_total_flops(), both.get_total_flops() - forward.get_total_flops()


@pytest.mark.parametrize("p", [Problem(L=300, e=12), Problem(L=300, S=500), Problem(L=300, H=4, kv_heads=2)], ids=str)
def test_against_the_products_of_the_reference(p: Problem) -> None:
    """Autograd keeps what the operator computes again: both scores, A, and the iteration."""
    forward, backward = counted(p, reference.nystrom_attention)
    again = 2 * p.B * p.H * ((p.L + p.keys + p.m) * p.m * p.d + 6 * 4 * p.m**3)
    assert counted(p) == (forward, backward + again)


@pytest.mark.parametrize("wanted", [w for n in range(1, 5) for w in itertools.combinations(range(4), n)], ids=str)
def test_gradients_that_nobody_wants_do_not_count(wanted: tuple[int, ...]) -> None:
    p = Problem(L=300, e=12, taps=3)
    products = 2 * p.B * p.H * 3 * 300 * 12 * ((2 in wanted) + (3 in wanted))
    if tokens := [i for i in wanted if i < 3]:
        products += counted(dataclasses.replace(p, taps=0), reference.nystrom_attention, tokens)[1]
        products += 2 * p.B * p.H * (2 * 300 * p.m * p.d + p.m**2 * p.d + 24 * p.m**3)
    assert counted(p, wanted=wanted)[1] == products


@pytest.mark.parametrize("taps", [0, 3])
def test_packed_sequences_count_as_calls_of_their_own(taps: int) -> None:
    lengths = (300, 6, 0, 40)
    alone = [counted(Problem(B=1, L=n, taps=taps)) for n in lengths if n]
    x = Problem(B=1, L=sum(lengths), taps=taps).tensors(torch.float32)
    packed, weight = [t[0].transpose(0, 1) for t in x[:3]], x[3] if taps else None
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    with FlopCounterMode(display=False) as flops:
        out = nystrom_attention_varlen(*packed, offsets, offsets, 300, 300, num_landmarks=8, conv_weight=weight)
        forward = flops.get_total_flops()
        out.sum().backward()
    assert (forward, flops.get_total_flops() - forward) == tuple(map(sum, zip(*alone, strict=True)))
    with torch.inference_mode(), FlopCounterMode(display=False) as flops:
        nystrom_attention_varlen(*packed, offsets, offsets, 300, 300, num_landmarks=8, conv_weight=weight)
    assert flops.get_total_flops() == forward


def test_packed_sequences_of_unknown_lengths_count_as_equal_ones() -> None:
    with torch._subclasses.FakeTensorMode(), FlopCounterMode(display=False) as flops:
        x, offsets = torch.empty(301, 2, 8), torch.empty(3, dtype=torch.long)
        nystrom_attention_varlen(x, x, x, offsets, offsets, 301, 301, num_landmarks=8)
    halves = [counted(Problem(B=1, L=n))[0] for n in (150, 151)]
    assert flops.get_total_flops() == sum(halves)


@pytest.mark.parametrize("p", [Problem(L=300, S=6, e=12), Problem(L=6, S=300), Problem(L=6)], ids=str)
def test_exact_attention_counts_as_torchs_own(p: Problem) -> None:
    query, key, value = (t.shape for t in p.tensors(torch.float32))
    out = (*query[:3], value[3])
    assert counted(p) == (sdpa_flop_count(query, key, value), sdpa_backward_flop_count(out, query, key, value))


def test_window_pinned_tokens_and_convolution_by_hand() -> None:
    B, H, n, d, e, m, w, p, taps = 2, 3, 50, 4, 5, 8, 3, 2, 7
    pairs = sum(abs(i - j) <= w for i in range(n) for j in range(p, n))
    forward = (m * (n - p) + n * (m + p) + pairs) * (d + e)  # key pass, query pass
    forward += m * m * (d + e) + 24 * m**3 + taps * n * e  # A, W; the iteration; the convolution
    backward = n * (m + p) * (3 * d + 2 * e)  # P1, dP1, dW, dQ, dKt
    backward += pairs * (2 * d + e) + pairs * (2 * d + 2 * e)  # P1, dP1, dQ; P1, dP1, dV, dK
    backward += m * m * (3 * d + 2 * e) + 72 * m**3  # A, dU, dZ, dQt, dKt; the iteration and its reverse
    backward += m * (n - p) * (3 * d + 2 * e) + 2 * taps * n * e
    problem = Problem(B=B, H=H, L=n, d=d, e=e, m=m, taps=taps, options={"window": w, "pinned": p})
    assert counted(problem) == (2 * B * H * forward, 2 * B * H * backward)
    everything = dataclasses.replace(problem, options={"window": 10 * n, "pinned": n})
    assert counted(everything)[0] == 2 * B * H * (n * n * (d + e) + taps * n * e)


def test_linear_in_the_length() -> None:
    short, long, longer = (counted(Problem(L=n, options={"window": 3, "pinned": 1})) for n in (1000, 2000, 3000))
    assert all(c - b == b - a > 0 for a, b, c in zip(short, long, longer, strict=True))


def test_inference_mode_and_modules_are_counted() -> None:
    p = Problem(L=300)
    x = [t.detach() for t in p.tensors(torch.float32)]
    with torch.inference_mode(), FlopCounterMode(display=False) as flops:
        nystrom_attention(*x, num_landmarks=p.m)
    assert flops.get_flop_counts()["Global"] == {OPS.attention: counted(p)[0]}


def test_profiler_names_the_operators_their_shapes_and_their_stages() -> None:
    x = [t.detach().requires_grad_() for t in Problem(L=300, S=200).tensors(torch.float32)]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiled:
        nystrom_attention(*x, num_landmarks=8).sum().backward()
    events = {event.name: event for event in profiled.events() if event.name.startswith("nystrom_ext::")}
    stages = ("landmarks", "key_pass", "core", "query_pass")
    names = {
        "attention",
        "_attention_forward",
        "_attention_backward",
        *stages,
        *(f"{name}_backward" for name in stages),
    }
    assert {name.removeprefix("nystrom_ext::") for name in events} == names
    shapes = [list(t.shape) for t in x]
    assert events["nystrom_ext::attention"].input_shapes[:3] == shapes
    assert events["nystrom_ext::_attention_forward"].input_shapes[:3] == shapes
    assert events["nystrom_ext::_attention_backward"].input_shapes[1:4] == shapes


def test_benchmark_timer() -> None:
    x = Problem(L=300).tensors(torch.float32)
    timer = Timer("attention(*x, num_landmarks=8)", globals={"attention": nystrom_attention, "x": x}, num_threads=1)
    assert timer.timeit(3).median > 0
