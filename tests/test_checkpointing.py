"""What is saved for the backward pass, where it is kept, and what is computed again instead: hooks on saved tensors,
selective checkpointing, the partitioner of torch.compile."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Problem
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry

from nystrom_ext import nystrom_attention

FORWARD = torch.ops.nystrom_ext._attention_forward.default

PROBLEMS = {
    "plain": Problem(L=300),
    "everything": Problem(L=300, e=12, taps=3, mask="holes", options={"window": 5, "pinned": 2, "dropout_p": 0.2}),
    "cross, grouped": Problem(L=300, S=400, H=4, kv_heads=2, mask="tail"),
    "exact": Problem(L=300, S=6),
}
problems = pytest.mark.parametrize("p", PROBLEMS.values(), ids=PROBLEMS)


def attention(p: Problem, masks: tuple[Tensor | None, Tensor | None], *x: Tensor) -> Tensor:
    return nystrom_attention(
        *x[:3],
        masks[0],
        query_padding_mask=masks[1],
        conv_weight=x[3] if p.taps else None,
        num_landmarks=p.m,
        enable_gqa=p.kv_heads is not None,
        **p.options,
    )


def with_gradients(call: Callable[..., Tensor], x: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    out = call(*x)
    return [out, *torch.autograd.grad(out.square().sum(), x)]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@problems
def test_saved_are_the_inputs_themselves_and_nothing_of_the_sequence(p: Problem) -> None:
    others = []
    for length in (p.L, 3 * p.L):
        longer = dataclasses.replace(p, L=length)
        x, masks = longer.tensors(torch.float32), longer.masks()
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            attention(longer, masks, *x)
        inputs = {t.data_ptr() for t in (*x, *masks) if t is not None}
        others.append([t.shape for t in saved if t.data_ptr() not in inputs])
        assert inputs <= {t.data_ptr() for t in saved}
    assert others[0] == others[1]


@problems
def test_saved_tensors_may_be_kept_elsewhere(p: Problem) -> None:
    """As offloading keeps them: other tensors come back, contiguous ones."""
    x = p.tensors(torch.float32)
    call = functools.partial(attention, p, p.masks())
    expected = with_gradients(call, x)
    with torch.autograd.graph.save_on_cpu():
        assert_same_bits(with_gradients(call, x), expected)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.numpy, torch.from_numpy):
        assert_same_bits(with_gradients(call, x), expected)


def calls(f: Callable[[], Any]) -> tuple[int, int]:
    """Of the kernels, forward and backward. An operator appears in a profile for each mode that it passes, too."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        f()
    names = Counter(event.name for event in profiled.events())
    return names["nystrom_ext::query_pass"], names["nystrom_ext::query_pass_backward"]


POLICIES = {
    "nothing": (None, 2),
    "by list": ([FORWARD], 1),
    "by name": (
        lambda context, op, *args, **kwargs: (
            CheckpointPolicy.MUST_SAVE
            if op.name() == "nystrom_ext::_attention_forward"
            else CheckpointPolicy.PREFER_RECOMPUTE
        ),
        1,
    ),
}


@problems
@pytest.mark.parametrize("policy", POLICIES)
def test_selective_checkpointing(policy: str, p: Problem) -> None:
    """The operator's name to torch is that of the forward pass, not that of the public operator around it."""
    save, times = POLICIES[policy]
    x = p.tensors(torch.float32)
    context = {} if save is None else {"context_fn": functools.partial(create_selective_checkpoint_contexts, save)}

    def block(*x: Tensor) -> Tensor:
        return attention(p, p.masks(), x[0].sin(), *x[1:]).cos()

    def checkpointed() -> list[Tensor]:
        return with_gradients(lambda *x: checkpoint(block, *x, use_reentrant=False, **context), x)

    assert calls(checkpointed) == (times, 1)
    assert_same_bits(checkpointed(), with_gradients(block, x))


class Layer(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in self.projections[:3])
        out = nystrom_attention(query, key, value, num_landmarks=16, self_attention=True)
        return x + self.projections[3](out.transpose(1, 2).flatten(2)).relu()


def recomputed(f: Callable[[Tensor], Tensor]) -> int:
    """How often the forward operator runs in the backward graph that torch.compile makes of ``f``."""
    torch.compiler.reset()
    graphs: dict[str, GraphModule] = {}

    def keep(name: str, graph: GraphModule, _: Any) -> Any:
        graphs[name] = graph
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=functools.partial(keep, "forward"),
        bw_compiler=functools.partial(keep, "backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    x = torch.randn(2, 512, 32, requires_grad=True)
    torch.compile(f, backend=backend, fullgraph=True)(x).sum().backward()
    found = {name: sum(node.target is FORWARD for node in graph.graph.nodes) for name, graph in graphs.items()}
    assert found["forward"] == 1
    return found["backward"]


def test_compiled_programs_save_rather_than_compute_again() -> None:
    assert recomputed(Layer()) == 0


def test_compiled_programs_on_a_budget_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a budget of 1 torch takes operators that are not its own for free, unless it is told to count their FLOPs:
    then the projections, which save as much memory for fewer, are computed again first."""
    with config.patch(activation_memory_budget=0.5):
        assert recomputed(Layer()) == 1
        with config.patch(is_non_builtin_to_include=True):
            assert recomputed(Layer()) == 0
            monkeypatch.delitem(flop_registry, torch.ops.nystrom_ext._attention_forward)
            assert recomputed(Layer()) == 1


def test_compiled_selective_checkpointing() -> None:
    layer = Layer()
    save = functools.partial(create_selective_checkpoint_contexts, [FORWARD])
    assert recomputed(lambda x: checkpoint(layer, x, use_reentrant=False)) == 1
    assert recomputed(lambda x: checkpoint(layer, x, use_reentrant=False, context_fn=save)) == 0
