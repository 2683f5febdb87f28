"""DistributedDataParallel and FSDP2, of one process and of two."""

import os

import pytest
import torch
import torch.distributed
from small_models import (
    PADDING,
    E,
    H,
    L,
    M,
    N,
    constructed,
    converted,
    encoder,
    gradients,
    inputs,
    randomise,
    regimes,
    stock,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from nystrom_ext import NystromMultiheadAttention, convert_, revert_

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),
    pytest.mark.filterwarnings("ignore:NystromMultiheadAttention. need_weights=True costs"),
]


@regimes
@pytest.mark.parametrize(
    "kwargs", [{}, {"bias": False}, {"add_bias_kv": True}, {"kdim": 5, "vdim": 7}, {"conv_kernel_size": 3}], ids=str
)
@pytest.mark.parametrize("static_graph", [False, True])
def test_ddp_meets_no_unused_parameters(kwargs, num_landmarks, static_graph, process_group):
    attention = NystromMultiheadAttention(E, H, batch_first=True, num_landmarks=num_landmarks, **kwargs)
    model = DistributedDataParallel(randomise(attention), static_graph=static_graph)
    query, key, value = inputs(), torch.randn(N, L, kwargs.get("kdim", E)), torch.randn(N, L, kwargs.get("vdim", E))
    for need_weights in (False, True, False):  # DDP complains one step late
        out, _ = model(query, key, value, need_weights=need_weights)
        assert {*gradients(model, out)} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("order", ["converted first", "sharded first"])
def test_fsdp_of_the_attention_itself(order, process_group):
    """FSDP2 derives a class for the module it shards. A layer around the attention: test_encoder.py."""
    model, x = stock(), inputs().requires_grad_()
    if order == "converted first":
        convert_(model, num_landmarks=M)
    fully_shard(model.attention)
    fully_shard(model)
    convert_(model, num_landmarks=M)
    assert isinstance(model.attention, NystromMultiheadAttention) and isinstance(model.attention, FSDPModule)
    out, reference = model(x, PADDING), constructed()
    expected = reference(x, PADDING)
    assert_close(out, expected)
    grads = {name: g.full_tensor() for name, g in gradients(model, out).items()}
    assert_close(grads, gradients(reference, expected))
    revert_(model)
    assert not isinstance(model.attention, NystromMultiheadAttention) and isinstance(model.attention, FSDPModule)
    assert_close(model(x), stock()(x))


def two_processes(rank, path):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    reference, x = converted(encoder()), inputs()
    mine = slice(rank * N // 2, (rank + 1) * N // 2)
    cotangent = torch.linspace(-1, 2, N * L * E).view(N, L, E)

    def grads_of(model, samples):
        out = model(x[samples], src_key_padding_mask=PADDING[samples])
        (out * cotangent[samples]).sum().backward()
        grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
        return out, {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}

    def sharded(model):
        for layer in model.layers:
            fully_shard(layer.self_attn)
            fully_shard(layer)
        return fully_shard(model)

    everything, sums = grads_of(reference, slice(None))
    for wrap in (DistributedDataParallel, sharded):
        for model in (wrap(converted(encoder())), converted(wrap(encoder()))):
            for _ in range(2):
                model.zero_grad()
                out, averages = grads_of(model, mine)
                assert_close(out, everything[mine])
                assert_close({name: 2 * g for name, g in averages.items()}, sums)
            with torch.no_grad():
                out = model.eval()(x[mine], src_key_padding_mask=PADDING[mine])
                assert_close(out, everything[mine])
    torch.distributed.destroy_process_group()
    # Gloo's worker threads may still release a tensor's Python object, which aborts an interpreter that is going down.
    os._exit(0)


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(two_processes, (str(tmp_path / "store"),), nprocs=2)
