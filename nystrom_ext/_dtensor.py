"""How the operators may be sharded: their strategies for `torch.distributed.tensor`.

On each dimension of a mesh a call is replicated, split by samples, or split by heads; other placements, as shards of
the sequence or of the features, are redistributed to the cheapest of these. What couples samples or heads is
replicated: ``coefficient="global"``, and dropout, which draws by the numbers of the sample and of the head. So results
are those of one process, and so are gradients.

`nystrom_attention` and `nystrom_attention_varlen` arrive here as ``_attention_forward``, and in `torch.inference_mode`
as ``attention`` and ``attention_varlen``. Packed sequences are replicated or split by heads.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo
from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

from ._schema import bind

SAMPLES, HEADS = 0, 1

# The dimensions of samples and of heads; in all other tensors they are 0 and 1.
_DIMENSIONS: dict[str, tuple[int | None, int | None]] = {
    "key_padding_mask": (0, None),
    "query_padding_mask": (0, None),
    "rng_state": (None, None),
    "cu_seqlens_q": (None, None),
    "cu_seqlens_k": (None, None),
    "conv_weight": (None, 0),
    "dconv_weight": (None, 0),
}


def _placement(name: str, split: int | None) -> Placement:
    dimension = None if split is None else _DIMENSIONS.get(name, (0, 1))[split]
    if dimension is not None:
        return Shard(dimension)
    return Partial() if name == "dconv_weight" and split == SAMPLES else Replicate()


def _strategy(schema: OpSchema) -> OpStrategy:
    """Every way to compute a call, with what it costs to redistribute the inputs. Not `register_sharding`, torch's
    public decorator, as ways that are right on each dimension of a mesh may be wrong together."""
    a = bind(schema.op, schema.args_schema, schema.kwargs_schema)
    names = [*list(a)[: len(schema.args_schema)], *schema.kwargs_schema]  # in torch's order
    inputs = [name for name in names if isinstance(a[name], OpStrategy)]
    outputs = [output.name or "out" for output in schema.op._schema.returns]
    empty = {name for name, wanted in zip(outputs, a.get("output_mask", ()), strict=False) if not wanted}
    if a["conv_weight"] is None:
        empty.add("dconv_weight")
    heads, groups = a["query"].shape[1], a["key"].shape[1]
    fixed = {name: a[name].strategies[0].output_spec.placements for name in schema.kwargs_schema if name in inputs}

    def placements(split: int | None) -> list[Placement | None]:
        results = [_placement(name, None if name in empty else split) for name in outputs]
        return [*results, *(_placement(name, split) for name in inputs)]

    def valid(way: OpSpec) -> bool:
        of = dict(zip(inputs, way.input_specs or (), strict=True))
        if any(of[name].placements != now for name, now in fixed.items()):
            return False  # torch does not redistribute keyword arguments
        return heads == groups or groups % _shards(of["key"], HEADS) == 0  # each query head beside its key head

    if a["dropout_p"] > 0 and "rng_state" not in a:
        raise NotImplementedError(
            f"nystrom_attention: dropout of DTensors does not work in torch.inference_mode, got dropout_p = "
            f"{a['dropout_p']}; use torch.no_grad, or pass 0"
        )
    coupled = a["dropout_p"] > 0 or a.get("global_coefficient") or a.get("coefficient") == "global"
    packed = a.get("cu_seqlens_q") is not None  # sequences in one row, which nobody splits
    splits = (None,) if coupled else (None, HEADS) if packed else (None, SAMPLES, HEADS)
    ways = [placements(split) for split in splits]
    expanded = expand_to_full_mesh_op_strategy(schema.get_mesh_from_args(), schema, ways, input_index=len(outputs))
    strategy = OpStrategy([way for way in expanded.strategies if valid(way)])  # torch 2.14 renames its own filter
    if not strategy.strategies:
        raise NotImplementedError(
            f"nystrom_attention: torch.inference_mode does not redistribute DTensors given by keyword, got {fixed}, "
            "which fits no split of the call; use torch.no_grad instead"
        )
    return strategy


def _shards(spec: DTensorSpec, dimension: int) -> int:
    sizes = (spec.mesh.size(i) for i, placement in enumerate(spec.placements) if placement.is_shard(dimension))
    return torch.Size(sizes).numel()


def _register(op: torch._ops.OpOverload) -> None:
    options = [(i, x) for i, x in enumerate(op._schema.arguments) if "Tensor" not in str(x.type)]
    keywords = [option.name for _, option in options if option.kwarg_only]
    decides = RuntimeSchemaInfo(options[0][0], keywords or None, needs_pytree=True)  # with the tensors' placements
    DTensor._op_dispatcher.sharding_propagator.register_op_strategy(op, _strategy, decides)


_OPS = torch.ops.nystrom_ext
for _op in (_OPS.attention, _OPS.attention_varlen, _OPS._attention_forward, _OPS._attention_backward):
    _register(_op.default)
