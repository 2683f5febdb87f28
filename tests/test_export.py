"""Programs for runtimes without this package: the operator as ATen, and ONNX files in ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import relative_rms
from test_operator import PROBLEMS
from torch import Tensor, nn
from torch.export import Dim

import nystrom_ext
from nystrom_ext import NystromMultiheadAttention, export, nystrom_attention, reference

LOWERED = [  # one of each kind: lowering takes seconds
    *(
        "plain",
        "holes",
        "a sample without keys",
        "cross attention",
        "few queries",
        "few keys",
        "m = 1",
        "no iterations",
    ),
    *("convolution, even taps, holes", "convolution, exact", "global", "global, exact samples beside", "scale"),
    *("grouped queries", "one key head", "window and pinned, holes", "window, exact samples beside"),
    *("window over everything", "more pinned than landmarks", "window, convolution"),
]
B, L, S = Dim("B", max=512), Dim("L", max=4096), Dim("S", max=4096)
TAPS, EVEN = torch.linspace(-1, 1, 10).view(2, 5), torch.linspace(-1, 1, 8).view(2, 4)
ONNX: dict[str, dict[str, Any]] = {
    "cross": {"scale": 0.4},
    "cross, one landmark": {"num_landmarks": 1},
    "cross, global": {"coefficient": "global"},
    "cross, grouped": {"enable_gqa": True},
    "cross, no iterations": {"pinv_iterations": 0},
    "cross, many landmarks": {"num_landmarks": 64, "pinv_iterations": 12},
    "self": {},
    "self, global, grouped": {"coefficient": "global", "enable_gqa": True, "conv_weight": TAPS},
    "self, even taps": {"conv_weight": EVEN},
    "self, many landmarks": {"num_landmarks": 64, "conv_weight": TAPS},
    "pinned": {"pinned": 3},
    "more pinned than landmarks": {"pinned": 20},
    "window": {"window": 40},
    "window and pinned": {"window": 3, "pinned": 1},
    "window, even taps": {"window": 5, "conv_weight": EVEN},
    "window, grouped": {"window": 2, "pinned": 2, "enable_gqa": True},
    "window, global": {"window": 1, "coefficient": "global"},
    "window, one landmark": {"window": 1, "num_landmarks": 1, "scale": 0.4},
    "window, many landmarks": {"window": 2, "num_landmarks": 64},
    "window over everything": {"window": 10**9},
}

PROGRAM = """
import sys
import numpy, onnxruntime
path, *arrays = sys.argv[1:]
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
x = {i.name: numpy.load(array) for i, array in zip(session.get_inputs(), arrays)}
numpy.save(path + ".npy", session.run(None, x)[0])
assert not {"torch", "nystrom_ext"} & set(sys.modules)
"""


class Layer(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = {"num_landmarks": 8, **options}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, queries: Tensor | None) -> Tensor:
        return nystrom_attention(query, key, value, keys, query_padding_mask=queries, **self.options)


def lowered(program: Any) -> Any:
    program = program.run_decompositions(export.decompositions())
    assert not any("nystrom_ext" in str(node.target) for node in program.graph.nodes)
    return program


def session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(path: Path, *x: Tensor) -> Tensor:
    runtime = session(path)
    named = {i.name: t.numpy() for i, t in zip(runtime.get_inputs(), x, strict=True)}
    return torch.from_numpy(runtime.run(None, named)[0])


def inputs(batch: int, queries: int, keys: int, kv_heads: int = 2) -> list[Tensor]:
    """Masks are one where queries and keys are as many."""
    torch.manual_seed(queries)
    x = [torch.randn(batch, heads, n, 4) for heads, n in ((2, queries), (kv_heads, keys), (kv_heads, keys))]
    masks = [torch.rand(batch, n) < 0.3 for n in (keys, queries)]
    return [*x, masks[0], masks[0] if queries == keys else masks[1]]


@pytest.mark.parametrize("name", LOWERED)
def test_decompositions_are_the_operator(name: str) -> None:
    p = PROBLEMS[name]
    x = [t.detach() for t in p.tensors(torch.float64)]
    keys, queries = p.masks()
    options = {"num_landmarks": p.m, "enable_gqa": p.kv_heads is not None, **p.options}
    options |= {"conv_weight": x[3]} if p.taps else {}
    call = (*x[:3], keys, queries)
    actual = lowered(torch.export.export(Layer(**options), call)).module()(*call)
    expected = reference.nystrom_attention(*x[:3], keys, query_padding_mask=queries, **options)
    assert relative_rms(actual, expected) <= 1e-10


def test_lowered_graphs_grow_with_the_length_not_with_its_square() -> None:
    sizes = {0: B, 2: L}, {0: B, 2: L}, {0: B, 2: L}, {0: B, 1: L}, {0: B, 1: L}
    layer = Layer(window=5, pinned=2)
    program = lowered(torch.export.export(layer, tuple(inputs(3, 40, 40)), dynamic_shapes=sizes))
    for node in program.graph.nodes:
        shape = getattr(node.meta.get("val"), "shape", ())
        assert sum("s" in str(size) for size in shape[1:]) < 2, (node, shape)
    for n in (5, 8, 150):
        x = inputs(2, n, n)
        torch.testing.assert_close(program.module()(*x), layer(*x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ONNX)
def test_onnx_runtime_at_other_lengths(name: str, tmp_path: Path) -> None:
    options, cross = ONNX[name], name.startswith("cross")
    keys = S if cross else L
    heads = 1 if "grouped" in name else 2
    sizes = {0: B, 2: L}, {0: B, 2: keys}, {0: B, 2: keys}, {0: B, 1: keys}, {0: B, 1: L}
    layer = Layer(**options)
    path = tmp_path / "layer.onnx"
    example = tuple(inputs(3, 40, 30 if cross else 40, heads))
    export.onnx(layer, example, path, dynamic_shapes=sizes, verbose=False)
    for batch, queries, few in [(2, 40, 30), (3, 150, 77), (1, 5, 60), (4, 60, 6), (2, 8, 9), (1, 300, 300)]:
        x = inputs(batch, queries, few if cross else queries, heads)
        assert relative_rms(run(path, *x), layer(*x)) <= 1e-5, (batch, queries, few)


def test_a_program_without_this_package_runs_the_file(tmp_path: Path) -> None:
    """NystromMultiheadAttention with key_padding_mask."""
    import numpy

    torch.manual_seed(0)
    attention = NystromMultiheadAttention(8, 2, batch_first=True, num_landmarks=8).eval()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.attention(x, x, x, padding, need_weights=False)[0]

    model, path = Model().eval(), tmp_path / "model.onnx"
    example = torch.randn(3, 40, 8), torch.rand(3, 40) < 0.3
    export.onnx(model, example, path, dynamic_shapes=({0: B, 1: L},) * 2, verbose=False)
    x = torch.randn(2, 70, 8), torch.rand(2, 70) < 0.3
    arrays = [tmp_path / f"{i}.npy" for i in range(2)]
    for array, t in zip(arrays, x, strict=True):
        numpy.save(array, t.numpy())
    subprocess.run([sys.executable, "-c", PROGRAM, path, *arrays], check=True, cwd=tmp_path)
    out = torch.from_numpy(numpy.load(f"{path}.npy"))
    assert relative_rms(out, model(*x)) <= 1e-5


def refused(layer: nn.Module, *call: Any) -> None:
    torch.export.export(layer, call).run_decompositions(export.decompositions())


def test_dropout_and_packed_sequences_are_refused_by_name() -> None:
    with pytest.raises(Exception, match=r"dropout_p must be 0, got 0\.25, .* export model\.eval\(\)"):
        refused(Layer(dropout_p=0.25), *inputs(2, 40, 40))

    class Packed(nn.Module):
        def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
            return nystrom_ext.nystrom_attention_varlen(x, x, x, offsets, offsets, 20, 20, num_landmarks=4)

    with pytest.raises(Exception, match="nystrom_attention_varlen does not lower to ATen, .* pad them"):
        refused(Packed(), torch.randn(30, 2, 4), torch.tensor([0, 20, 30]))


def test_a_program_has_its_inputs_already() -> None:
    x = tuple(inputs(2, 40, 40))
    with pytest.raises(ValueError, match="an ExportedProgram has its inputs and dynamic_shapes already; leave"):
        export.onnx(torch.export.export(Layer(), x), x)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ImportError, match=r'needs the package onnxscript, .* pip install "nystrom-ext\[onnx\]"'):
        export.onnx(Layer(), tuple(inputs(2, 40, 40)))
