"""The ops as PyTorch's machinery sees them: opcheck, torch.compile, export, autocast, checkpointing, inference mode."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from problems import DTYPES, Problem, padding_mask, run
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from nystrom_ext import nystrom_attention

OPS = torch.ops.nystrom_ext


OPCHECKED = {
    "self": Problem(L=40, e=12, taps=3, mask="holes"),
    "cross, global": Problem(L=40, S=70, mask="tail", options={"coefficient": "global"}),
    "few queries": Problem(L=6, S=40),
    "grouped": Problem(H=4, kv_heads=2, L=40),
    "window": Problem(L=40, e=12, taps=2, mask="holes", options={"window": 3, "pinned": 2}),
}


@pytest.mark.parametrize("wanted", [(), (0, 1, 2, 3)], ids=["none", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck_public(name: str, dtype: torch.dtype, wanted: tuple[int, ...], device: str) -> None:
    opcheck_public(OPCHECKED[name], dtype, wanted, device)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (3,)], ids=str)
@pytest.mark.parametrize("name", ["self", "window"])
def test_opcheck_public_with_gradients_of_a_subset(name: str, wanted: tuple[int, ...], device: str) -> None:
    opcheck_public(OPCHECKED[name], torch.float32, wanted, device)


def opcheck_public(p: Problem, dtype: torch.dtype, wanted: tuple[int, ...], device: str) -> None:
    x = [t.detach().to(device).requires_grad_(i in wanted) for i, t in enumerate(p.tensors(dtype))]
    keys, queries = (None if mask is None else mask.to(device) for mask in p.masks())
    options = {"num_landmarks": p.m, "enable_gqa": p.kv_heads is not None, **p.options}
    kwargs = {"query_padding_mask": queries, "conv_weight": x[3] if p.taps else None, **options}
    opcheck(OPS.attention.default, (*x[:3], keys), kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps", [0, 3])
@pytest.mark.parametrize("L, m, window, pinned", [(40, 8, 0, 0), (40, 64, 0, 0), (40, 8, 3, 2), (40, 64, 3, 2)])
def test_opcheck_internal(L: int, m: int, window: int, pinned: int, taps: int, dtype: torch.dtype, device: str) -> None:
    x = [t.detach().to(device) for t in Problem(L=L, e=12, taps=taps).tensors(dtype)]
    mask, rng = padding_mask("holes", 2, L).to(device), torch.tensor([1, 2], device=device)
    options = (m, 6, 0.3, 0.2, False, window, pinned)
    inputs = (*x[:3], mask, mask, x[3] if taps else None, rng, None, None, 0, 0)
    opcheck(OPS._attention_forward.default, (*inputs, *options))
    out, *saved = OPS._attention_forward(*inputs, *options)
    for wanted in ((True,) * 4, (False, False, True, False), (True, False, False, True)):
        opcheck(OPS._attention_backward.default, (torch.randn_like(out), *inputs, *saved, *options, wanted))


class Layer(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.scale * query
        return nystrom_attention(x, key, value, mask, query_padding_mask=mask, **self.options).tanh()


@pytest.mark.parametrize("options", [{}, {"window": 4, "pinned": 1}], ids=["plain", "window"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_graph_breaks_or_recompilation(backend: str, options: dict[str, int]) -> None:
    torch._dynamo.reset()
    layer = Layer(num_landmarks=16, **options)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (100, 131, 257):
            p = Problem(L=n, d=16, mask="holes")
            x, (mask, _) = p.tensors(torch.float32), p.masks()
            results = []
            for f in (layer, compiled):
                out = f(*x, mask)
                results.append([out, *torch.autograd.grad(out.sum(), [*x, layer.scale])])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiled_dropout_is_seeded() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Layer(num_landmarks=16, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    x = Problem(L=100).tensors(torch.float32)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out = compiled(*x)
        results.append([out, *torch.autograd.grad(out.sum(), x)])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[2][0])


@pytest.mark.parametrize("options", [{}, {"window": 4, "pinned": 1}], ids=["plain", "window"])
def test_export_with_a_dynamic_length(tmp_path: Any, options: dict[str, int]) -> None:
    layer = Layer(num_landmarks=16, **options).eval()
    x = tuple(t.detach() for t in Problem(L=100).tensors(torch.float32))
    n = torch.export.Dim("n", min=2, max=100_000)
    shapes = {name: {2: n} for name in ("query", "key", "value")}
    program = torch.export.export(layer, x, dynamic_shapes=shapes)
    assert any("nystrom_ext.attention" in str(node.target) for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for length in (100, 9, 333):
        y = torch.randn(3, 2, 2, length, 8)
        torch.testing.assert_close(loaded(*y), layer(*y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_inputs_together(dtype: torch.dtype) -> None:
    p = Problem(L=100, taps=3)
    x = p.tensors(torch.float32)
    x[1] = x[1].detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        out = nystrom_attention(*x[:3], conv_weight=x[3], num_landmarks=p.m)
    assert out.dtype == dtype
    expected = nystrom_attention(*(t.to(dtype) for t in x[:3]), conv_weight=x[3].to(dtype), num_landmarks=p.m)
    assert torch.equal(out, expected)
    assert [g.dtype for g in torch.autograd.grad(out.float().sum(), x)] == [t.dtype for t in x]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_repeats_the_dropout(reentrant: bool) -> None:
    layer = Layer(num_landmarks=16, dropout_p=0.5)
    x = Problem(L=100).tensors(torch.float32)
    results = []
    for wrap in (False, True):
        torch.manual_seed(1)
        out = checkpoint(layer, *x, use_reentrant=reentrant) if wrap else layer(*x)
        results.append([out, *torch.autograd.grad(out.sum(), x)] if not reentrant else [out, *gradients(out, x)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def gradients(out: Tensor, x: list[Tensor]) -> list[Tensor]:
    """Through backward(), which reentrant checkpointing needs."""
    for t in x:
        t.grad = None
    out.sum().backward()
    return [t.grad.clone() for t in x if t.grad is not None]


def test_inference_mode_and_no_grad_agree_with_training() -> None:
    p = Problem(L=100, mask="holes")
    x = p.tensors(torch.float32)
    expected = run(nystrom_attention, p, x, torch.ones_like(x[0]))[0]
    keys, queries = p.masks()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = nystrom_attention(*x, keys, query_padding_mask=queries, num_landmarks=p.m)
        assert torch.equal(out, expected) and not out.requires_grad


def test_functional_call() -> None:
    layer = Layer(num_landmarks=16)
    x = Problem(L=100).tensors(torch.float32)
    out = torch.func.functional_call(layer, {"scale": torch.tensor(2.0)}, tuple(x))
    assert torch.equal(out, nystrom_attention(2 * x[0], *x[1:], num_landmarks=16).tanh())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPCHECKED)
def test_deterministic_algorithms(name: str, dtype: torch.dtype, device: str) -> None:
    """Nothing is refused in torch's deterministic mode, where new memory is NaN, and no bit is another."""
    p = OPCHECKED[name]
    x = [t.detach().to(device).requires_grad_() for t in p.tensors(dtype)]
    grad = torch.ones(p.B, p.H, p.L, p.e or p.d, device=device)
    expected = run(nystrom_attention, p, x, grad)
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(nystrom_attention, p, x, grad), expected, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_meta_and_fake_cuda_tensors() -> None:
    x = torch.empty(2, 3, 100, 8, device="meta")
    assert nystrom_attention(x, x, x).shape == x.shape
    with torch._subclasses.FakeTensorMode():  # below autograd, which needs a CUDA build of torch even for fake tensors
        y = torch.empty(2, 3, 100, 8, device="cuda")
        none, options = (*(None,) * 6, 0, 0), (64, 6, 0.3, 0.0, False, 16, 1)
        out, *saved = OPS._attention_forward(y, y, y, *none, *options)
        gradients = OPS._attention_backward(out, y, y, y, *none, *saved, *options, (True,) * 4)
        assert all(t.device.type == "cuda" and t.shape == y.shape for t in (out, *gradients[:3]))


def test_saved_memory_does_not_grow_with_the_square() -> None:
    """Saved for backward: the inputs and m-sized buffers, nothing of n x m."""
    sizes = {}
    for n, options in itertools.product((1024, 4096), ({}, {"window": 16, "pinned": 3})):
        x = torch.randn(1, 2, n, 16, requires_grad=True)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            nystrom_attention(x, x, x, num_landmarks=64, **options)
        sizes[n, bool(options)] = sum(saved) - 3 * x.numel()
    plain = 2 * 64 * (4 * 16 + 1)
    window = plain + 2 * (64 + 2 * 3 * 16)
    assert sizes == {(1024, False): plain, (4096, False): plain, (1024, True): window, (4096, True): window}
