"""Backward computes what it is asked for and nothing else, and what it computes does not depend on what it is not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import EMULATED
from problems import DTYPES, Problem, new_memory_is_nan, padding_mask, run
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from nystrom_ext import nystrom_attention

OPS = torch.ops.nystrom_ext
NAMES = ("query", "key", "value", "conv")

# Every regime alone and beside the others, every option that has a gradient of its own on the way.
PROBLEMS = {
    "plain": Problem(L=100, m=16, d=20, e=7),
    "holes": Problem(B=3, L=90, m=8, mask="holes"),
    "a sample without keys": Problem(B=3, L=60, m=8, taps=3, mask="all"),
    "cross attention": Problem(L=130, S=75, m=16, mask="holes"),
    "few queries": Problem(L=5, S=100, m=8, mask="holes", options={"dropout_p": 0.3}),
    "few keys": Problem(L=100, S=7, m=8, mask="tail", options={"dropout_p": 0.3}),
    "exact samples beside, global": Problem(B=4, L=30, m=16, taps=4, mask="tail", options={"coefficient": "global"}),
    "global": Problem(B=3, L=70, m=16, mask="holes", options={"coefficient": "global"}),
    "grouped queries": Problem(H=6, kv_heads=2, L=130, m=16, taps=3, mask="holes"),
    "dropout": Problem(L=90, m=37, taps=5, options={"dropout_p": 0.3}),
    "wide values": Problem(L=90, m=8, d=8, e=72, taps=3),
    "wide keys": Problem(L=90, m=8, d=72, e=8, taps=3),
    "no iterations": Problem(L=50, m=8, options={"pinv_iterations": 0}),
    "several chunks": Problem(B=1, H=1, L=2100, m=16, taps=2, mask="tail"),
    "window": Problem(L=100, m=16, d=20, e=7, options={"window": 5}),
    "pinned": Problem(L=100, m=16, taps=3, options={"pinned": 3}),
    "window, exact samples beside": Problem(B=4, L=30, m=16, mask="tail", options={"window": 3, "pinned": 4}),
    "window, everything": Problem(
        H=4,
        kv_heads=2,
        L=130,
        m=16,
        taps=5,
        mask="holes",
        options={"window": 9, "pinned": 2, "dropout_p": 0.3, "coefficient": "global"},
    ),
    "everything pinned": Problem(L=50, m=4, options={"pinned": 10**9}),
}


def combinations(count: int) -> list[tuple[bool, ...]]:
    """All ways to want some of ``count`` gradients."""
    return [wanted for wanted in itertools.product((False, True), repeat=count) if any(wanted)]


def words(wanted: tuple[bool, ...]) -> str:
    return " ".join(itertools.compress(NAMES, wanted))


def leaves(p: Problem, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], Tensor]:
    x = [t.detach().to(device) for t in p.tensors(dtype)]
    return x, torch.randn(*x[0].shape[:3], x[2].shape[3]).to(x[0])


def gradients(p: Problem, x: list[Tensor], grad: Tensor, wanted: tuple[bool, ...]) -> list[Tensor]:
    torch.manual_seed(7)  # one dropout mask for all calls
    x = [t.detach().requires_grad_(w) for t, w in zip(x, wanted, strict=True)]
    with new_memory_is_nan():
        return run(nystrom_attention, p, x, grad)[1:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_same_bits_whatever_else_is_wanted(name: str, dtype: torch.dtype, device: str) -> None:
    p = PROBLEMS[name]
    x, grad = leaves(p, dtype, device)
    everything = gradients(p, x, grad, (True,) * len(x))
    assert all(g.isfinite().all() for g in everything)
    for wanted in combinations(len(x)):
        expected = list(itertools.compress(everything, wanted))
        for i, (a, b) in enumerate(zip(gradients(p, x, grad, wanted), expected, strict=True)):
            assert torch.equal(a, b), f"gradient {i} differs with only {words(wanted)} wanted"


@pytest.fixture
def asked() -> Iterator[list[tuple[bool, ...]]]:
    """The output_mask of every backward op that runs."""
    masks: list[tuple[bool, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is OPS._attention_backward.default:
                masks.append(tuple(args[-1]))
            return func(*args, **(kwargs or {}))

    with Watch():
        yield masks


MASKS = {"none": (), "keys": (0,), "queries": (1,), "both": (0, 1)}


def problem(which: str, requires: tuple[bool, ...]) -> tuple[Tensor, list[Tensor]]:
    """A call with some of its masks and all four tensors, of which some require gradients."""
    x = [t.detach().requires_grad_(r) for t, r in zip(Problem(taps=3).tensors(torch.float32), requires, strict=True)]
    mask = padding_mask("holes", 2, 40)
    keys, queries = (mask if i in MASKS[which] else None for i in range(2))
    options = {"query_padding_mask": queries, "conv_weight": x[3], "num_landmarks": 8, "self_attention": False}
    return nystrom_attention(*x[:3], keys, **options), x


@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("wanted", combinations(4), ids=words)
def test_the_op_is_asked_for_what_autograd_needs(
    which: str, wanted: tuple[bool, ...], asked: list[tuple[bool, ...]]
) -> None:
    out, x = problem(which, wanted)
    out.sum().backward()
    assert [t.grad is not None for t in x] == list(wanted)
    out, x = problem(which, (True,) * 4)  # all could have gradients, some are asked for
    chosen = list(itertools.compress(x, wanted))
    assert [g.shape for g in torch.autograd.grad(out.sum(), chosen)] == [t.shape for t in chosen]
    assert asked == [wanted] * 2


def arguments(p: Problem, dtype: torch.dtype) -> tuple[Any, ...]:
    """Those of `_attention_backward` before output_mask."""
    x, grad = leaves(p, dtype)
    inputs = (*x[:3], None, None, x[3] if p.taps else None, *(None,) * 3, 0, 0)  # no masks, dropout or packing
    options = (p.m, 6, 0.3, 0.0, False, p.options.get("window", 0), p.options.get("pinned", 0))
    _, *saved = OPS._attention_forward(*inputs, *options)
    return (grad, *inputs, *saved, *options)


@pytest.mark.parametrize("taps", [0, 3])
def test_what_is_not_asked_for_has_no_elements(taps: int) -> None:
    p = Problem(taps=taps)
    args = arguments(p, torch.float32)
    for wanted in (*combinations(4), (False,) * 4):
        result = OPS._attention_backward(*args, wanted)
        meta = OPS._attention_backward(*(t.to("meta") if isinstance(t, Tensor) else t for t in args), wanted)
        assert [t.shape for t in result] == [t.shape for t in meta]
        assert [t.numel() > 0 for t in result] == [*wanted[:3], wanted[3] and taps > 0]


STAGES = ("query_pass_backward", "core_backward", "key_pass_backward", "landmarks_backward")


@pytest.mark.parametrize("wanted", combinations(4), ids=words)
def test_stages_that_serve_nobody_do_not_run(wanted: tuple[bool, ...]) -> None:
    args = arguments(Problem(taps=3), torch.float32)
    attention = any(wanted[:3])
    if EMULATED:  # two sweeps of the queries and the core, one of the keys, dQt's share and dw's last sums
        torch.ops.nystrom_simt.reset_stats()
        OPS._attention_backward(*args, wanted)
        assert torch.ops.nystrom_simt.stats()[0] == 3 * attention + 1 + (wanted[0] or wanted[3])
        return
    with profile(activities=[ProfilerActivity.CPU]) as found:
        OPS._attention_backward(*args, wanted)
    ran = {event.key.removeprefix("nystrom_ext::") for event in found.key_averages()} & {*STAGES}
    assert ran == {s for s, runs in zip(STAGES, (attention, attention, True, wanted[0]), strict=True) if runs}


def allocated(args: tuple[Any, ...], wanted: tuple[bool, ...]) -> int:
    """Bytes that the op asks torch's allocator for."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        OPS._attention_backward(*args, wanted)
    sizes = [e.self_cpu_memory_usage for e in found.key_averages() if e.key != "[memory]"]
    return sum(size for size in sizes if size > 0)


def test_memory_is_that_of_what_is_asked_for() -> None:
    """A gradient of 4 MiB each; the m-sized buffers of all are a twentieth."""
    args = arguments(Problem(B=1, H=4, L=4096, d=64, m=16, taps=3), torch.float32)
    one = args[1].nbytes
    for wanted in combinations(4):
        assert sum(wanted[:3]) * one <= allocated(args, wanted) <= (sum(wanted[:3]) + 0.3) * one, words(wanted)


@pytest.mark.parametrize("wanted", [(False, False, True), (True, False, False), (False, True, False)], ids=words)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, wanted: tuple[bool, ...]) -> None:
    torch.compiler.reset()
    x, grad = leaves(Problem(L=60), torch.float32)
    x = [t.requires_grad_(w) for t, w in zip(x, wanted, strict=True)]
    compiled = torch.compile(lambda *x: nystrom_attention(*x, num_landmarks=8).sin(), fullgraph=True, backend=backend)
    some = list(itertools.compress(x, wanted))
    expected = torch.autograd.grad(nystrom_attention(*x, num_landmarks=8).sin(), some, grad)
    for a, e in zip(torch.autograd.grad(compiled(*x), some, grad), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_compiled_autograd() -> None:
    """The whole backward pass as one graph."""
    torch.compiler.reset()
    (query, key, value), grad = leaves(Problem(L=60), torch.float32)
    value.requires_grad_()
    (expected,) = torch.autograd.grad(nystrom_attention(query, key, value, num_landmarks=8), value, grad)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        nystrom_attention(query, key, value, num_landmarks=8).backward(grad)
    assert value.grad is not None and torch.equal(value.grad, expected)
