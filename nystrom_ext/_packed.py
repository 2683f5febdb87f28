"""Sequences of `NystromMultiheadAttention` one after another, without the padding between them.

Shapes: E embed_dim, total the tokens of all sequences, N sequences, L tokens of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attention import same_tensor
from ._masks import IGNORE_THRESHOLD, added_keys, check_key_mask
from ._projection import in_projection
from .varlen import nystrom_attention_varlen


@dataclass
class Packing:
    """Where sequences begin and end: ``offsets`` (N + 1) from 0 to total; ``longest`` of them."""

    offsets: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Tensor) -> Packing:
        return cls(F.pad(lengths.cumsum(0), (1, 0)), int(lengths.max()) if len(lengths) else 0)


def attend(module: Any, tokens: tuple[Tensor, Tensor, Tensor], packing: Packing) -> Tensor:
    """Self-attention of ``module`` on packed query, key and value (total, E), before its output projection."""
    q, k, v = (x.unflatten(-1, (module.num_heads, -1)) for x in in_projection(module, *tokens))
    sides = (packing.offsets, packing.offsets, packing.longest, packing.longest)
    conv_weight = None if module.conv is None else module.conv.weight
    return nystrom_attention_varlen(q, k, v, *sides, conv_weight=conv_weight, **module.attention_options()).flatten(1)


def unpadded(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, attn_mask: Tensor | None
) -> Tensor | None:
    """The output of ``module`` with padded tokens dropped before the projections; they get ``out_proj``'s value of
    zeros, as they do otherwise. None where that is not the same: up to ``num_landmarks`` tokens
    `nn.MultiheadAttention` attends from padded queries. Waits for a GPU, which counts the tokens."""
    if query.dim() != 3 or attn_mask is not None or added_keys(module) or torch.compiler.is_compiling():
        return None
    if not (same_tensor(query, key) if module.self_attention is None else module.self_attention):
        return None
    x = [x if module.batch_first else x.transpose(0, 1) for x in (query, key, value)]
    if not x[0].shape == x[1].shape == x[2].shape or mask.shape != x[0].shape[:2]:
        return None
    if mask.shape[1] <= module.num_landmarks:
        return None
    check_key_mask(mask)
    keep = ~mask if mask.dtype == torch.bool else mask > IGNORE_THRESHOLD
    q = x[0][keep]
    k, v = (q if part is query else x[i][keep] for i, part in ((1, key), (2, value)))  # one tensor: one projection
    rows = attend(module, (q, k, v), Packing.of(keep.sum(1)))
    out = module.out_proj(torch.cat([rows, rows.new_zeros(1, rows.shape[1])]))
    place = torch.full(keep.shape, len(rows), device=keep.device)
    place[keep] = torch.arange(len(rows), device=keep.device)
    return out[place] if module.batch_first else out[place.T]


def nested(
    module: Any, query: Tensor, key: Tensor, value: Tensor, masked: bool, need_weights: bool, average: bool
) -> tuple[Tensor, Tensor | None]:
    """``module`` on NestedTensors (N, *, E), strided or jagged -> the same. Where weights are asked for or keys added,
    it pads; weights stay padded, with zeros."""
    x: Any = query
    same, padded = query is key and key is value, need_weights or added_keys(module) > 0
    served = x.layout == torch.strided or (x._lengths is None and x._ragged_idx == 1 and not padded)
    if not same or not served or x.dim() != 3 or not module.batch_first or masked:
        raise AssertionError(
            "NystromMultiheadAttention does not support NestedTensor outside of 3-D self-attention in a batch_first "
            "module without masks, strided, or jagged without holes, weights and added keys, got "
            f"{x.dim()}-D query of layout {x.layout}, query is key is value: {same}, batch_first={module.batch_first}, "
            f"masks: {masked}, need_weights={need_weights}; pass need_weights=False, or pad it and pass "
            "key_padding_mask"
        )
    if x.layout == torch.jagged:
        packing = Packing(x.offsets(), x._get_max_seqlen())
        out = module.out_proj(attend(module, (x.values(),) * 3, packing))
        return torch.nested.nested_tensor_from_jagged(out, packing.offsets, max_seqlen=packing.longest), None
    if padded:
        return _nested_by_padding(module, x, need_weights, average)
    x = x.contiguous()
    sizes = x._nested_tensor_size()
    tokens = x.values().unflatten(0, (-1, module.embed_dim))
    out = module.out_proj(attend(module, (tokens,) * 3, Packing.of(sizes[:, 0].to(x.device))))
    layout = sizes, x._nested_tensor_strides(), x._nested_tensor_storage_offsets()
    return torch._nested_view_from_buffer(out.flatten(), *layout), None


def _nested_by_padding(module: Any, nested: Any, need_weights: bool, average: bool) -> tuple[Tensor, Tensor | None]:
    x = nested.to_padded_tensor(0.0)
    padding = torch.arange(x.shape[1], device=x.device) >= nested._nested_tensor_size()[:, :1].to(x.device)
    out, weights = module.forward(x, x, x, padding, need_weights, average_attn_weights=average)
    if weights is not None:
        weights = weights.masked_fill(padding[:, :, None] if weights.dim() == 3 else padding[:, None, :, None], 0)
    return torch._nested_tensor_from_mask(out, ~padding), weights
