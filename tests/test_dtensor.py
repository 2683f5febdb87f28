"""The operator, the module and a converted encoder on DTensors are what they are in one process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from problems import Problem
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing import assert_close
from torch.testing._internal.distributed.fake_pg import FakeStore

from nystrom_ext import NystromMultiheadAttention, convert_, nystrom_attention, nystrom_attention_varlen

OPS = torch.ops.nystrom_ext
R, BATCH, HEADS, TOKENS, FEATURES = Replicate(), Shard(0), Shard(1), Shard(2), Shard(3)

PROBLEMS = {
    "plain": Problem(B=4, H=4),
    "uneven": Problem(B=3, H=3, S=50),
    "masks, convolution": Problem(B=4, H=4, taps=3, mask="holes"),
    "window": Problem(B=4, H=4, mask="tail", options={"window": 3, "pinned": 1}),
    "grouped": Problem(B=4, H=4, kv_heads=2, taps=3, mask="holes"),
    "groups that do not divide": Problem(B=3, H=6, kv_heads=3),
    "global": Problem(B=4, H=4, taps=3, options={"coefficient": "global"}),
    "exact": Problem(B=4, H=4, m=64, mask="holes"),
}


def place(x: Tensor | None, mesh: DeviceMesh, *placements: Placement) -> Any:
    return None if x is None else distribute_tensor(x.detach(), mesh, placements).requires_grad_(x.requires_grad)


def attention(p: Problem, x: list[Any], keys: Any, queries: Any) -> Any:
    options = {"num_landmarks": p.m, "enable_gqa": p.kv_heads is not None, "conv_weight": x[3] if p.taps else None}
    return nystrom_attention(*x[:3], keys, query_padding_mask=queries, self_attention=False, **options, **p.options)


def full(results: Any) -> list[Tensor]:
    return [x.full_tensor() for x in results]


def check_operator(mesh: DeviceMesh) -> None:
    """Whatever the placements of the inputs, the masks and the output's gradient."""
    for p in PROBLEMS.values():
        x, masks = p.tensors(torch.float64), p.masks()
        out = attention(p, x, *masks)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        expected = [out, *torch.autograd.grad(out, x, cotangent)]
        for of_tokens in (R, BATCH, HEADS, TOKENS, FEATURES):
            y = [place(t, mesh, of_tokens if i < 3 else R) for i, t in enumerate(x)]
            for of_masks, of_gradient in ((R, R), (BATCH, of_tokens), (R, BATCH), (BATCH, HEADS)):
                placed = [place(mask, mesh, of_masks) for mask in masks]
                out = attention(p, y, *placed)
                gradients = torch.autograd.grad(out, y, place(cotangent, mesh, of_gradient))
                assert_close(full([out, *gradients]), expected)
                with torch.no_grad():
                    assert_close(attention(p, y, *placed).full_tensor(), expected[0])


def check_single_gradients(mesh: DeviceMesh) -> None:
    p = PROBLEMS["masks, convolution"]
    x, masks = p.tensors(torch.float64), p.masks()
    expected = torch.autograd.grad(attention(p, x, *masks).square().sum(), x)
    for of_tokens, of_weight in ((R, R), (BATCH, R), (HEADS, BATCH)):
        for wanted in range(4):
            y = [place(t.detach(), mesh, of_tokens if i < 3 else of_weight) for i, t in enumerate(x)]
            y[wanted].requires_grad_()
            out = attention(p, y, *(place(mask, mesh, R) for mask in masks))
            out.square().sum().backward()
            assert_close(y[wanted].grad.full_tensor(), expected[wanted])


def check_compiled(mesh: DeviceMesh) -> None:
    p = PROBLEMS["masks, convolution"]
    x, masks = p.tensors(torch.float64), p.masks()
    out = attention(p, x, *masks)
    expected = [out, *torch.autograd.grad(out.square().sum(), x)]
    for of_tokens in (BATCH, HEADS, TOKENS):
        torch.compiler.reset()
        y = [place(t, mesh, of_tokens if i < 3 else R) for i, t in enumerate(x)]
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        out = compiled(p, y, *(place(mask, mesh, R) for mask in masks))
        assert_close(full([out, *torch.autograd.grad(out.square().sum(), y)]), expected)


def check_inference_mode(mesh: DeviceMesh) -> None:
    """There torch shows DTensor the public operator, and redistributes nothing that is given by keyword."""
    coupled = Problem(B=4, H=4, options={"coefficient": "global"})
    for p in (PROBLEMS["plain"], PROBLEMS["masks, convolution"], PROBLEMS["grouped"], coupled):
        x, masks = p.tensors(torch.float64), p.masks()
        expected = attention(p, x, *masks)
        for of_tokens, of_masks, of_weight in ((R, R, R), (BATCH, BATCH, R), (HEADS, R, BATCH), (TOKENS, R, R)):
            with torch.inference_mode():
                y = [place(t.detach(), mesh, of_tokens if i < 3 else of_weight) for i, t in enumerate(x)]
                out = attention(p, y, *(place(mask, mesh, of_masks) for mask in masks))
                assert_close(out.full_tensor(), expected)
    p = PROBLEMS["masks, convolution"]
    with torch.inference_mode():
        y = [place(t.detach(), mesh, BATCH) for t in p.tensors(torch.float64)]
        with pytest.raises(
            NotImplementedError, match="does not redistribute DTensors given by keyword.* use torch.no_grad"
        ):
            attention(p, y, *(place(mask, mesh, BATCH) for mask in p.masks()))
        with pytest.raises(NotImplementedError, match="dropout of DTensors .* use torch.no_grad"):
            OPS.attention(*y[:3], dropout_p=0.1)


def check_packed_sequences(mesh: DeviceMesh) -> None:
    x = [t[0].transpose(0, 1).detach().requires_grad_() for t in Problem(B=1, H=4, L=100).tensors(torch.float64)]
    offsets = torch.tensor([0, 60, 66, 66, 100])

    def packed(x: list[Any], offsets: Any) -> Any:
        return nystrom_attention_varlen(*x, offsets, offsets, 60, 60, num_landmarks=8)

    out = packed(x, offsets)
    expected = [out, *torch.autograd.grad(out.square().sum(), x)]
    for of_tokens, found in ((R, R), (HEADS, HEADS), (BATCH, R)):  # the tokens are the first dimension
        y, everywhere = [place(t, mesh, of_tokens) for t in x], place(offsets, mesh, R)
        out = packed(y, everywhere)
        assert out.placements == (found,)
        assert_close(full([out, *torch.autograd.grad(out.square().sum(), y)]), expected)
        with torch.inference_mode():
            out = packed([place(t.detach(), mesh, of_tokens) for t in x], place(offsets, mesh, R))
            assert_close(out.full_tensor(), expected[0])


def check_dropout(mesh: DeviceMesh) -> None:
    """Drops what one process drops, which only whole tensors can; the operator's own seed is none of the mesh."""
    x, rng = Problem(B=4, H=4).tensors(torch.float64), torch.tensor([1, 2])
    unpacked, options = (None, None, 0, 0), (8, 6, 0.3, 0.5, False, 0, 0)
    expected = OPS._attention_forward(*(t.detach() for t in x), None, None, None, rng, *unpacked, *options)[0]
    for of_tokens in (R, BATCH, HEADS):
        y = [place(t.detach(), mesh, of_tokens) for t in x]
        out = OPS._attention_forward(*y, None, None, None, place(rng, mesh, R), *unpacked, *options)[0]
        assert out.placements == (R,)
        assert torch.equal(out.to_local(), expected)
        with pytest.raises(NotImplementedError, match="dropout_p=0.5 of a DTensor, .*pass 0, or local tensors"):
            nystrom_attention(*y, num_landmarks=8, dropout_p=0.5)


def check_module(mesh: DeviceMesh) -> None:
    """Parameters replicated, or split as Megatron splits them, which costs the packed projection one gather."""

    def build(**options: Any) -> NystromMultiheadAttention:
        torch.manual_seed(0)
        module = NystromMultiheadAttention(16, 4, batch_first=True, num_landmarks=8, **options)
        for parameter in module.parameters():
            nn.init.uniform_(parameter, -0.7, 0.7)
        return module

    def partition(of_in: Placement, of_out: Placement) -> Callable[..., None]:
        def split(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
            for own, p in list(module.named_parameters(recurse=False)):
                placement = of_in if own.startswith("in_proj") else of_out if name == "out_proj" and p.dim() > 1 else R
                setattr(module, own, nn.Parameter(distribute_tensor(p.detach(), mesh, [placement])))

        return split

    x, padding = torch.randn(4, 40, 16, generator=torch.Generator().manual_seed(1)), torch.arange(40) >= 25
    padding = padding & (torch.arange(4) < 3)[:, None]
    for options in ({}, {"conv_kernel_size": 3}, {"window": 3}):
        module = build(**options)
        out = module(x, x, x, padding, need_weights=False)[0]
        out.square().sum().backward()
        expected = {name: p.grad for name, p in module.named_parameters()}
        for of_in, of_out, of_x in ((R, R, BATCH), (R, R, HEADS), (BATCH, HEADS, R), (BATCH, HEADS, BATCH)):
            split = distribute_module(build(**options), mesh, partition(of_in, of_out))
            y, mask = place(x, mesh, of_x), place(padding, mesh, R)
            with CommDebugMode() as communication:
                shards = split(y, y, y, mask, need_weights=False)[0]
            if (of_in, of_x) == (R, BATCH):
                assert communication.get_total_counts() == 0
            shards.square().sum().backward()
            assert_close(shards.full_tensor(), out)
            assert_close({name: p.grad.full_tensor() for name, p in split.named_parameters()}, expected)


def check_tensor_parallel_encoder(mesh: DeviceMesh) -> None:
    """A converted Hugging Face encoder under the plan that everybody writes: local heads on each process."""
    import huggingface as hf

    def results(parallel: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model = hf.build("bert")
        if parallel:
            columns = ("query", "key", "value", "intermediate.dense")
            plan = {name: ColwiseParallel() for name, _ in model.named_modules() if name.endswith(columns)}
            plan |= {name: RowwiseParallel() for name, _ in model.named_modules() if name.endswith("output.dense")}
            parallelize_module(model, mesh, plan)
        convert_(model, num_landmarks=hf.M)
        out = hf.hidden(model, hf.inputs("bert", valid=20))
        (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if parallel:
            assert len([g for g in gradients.values() if isinstance(g, DTensor)]) == hf.LAYERS * 12
        return out, {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}

    assert_close(results(parallel=True), results(parallel=False))


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


def two_processes(rank: int, path: str, number: int) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    CHECKS[number](init_device_mesh("cpu", (2,)))
    torch.distributed.destroy_process_group()
    os._exit(0)  # as in test_distributed.py


@pytest.mark.parametrize("number", range(len(CHECKS)), ids=[check.__name__.removeprefix("check_") for check in CHECKS])
def test_two_processes(number: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(two_processes, (str(tmp_path / "store"), number), nprocs=2)


@pytest.fixture
def square() -> Iterator[DeviceMesh]:
    """A mesh of 2 x 2 processes of which only this one exists: what it would do, without results."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (2, 2))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "p, placed, found",
    [
        (Problem(B=4, H=4), (BATCH, HEADS), (BATCH, HEADS)),
        (Problem(B=4, H=4), (HEADS, HEADS), (HEADS, HEADS)),
        (Problem(B=4, H=8, kv_heads=4), (HEADS, HEADS), (HEADS, HEADS)),
        (Problem(B=4, H=8, kv_heads=2), (BATCH, HEADS), (BATCH, HEADS)),
        (Problem(B=4, H=4, options={"coefficient": "global"}), (BATCH, HEADS), (R, R)),
    ],
    ids=str,
)
def test_two_dimensions_of_a_mesh(
    p: Problem, placed: tuple[Placement, ...], found: tuple[Placement, ...], square: DeviceMesh
) -> None:
    x = [place(t, square, *placed) for t in p.tensors(torch.float32)]
    out = attention(p, x, None, None)
    assert out.placements == found
    assert all(g.placements == found for g in torch.autograd.grad(out.sum(), x))


def test_query_heads_stay_beside_their_key_heads(square: DeviceMesh) -> None:
    """Two key heads cannot be split by two dimensions, though by either of them."""
    p = Problem(B=4, H=8, kv_heads=2)
    query, key, value = p.tensors(torch.float32)
    x = [place(query, square, HEADS, HEADS), place(key, square, HEADS, R), place(value, square, HEADS, R)]
    assert sum(placement == HEADS for placement in attention(p, x, None, None).placements) == 1


def test_gradient_of_the_convolution(square: DeviceMesh) -> None:
    p = Problem(B=4, H=4, taps=3)
    *x, weight = p.tensors(torch.float32)
    y = [*(place(t, square, BATCH, HEADS) for t in x), place(weight, square, R, BATCH)]
    gradient = torch.autograd.grad(attention(p, y, None, None).sum(), y[3])[0]
    assert gradient.placements == (Partial(), BATCH)


ORDERS = {
    "before": "import torch.distributed.tensor, torch.utils.flop_counter, nystrom_ext",
    "after": "import nystrom_ext, torch.distributed.tensor, torch.utils.flop_counter",
    "by others": "import nystrom_ext; from torch.distributed.fsdp import fully_shard; import torch.utils.flop_counter",
}


@pytest.mark.parametrize("order", ORDERS)
def test_registered_once_torch_has_imported_it(order: str) -> None:
    script = f"""
        import sys, torch, warnings
        warnings.simplefilter("error")
        {ORDERS[order]}
        from torch.distributed.tensor import DTensor
        op = torch.ops.nystrom_ext._attention_forward
        assert op.default in DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
        assert op in torch.utils.flop_counter.flop_registry
        assert not [finder for finder in sys.meta_path if "nystrom" in type(finder).__module__]
    """
    run_alone(script)


def test_not_imported_for_those_who_do_not_need_it() -> None:
    run_alone("""
        import sys, torch, nystrom_ext
        assert not {"torch.distributed.tensor", "torch.utils.flop_counter"} & sys.modules.keys()
    """)


def test_another_torch_is_a_warning_and_no_error() -> None:
    """Of what is registered, nothing is needed for anything else."""
    run_alone("""
        import sys, warnings, nystrom_ext
        sys.modules["nystrom_ext._dtensor"] = None  # to import it is an ImportError
        with warnings.catch_warnings(record=True) as caught:
            import torch.distributed.tensor
        assert any("unknown to torch.distributed.tensor of torch" in str(w.message) for w in caught), caught
    """)


def run_alone(script: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
