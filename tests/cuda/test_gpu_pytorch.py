"""PyTorch's machinery on a GPU: determinism, streams, CUDA graphs, memory, opcheck, compile, autocast, devices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from problems import DTYPES, Problem, padding_mask, run
from test_registration import Layer, test_opcheck_internal, test_opcheck_public  # noqa: F401  (collected here too)
from test_varlen import (  # noqa: F401
    test_convolution,
    test_cross_attention,
    test_opcheck,
    test_packed_self_attention,
    test_views_of_one_projection,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nystrom_ext import NystromMultiheadAttention, nystrom_attention

DEVICE = "cuda"
REPETITIONS = 1000
STEPS = {
    "plain": Problem(B=2, H=4, L=1500, m=64, d=64),
    "masked, convolution": Problem(B=3, H=2, L=1500, m=64, d=64, taps=33, mask="holes"),
    "grouped, global": Problem(B=2, H=4, L=700, m=32, d=32, kv_heads=2, options={"coefficient": "global"}),
    "exact, dropout": Problem(B=2, H=3, L=50, m=64, mask="tail", options={"dropout_p": 0.3}),
    "window, pinned": Problem(B=2, H=2, L=900, m=32, d=64, mask="holes", options={"window": 16, "pinned": 1}),
    "m = 128": Problem(B=1, H=2, L=900, m=128, d=64, mask="holes"),
}


def step(p: Problem, dtype: torch.dtype) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """Inputs, and the forward and backward pass over them, with nothing left to move to the GPU."""
    x = [t.detach().to(DEVICE).requires_grad_() for t in p.tensors(dtype)]
    grad = torch.randn(*x[0].shape[:3], x[2].shape[3], device=DEVICE).to(dtype)
    keys, queries = (None if mask is None else mask.to(DEVICE) for mask in p.masks())

    def both() -> list[Tensor]:
        out = nystrom_attention(
            *x[:3],
            keys,
            query_padding_mask=queries,
            conv_weight=x[3] if p.taps else None,
            num_landmarks=p.m,
            enable_gqa=p.kv_heads is not None,
            **p.options,
        )
        return [out.detach(), *torch.autograd.grad(out, x, grad)]

    return x, both


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@contextmanager
def busy_stream() -> Iterator[Callable[[], None]]:
    """A function that queues work on another stream."""
    stream, a = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE)
    stream.wait_stream(torch.cuda.current_stream())

    def work() -> None:
        with torch.cuda.stream(stream):
            torch.mm(a, a)

    yield work
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["masked, convolution", "grouped, global", "m = 128"])
def test_repetitions_beside_a_busy_stream_are_equal_to_the_bit(name: str, dtype: torch.dtype) -> None:
    _, both = step(STEPS[name], dtype)
    first, different = both(), torch.zeros((), dtype=torch.long, device=DEVICE)
    with busy_stream() as work:
        for _ in range(REPETITIONS):
            work()
            for a, b in zip(first, both(), strict=True):
                different += (a != b).sum()
    assert different.item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_never_waits_for_the_gpu(name: str, dtype: torch.dtype) -> None:
    _, both = step(STEPS[name], dtype)
    both()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_cuda_graph(name: str, dtype: torch.dtype) -> None:
    """Captured once; a replay with new inputs gives what a call gives."""
    p = STEPS[name]
    x, both = step(p, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    with torch.no_grad():
        for t in x:
            t.copy_(torch.randn_like(t))
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([t.clone() for t in captured])
    if p.options.get("dropout_p"):
        assert not torch.equal(replays[0][0], replays[1][0]), "each replay must draw its own dropout"
    else:
        assert same(replays[0], replays[1]) and same(replays[0], both())


def test_uses_the_current_stream() -> None:
    x, both = step(STEPS["masked, convolution"], torch.float32)
    with torch.no_grad():
        x[0].mul_(2)
    expected = both()
    with torch.no_grad():
        x[0].mul_(0.5)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # a kernel on the default stream would run before the inputs are ready
        with torch.no_grad():
            x[0].mul_(2)
        results = both()
    torch.cuda.synchronize()
    assert same(results, expected)


@pytest.mark.parametrize("name", STEPS)
def test_no_memory_is_lost(name: str) -> None:
    _, both = step(STEPS[name], torch.bfloat16)
    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = torch.cuda.max_memory_allocated()
    for _ in range(100):
        both()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() == peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_linear_in_the_length(dtype: torch.dtype) -> None:
    """Beyond inputs, result and gradients: m-sized buffers and partial sums (csrc/mathematics.md), no n x m matrix."""
    peaks = []
    for n in (16_384, 32_768):
        p = Problem(B=1, H=2, L=n, m=64, d=64)
        x, both = step(p, dtype)
        both()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        peaks.append(torch.cuda.max_memory_allocated() - before - 4 * x[0].nbytes)
    assert peaks[1] <= 2 * peaks[0] + 2**20 and peaks[1] < 2 * 32_768 * 64 * 4


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile_without_graph_breaks(mode: str) -> None:
    torch._dynamo.reset()
    layer = Layer(num_landmarks=16).to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, dynamic=mode == "default", mode=mode)
    for n in (100, 131, 257):
        p = Problem(L=n, d=16, mask="holes")
        x, mask = [t.detach().to(DEVICE).requires_grad_() for t in p.tensors(torch.float32)], p.masks()[0].to(DEVICE)
        results = []
        for f in (layer, compiled, compiled):
            out = f(*x, mask)
            gradients = torch.autograd.grad(out.sum(), [*x, layer.scale])
            results.append([t.detach().clone() for t in (out, *gradients)])
        for a, b, c in zip(*results, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(c, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_inputs_together(dtype: torch.dtype) -> None:
    p = Problem(L=100, taps=3)
    x = [t.detach().to(DEVICE).requires_grad_() for t in p.tensors(torch.float32)]
    x[1] = x[1].detach().to(dtype).requires_grad_()
    with torch.autocast("cuda", dtype):
        out = nystrom_attention(*x[:3], conv_weight=x[3], num_landmarks=p.m)
    assert out.dtype == dtype
    expected = nystrom_attention(*(t.to(dtype) for t in x[:3]), conv_weight=x[3].to(dtype), num_landmarks=p.m)
    assert torch.equal(out, expected)
    assert [g.dtype for g in torch.autograd.grad(out.float().sum(), x)] == [t.dtype for t in x]


def test_activation_checkpointing_repeats_the_dropout() -> None:
    layer = Layer(num_landmarks=16, dropout_p=0.5).to(DEVICE)
    x = [t.detach().to(DEVICE).requires_grad_() for t in Problem(L=100).tensors(torch.float32)]
    results = []
    for wrap in (False, True):
        torch.manual_seed(1)
        out = checkpoint(layer, *x, use_reentrant=False) if wrap else layer(*x)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), x)])
    assert same(*results)


def test_inference_mode_agrees_with_training() -> None:
    x, both = step(STEPS["plain"], torch.bfloat16)
    with torch.inference_mode():
        out = nystrom_attention(*x, num_landmarks=64)
    assert torch.equal(out, both()[0]) and not out.requires_grad


def test_module_agrees_with_the_cpu() -> None:
    torch.manual_seed(0)
    module = NystromMultiheadAttention(64, 4, batch_first=True, num_landmarks=16)
    there = copy.deepcopy(module).to(DEVICE)
    x, mask = torch.randn(2, 300, 64), padding_mask("tail", 2, 300)
    a, _ = module(x, x, x, key_padding_mask=mask, need_weights=False)
    b, _ = there(*[x.to(DEVICE)] * 3, key_padding_mask=mask.to(DEVICE), need_weights=False)
    torch.testing.assert_close(b.cpu(), a, rtol=1e-3, atol=1e-4)
    stock = nn.MultiheadAttention(64, 4, batch_first=True, device=DEVICE)
    there.load_state_dict(stock.state_dict())
    y = torch.randn(2, 16, 64, device=DEVICE)
    torch.testing.assert_close(there(y, y, y)[0], stock(y, y, y)[0], rtol=1e-3, atol=1e-4)


def test_devices_that_differ_are_refused() -> None:
    x = torch.randn(1, 1, 30, 8, device=DEVICE)
    with pytest.raises(ValueError, match="must be on one device, got cuda:0, cpu, cuda:0"):
        nystrom_attention(x, x.cpu(), x)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_device_that_is_not_the_current_one() -> None:
    p = STEPS["masked, convolution"]
    x = p.tensors(torch.float32)
    grad = torch.randn_like(x[0])
    results = [
        run(nystrom_attention, p, [t.detach().to(f"cuda:{i}").requires_grad_() for t in x], grad) for i in (0, 1)
    ]
    assert all(t.device.index == 1 for t in results[1])
    assert torch.cuda.current_device() == 0
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b.cpu(), a.cpu())
