"""The operator where PyTorch puts it: vmap, threads, forked workers, AMP, anomaly mode, AOTInductor."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Problem, run
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nystrom_ext import NystromMultiheadAttention, convert_, nystrom_attention

OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "window": {"window": 3, "pinned": 1}}
both = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@both
@pytest.mark.parametrize("tokens", [60, 6], ids=["nystrom", "exact"])
def test_vmap(tokens: int, options: dict[str, int]) -> None:
    """Over queries, keys and masks together, over keys and values alone, and over another dimension than the first."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4, 2, 2, tokens, 8, dtype=torch.float64, requires_grad=True)
    ignored = torch.rand(4, 2, tokens) < 0.3

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return nystrom_attention(q, k, v, mask, query_padding_mask=mask, num_landmarks=8, **options)

    mapped = torch.vmap(attention)(query, key, value, ignored)
    looped = torch.stack([attention(*x) for x in zip(query, key, value, ignored, strict=True)])
    assert torch.equal(mapped, looped)
    gradients = [torch.autograd.grad(out.square().sum(), query, retain_graph=True)[0] for out in (mapped, looped)]
    torch.testing.assert_close(*gradients)
    keys = torch.vmap(attention, in_dims=(None, 1, 2, None), out_dims=1)(
        query[0], key.movedim(0, 1), value.movedim(0, 2), None
    )
    expected = [attention(query[0], k, v, None) for k, v in zip(key, value, strict=True)]
    assert torch.equal(keys, torch.stack(expected, 1))


@both
def test_deterministic_mode(options: dict[str, int]) -> None:
    """Nothing is refused in it, and every run has the same bits: results, gradients, and gradients of those."""
    p, before = Problem(L=60, options=options, mask="all"), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            x = p.tensors(torch.float32)
            out = nystrom_attention(*x[:3], *p.masks()[:1], self_attention=True, num_landmarks=8, **options)
            first = torch.autograd.grad(out.square().sum(), x[:3], create_graph=True)
            runs.append([out, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), x[:3])])
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@both
def test_anomaly_mode(options: dict[str, int]) -> None:
    p = Problem(L=60, options=options, mask="all")
    x = p.tensors(torch.float32)
    expected = run(nystrom_attention, p, x, torch.ones_like(x[0]))
    with torch.autograd.detect_anomaly(check_nan=True):
        actual = run(nystrom_attention, p, x, torch.ones_like(x[0]))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@both
def test_threads_that_call_at_once(options: dict[str, int]) -> None:
    problems = [Problem(L=700 + 40 * i, m=16, seed=i, mask="tail", options=options) for i in range(4)]
    inputs = [p.tensors(torch.float32) for p in problems]
    expected = [run(nystrom_attention, p, x, torch.ones_like(x[0])) for p, x in zip(problems, inputs, strict=True)]
    wrong: list[int] = []

    def work(i: int) -> None:
        torch.set_num_threads(1 + i % 2)
        for _ in range(20):
            found = run(nystrom_attention, problems[i], inputs[i], torch.ones_like(inputs[i][0]))
            if not all(torch.equal(a, b) for a, b in zip(found, expected[i], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_thread_count_changed_between_forward_and_backward() -> None:
    x = Problem(L=2500, m=16, H=3).tensors(torch.float32)
    results = []
    for before, after in ((1, 1), (1, 3), (3, 1)):
        torch.set_num_threads(before)
        out = nystrom_attention(*x, num_landmarks=16)
        torch.set_num_threads(after)
        results.append([out, *torch.autograd.grad(out.sum(), x)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class Embedded(Dataset):
    """Attention inside a data set, as some people embed their samples on the fly."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        x = torch.randn(1, 2, 1500, 8, generator=torch.Generator().manual_seed(i))
        return nystrom_attention(x, x, x, num_landmarks=16)[0]


def test_forked_workers() -> None:
    """After the parent has used its threads: a forked child has none of them."""
    torch.set_num_threads(2)
    expected = [Embedded()[i] for i in range(6)]
    loader = DataLoader(Embedded(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120)
    assert all(torch.equal(a, b) for a, b in zip(loader, expected, strict=True))


def encoder(options: dict[str, int]) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    convert_(model, num_landmarks=8, **options)
    return model


def losses(model: nn.Module, steps: int = 6) -> Iterator[float]:
    """Of a few steps under autocast with a GradScaler, which checks every gradient for infinities."""
    x, ignored = torch.randn(2, 50, 16), torch.arange(50) >= torch.tensor([[50], [30]])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, src_key_padding_mask=ignored)[~ignored].float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield loss.item()


@both
def test_amp_with_a_grad_scaler_eager_and_compiled(options: dict[str, int]) -> None:
    eager = list(losses(encoder(options)))
    model = encoder(options)
    model.compile(backend="aot_eager", fullgraph=True)
    compiled = list(losses(model))
    assert eager[-1] < eager[0]
    torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=0)


@both
def test_compiled_encoder_is_not_compiled_again_for_other_lengths(options: dict[str, int]) -> None:
    torch.compiler.reset()
    model = encoder(options).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (50, 77, 131):
            x, ignored = torch.randn(2, tokens, 16), torch.arange(tokens) >= torch.tensor([[tokens], [30]])
            outs = [f(x, src_key_padding_mask=ignored) for f in (compiled, model)]
            torch.testing.assert_close(*outs)
            outs[0].sum().backward()


class Layer(nn.Module):
    """What people deploy: the module in a model."""

    def __init__(self, options: dict[str, int]) -> None:
        super().__init__()
        self.attention = NystromMultiheadAttention(16, 2, batch_first=True, num_landmarks=8, **options)

    def forward(self, x: Tensor, ignored: Tensor) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=ignored, need_weights=False)[0]


@both
def test_aotinductor_package(tmp_path: Path, options: dict[str, int]) -> None:
    """Compiled ahead of time into a file that is loaded and run, at other lengths too."""
    model = Layer(options).eval()
    n = torch.export.Dim("n", min=9, max=10_000)
    example = torch.randn(2, 50, 16), torch.zeros(2, 50, dtype=torch.bool)
    with torch.no_grad():
        program = torch.export.export(model, example, dynamic_shapes={"x": {1: n}, "ignored": {1: n}})
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        for tokens in (50, 333):
            x = torch.randn(2, tokens, 16)
            ignored = torch.arange(tokens) >= torch.tensor([[tokens], [tokens // 2]])
            torch.testing.assert_close(loaded(x, ignored), model(x, ignored))
