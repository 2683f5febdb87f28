"""A build with CUDA, on a machine that need not have a GPU: registration, shapes on fake CUDA tensors, the CPU as ever.

torch's autograd engine asks the driver for streams even when tensors are fake, so the backward pass is called as the
node that the forward pass left behind.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from problems import DTYPES, Problem, check
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import nystrom_ext
from nystrom_ext import nystrom_attention

OPS = ("_attention_forward", "_attention_backward")


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def inputs(dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> list[Tensor]:
    """query, key, value: (B, H, L, d), (B, H, S, d), (B, H, S, e)."""
    shapes = (2, 4, 100, 20), (2, 4, 70, 20), (2, 4, 70, 12)
    return [torch.empty(shape, dtype=dtype, device="cuda", requires_grad=requires_grad) for shape in shapes]


class Layer(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nystrom_attention(query, key, value, num_landmarks=16)


def test_the_build_has_cuda() -> None:
    assert "sm_" in str(nystrom_ext.build_info()["cuda"])
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nystrom_ext::{op}", "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("nystrom_ext::attention", "AutocastCUDA")
    library = Path(nystrom_ext.__file__).with_name("libnystrom.so")
    sections = subprocess.run(["readelf", "-S", "-W", library], capture_output=True, text=True, check=True).stdout
    assert ".nv_fatbin" in sections, "libnystrom.so holds no device code"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_tensors(dtype: torch.dtype) -> None:
    check(Problem(L=100, m=16, d=20, e=7, mask="holes"), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(fake: None, dtype: torch.dtype) -> None:
    x = inputs(dtype, requires_grad=True)
    out = nystrom_attention(*x, num_landmarks=16)
    assert out.shape == (2, 4, 100, 12) and out.dtype == dtype and out.device.type == "cuda"
    gradients = out.grad_fn(torch.empty_like(out))
    for gradient, t in zip(gradients[:3], x, strict=True):
        assert gradient.shape == t.shape and gradient.dtype == dtype and gradient.device == t.device


def test_masks_convolution_dropout_and_groups(fake: None) -> None:
    query = torch.empty(2, 4, 70, 20, device="cuda", requires_grad=True)
    key, value = (t.detach()[:, :2].requires_grad_() for t in inputs()[1:])
    mask = torch.zeros(2, 70, dtype=torch.bool, device="cuda")
    taps = torch.empty(4, 5, device="cuda", requires_grad=True)
    out = nystrom_attention(
        query, key, value, mask, query_padding_mask=mask, conv_weight=taps, dropout_p=0.1, enable_gqa=True
    )
    assert out.shape == (2, 4, 70, 12) and out.device.type == "cuda"
    gradients = [g for g in out.grad_fn(torch.empty_like(out)) if g is not None]
    assert [g.shape for g in gradients] == [t.shape for t in (query, key, value, taps)]


def test_devices_that_differ_are_refused(fake: None) -> None:
    query, key, value = inputs()
    with pytest.raises(ValueError, match="must be on one device, got cuda:0, cpu, cuda:0"):
        nystrom_attention(query, torch.empty(key.shape), value)
    mask = torch.zeros(2, 70, dtype=torch.bool)
    with pytest.raises(ValueError, match="key_padding_mask must be on the device of query, cuda:0, got cpu"):
        nystrom_attention(query, key, value, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(fake: None, dtype: torch.dtype) -> None:
    x = inputs()
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_enabled("cuda", True)  # the context manager does nothing where there is no GPU
    try:
        assert nystrom_attention(*x).dtype == dtype
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
    assert nystrom_attention(*x).dtype == torch.float32


def test_traced_graph_is_one_forward_and_one_backward(fake: None) -> None:
    def both(*x: Tensor) -> tuple[Tensor, ...]:
        out = nystrom_attention(*x)
        return out.grad_fn(torch.ones_like(out))[:3]

    graph = make_fx(both, tracing_mode="fake")(*inputs(requires_grad=True)).graph
    called = [str(node.target) for node in graph.nodes if "nystrom_ext" in str(node.target)]
    assert called == [f"nystrom_ext.{op}.default" for op in OPS]


def test_compile(fake: None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = compiled(*inputs())
    assert out.shape == (2, 4, 100, 12) and out.device.type == "cuda"


def test_export_with_a_dynamic_length(fake: None) -> None:
    length = torch.export.Dim("length", min=2, max=100_000)
    shapes = {"query": {2: length}, "key": None, "value": None}
    program = torch.export.export(Layer(), tuple(inputs()), dynamic_shapes=shapes).run_decompositions()
    (node,) = [node for node in program.graph.nodes if "nystrom_ext" in str(node.target)]
    out, qt, *_ = node.meta["val"]
    assert out.device.type == "cuda" and str(out.shape[2]).isidentifier() and "Min" in str(qt.shape[2])
