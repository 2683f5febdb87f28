"""The input projections of `NystromMultiheadAttention`, as those of `nn.MultiheadAttention`.

Shapes: N batch, H heads, L queries, S keys, d head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_F: Any = F  # nn.MultiheadAttention's own functions are missing in the stubs


def project(module: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> q (N, H, L, d), k and v (N, H, S, d) with the added keys."""
    q, k, v = in_projection(module, query, key, value)
    if query.dim() == 2:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    elif not module.batch_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    if q.shape[0] != k.shape[0]:  # len() would make a constant of a symbolic batch
        raise RuntimeError(f"query and key must have the same batch size, got {q.shape[0]} and {k.shape[0]}")
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.expand(k.shape[0], -1, -1)], 1)
        v = torch.cat([v, module.bias_v.expand(len(v), -1, -1)], 1)
    if module.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    if module.conv is not None and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"the convolution needs L = S, got L={q.shape[1]}, S={k.shape[1]}; construct with conv_kernel_size=None"
        )
    q, k, v = (x.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2) for x in (q, k, v))
    return q, k, v


def in_projection(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Any:
    """q, k, v in the caller's layout. Reads the weights at each call: others may have replaced them by tensors."""
    if query.shape[-1] != module.embed_dim:
        raise AssertionError(f"was expecting embedding dimension of {module.embed_dim}, but got {query.shape[-1]}")
    if not module._qkv_same_embed_dim:
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key's sequence and batch dims {key.shape[:-1]} do not match value's {value.shape[:-1]}"
            )
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        return _F._in_projection(query, key, value, *weights, *biases)
    if key.shape != value.shape:
        raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
    if query is key and key is value:  # strided views suffice; _in_projection_packed would copy q, k and v
        return F.linear(query, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    return _F._in_projection_packed(query, key, value, module.in_proj_weight, module.in_proj_bias)
