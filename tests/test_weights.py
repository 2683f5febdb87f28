"""nystrom_attention_weights: the matrix that the operator applies, its mean over the heads, and some of its rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Problem, relative_rms
from test_operator import PROBLEMS
from torch import Tensor
from torch.export import Dim
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from nystrom_ext import _columns, _weights, nystrom_attention, nystrom_attention_weights

NAMES = [name for name, p in PROBLEMS.items() if p.L * p.keys < 5e5]
SMALL = {
    "cross": Problem(B=2, H=2, L=9, S=14, m=3, d=2, mask="tail"),
    "every regime": Problem(B=4, H=1, L=12, S=14, m=6, d=2, mask="all"),
    "grouped": Problem(B=1, H=2, L=12, m=3, d=2, kv_heads=1, mask="holes"),
    "window": Problem(B=2, H=1, L=14, m=4, d=2, mask="holes", options={"window": 1, "pinned": 1}),
}


def call(p: Problem, query: Tensor, key: Tensor, **more: Any) -> Tensor:
    keys, queries = p.masks()
    torch.manual_seed(5)  # of dropout
    options = {"num_landmarks": p.m, "enable_gqa": p.kv_heads is not None, **p.options, **more}
    return nystrom_attention_weights(query, key, keys, query_padding_mask=queries, **options)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if sequences were long: keys in many blocks, and a band."""
    monkeypatch.setattr(_weights, "BLOCK", 300)
    monkeypatch.setattr(_columns, "BLOCK", 2)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_the_operator_applies(name: str, blocks: None) -> None:
    """The same entries are dropped, too, for the same state of the random generator."""
    p = PROBLEMS[name]
    query, key, value = (t.detach() for t in p.tensors(torch.float64)[:3])
    keys, queries = p.masks()
    weights = call(p, query, key)
    torch.manual_seed(5)
    options = {"num_landmarks": p.m, "enable_gqa": p.kv_heads is not None, **p.options}
    out = nystrom_attention(query, key, value, keys, query_padding_mask=queries, **options)
    assert weights.shape == (p.B, p.H, p.L, p.keys) and weights.dtype == torch.float64
    assert relative_rms(weights @ value.repeat_interleave(p.H // value.shape[1], 1), out) < 1e-12
    for mask, dim in ((keys, 2), (queries, 3)):
        assert mask is None or not weights.masked_select(mask[:, None].unsqueeze(dim)).any()
    averaged = call(p, query, key, average_heads=True)
    torch.testing.assert_close(averaged, weights.mean(1))


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_the_matrix(name: str, blocks: None) -> None:
    p = PROBLEMS[name]
    query, key = (t.detach() for t in p.tensors(torch.float64)[:2])
    weights, rows = call(p, query, key), torch.tensor([p.L - 1, 0, p.L // 2, 0])
    torch.testing.assert_close(call(p, query, key, rows=rows), weights[:, :, rows])
    averaged = call(p, query, key, rows=rows, average_heads=True)
    torch.testing.assert_close(averaged, weights.mean(1)[:, rows])


@pytest.mark.parametrize("options", [{}, {"window": 5, "pinned": 2}], ids=["plain", "window"])
def test_forms_of_rows(options: dict[str, int]) -> None:
    """Lists, positions from the end, none at all; up to num_landmarks tokens too."""
    for n in (60, 7):
        x = torch.randn(2, 3, n, 4)
        weights = nystrom_attention_weights(x, x, num_landmarks=8, **options)
        for rows in ([0, -1, 3], (2,), range(3), [], torch.tensor([-n, 1]), torch.zeros(0, dtype=torch.int64)):
            some = nystrom_attention_weights(x, x, num_landmarks=8, rows=rows, **options)
            torch.testing.assert_close(some, weights[:, :, torch.as_tensor(rows, dtype=torch.int64)])


@pytest.mark.parametrize(
    "rows, message",
    [
        ([60], "must be positions of queries, from -L to L - 1"),
        ([-61], "must be positions of queries, from -L to L - 1"),
        (3, r"must be integers, .* got torch.int64 of shape \(\); \[0\] is the first query's"),
        ([1.5], "must be integers, .* got torch.float32"),
        ([True], "must be integers, .* got torch.bool"),
        (torch.zeros(1, 1, dtype=torch.int64), r"must be integers, .* of shape \(1, 1\)"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), "rows must be on the device of query, cpu, got meta"),
    ],
    ids=str,
)
def test_bad_rows(rows: Any, message: str) -> None:
    x = torch.randn(1, 1, 60, 4)
    with pytest.raises(ValueError, match=f"^nystrom_attention_weights: .*{message}"):
        nystrom_attention_weights(x, x, rows=rows)


@pytest.mark.parametrize("form", [{}, {"average_heads": True}, {"rows": [5, 0]}], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_derivatives(name: str, form: dict[str, Any], blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_weights, "BLOCK", 20)
    p = SMALL[name]
    x = p.tensors(torch.float64)[:2]
    assert torch.autograd.gradcheck(lambda *x: call(p, *x, **form), x, eps=1e-6, atol=1e-5, rtol=1e-3, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: call(p, *x, **form), x, atol=1e-5, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"window": 5, "pinned": 2}], ids=["plain", "window"])
@pytest.mark.parametrize("form", [{}, {"average_heads": True}, {"rows": [7, 0]}], ids=str)
def test_ignored_tokens_do_not_leak(form: dict[str, Any], options: dict[str, int], blocks: None) -> None:
    mask = torch.rand(2, 60, generator=torch.Generator().manual_seed(1)) < 0.4
    x = torch.randn(2, 2, 60, 4, dtype=torch.float64)
    results = []
    for content in (0.0, torch.nan, torch.inf):
        y = x.masked_fill(mask[:, None, :, None], content).requires_grad_()
        weights = nystrom_attention_weights(y, y, mask, query_padding_mask=mask, num_landmarks=8, **options, **form)
        results.append([weights, *torch.autograd.grad(weights.square().sum(), y)])
    assert all(
        torch.equal(a, b) and a.isfinite().all() for r in results[1:] for a, b in zip(r, results[0], strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [{}, {"average_heads": True}, {"rows": [7, 0]}], ids=str)
def test_dtypes(form: dict[str, Any], dtype: torch.dtype) -> None:
    """Computed in float32, rounded once; autocast casts the inputs, as it does the operator's."""
    x = torch.randn(2, 2, 2, 90, 8)
    query, key = x.to(dtype)
    options = {"num_landmarks": 16, "window": 3, **form}
    weights = nystrom_attention_weights(query, key, **options)
    truth = nystrom_attention_weights(query.double(), key.double(), **options)
    assert weights.dtype == dtype and relative_rms(weights, truth) < max(torch.finfo(dtype).eps, 1e-5)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        assert torch.equal(weights, nystrom_attention_weights(*x, **options))


def allocated(function: Callable[[], Any], folder: Path) -> float:
    """The most that a call has allocated at a time, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    recorded.export_chrome_trace(str(folder / "trace.json"))
    events = [e for e in json.loads((folder / "trace.json").read_text())["traceEvents"] if e.get("name") == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    assert most > 0 and result is not None
    return most


@pytest.mark.parametrize("options", [{}, {"window": 16, "pinned": 1}], ids=["plain", "window"])
def test_a_row_of_a_long_sequence_takes_little_memory(options: dict[str, int], tmp_path: Path) -> None:
    """20,000 tokens, 8 heads, m = 256: P3 alone would be 164 MB, the matrix 12.8 GB."""
    x = torch.randn(1, 8, 20000, 64, requires_grad=True)
    mask = torch.arange(20000)[None] >= 19990
    options = {"query_padding_mask": mask, "num_landmarks": 256, "rows": [0], **options}

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(nystrom_attention_weights(x, x, mask, **options).square().sum(), x)

    assert allocated(lambda: nystrom_attention_weights(x, x, mask, **options), tmp_path) < 60e6
    assert allocated(gradient, tmp_path) < 150e6  # a gradient for each side, and their sum: 41 MB each


@pytest.mark.parametrize("options", [{}, {"window": 4, "pinned": 1}], ids=["plain", "window"])
def test_operations_of_rows_are_those_of_the_formula(options: dict[str, int]) -> None:
    """R (m + n) + n m: twice for the means, twice for LSE3 and P3. The inverse's do not grow."""

    def operations(n: int, rows: int) -> int:
        x = torch.randn(1, 2, n, 16)
        with FlopCounterMode(display=False) as counted:
            nystrom_attention_weights(x, x, num_landmarks=8, rows=range(rows), **options)
        return counted.get_total_flops()

    counts = {(n, R): operations(n, R) for n in (1000, 2000) for R in (1, 101)}
    heads, m, d = 2, 8, 16
    assert counts[2000, 1] - counts[1000, 1] <= 2 * 1000 * heads * (4 * m * d + m + m + d)
    per_row = (counts[2000, 101] - counts[2000, 1]) / 100
    assert per_row <= 2 * heads * (2000 * (m + m + d) + m * (m + d))


def test_the_mean_over_heads_is_made_without_a_matrix_for_each(tmp_path: Path) -> None:
    x = torch.randn(1, 16, 2000, 16)
    options = {"num_landmarks": 16, "window": 8, "pinned": 1, "average_heads": True}
    matrix = 4 * 2000 * 2000
    assert allocated(lambda: nystrom_attention_weights(x, x, **options), tmp_path) < 5 * matrix


@pytest.mark.parametrize("form", [{}, {"average_heads": True}, {"rows": [7, 0]}], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 5, "pinned": 2}], ids=["plain", "window"])
def test_graphs(form: dict[str, Any], options: dict[str, int]) -> None:
    """Compiled without a break, and exported for all lengths."""

    class Weights(torch.nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            masks = {"key_padding_mask": mask, "query_padding_mask": mask}
            return nystrom_attention_weights(x, x, **masks, num_landmarks=8, **options, **form)

    def inputs(B: int, n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(B, 2, n, 4), torch.arange(n) >= torch.tensor([[n], [n // 2], [n - 1]])[:B]

    torch.compiler.reset()
    x = inputs(2, 60)
    compiled = torch.compile(Weights(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x), Weights()(*x))
    B, n = Dim("B"), Dim("n", min=8, max=4096)
    program = torch.export.export(Weights(), inputs(3, 50), dynamic_shapes=({0: B, 2: n}, {0: B, 1: n}), strict=False)
    assert not any("nystrom_ext" in str(node.target) for node in program.graph.nodes)
    for size in ((2, 130), (3, 9)):
        x = inputs(*size)
        torch.testing.assert_close(program.module()(*x), Weights()(*x))


def test_vmap() -> None:
    x = torch.randn(3, 2, 2, 40, 4)
    mapped = torch.func.vmap(lambda x: _weights.whole_matrix(_weights.Problem(x, x, num_landmarks=8), x, x, True))(x)
    expected = torch.stack([nystrom_attention_weights(y, y, num_landmarks=8, average_heads=True) for y in x])
    torch.testing.assert_close(mapped, expected)
