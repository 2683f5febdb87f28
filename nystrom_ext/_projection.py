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
    q, k, v = (_batch_first(module, x) for x in in_projection(module, query, key, value))
    _check_batch(q, k)
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.expand(k.shape[0], -1, -1)], 1)
        v = torch.cat([v, module.bias_v.expand(len(v), -1, -1)], 1)
    if module.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    if module.conv is not None and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"the convolution needs L = S, got L={q.shape[1]}, S={k.shape[1]}; construct with conv_kernel_size=None"
        )
    return _heads(module, q), _heads(module, k), _heads(module, v)


def project_scored(module: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`project` without the values."""
    _check_width(module, query)
    if module._qkv_same_embed_dim:
        weights = module.in_proj_weight.chunk(3)[:2]
    else:
        weights = module.q_proj_weight, module.k_proj_weight
    biases = (None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)[:2]
    x = zip((query, key), weights, biases, strict=True)
    q, k = (_batch_first(module, F.linear(*part)) for part in x)
    _check_batch(q, k)
    if module.bias_k is not None:
        k = torch.cat([k, module.bias_k.expand(k.shape[0], -1, -1)], 1)
    if module.add_zero_attn:
        k = F.pad(k, (0, 0, 0, 1))
    return _heads(module, q), _heads(module, k)


def _batch_first(module: Any, x: Tensor) -> Tensor:
    if x.dim() == 2:
        return x.unsqueeze(0)
    return x if module.batch_first else x.transpose(0, 1)


def _heads(module: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)


def _check_batch(q: Tensor, k: Tensor) -> None:
    if q.shape[0] != k.shape[0]:  # len() would make a constant of a symbolic batch
        raise RuntimeError(f"query and key must have the same batch size, got {q.shape[0]} and {k.shape[0]}")


def _check_width(module: Any, query: Tensor) -> None:
    if query.shape[-1] != module.embed_dim:
        raise AssertionError(f"was expecting embedding dimension of {module.embed_dim}, but got {query.shape[-1]}")


def in_projection(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Any:
    """q, k, v in the caller's layout. Reads the weights at each call: others may have replaced them by tensors."""
    _check_width(module, query)
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
