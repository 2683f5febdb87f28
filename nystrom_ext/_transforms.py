"""What the kernels leave to ATen: derivatives of gradients, forward-mode ones, `torch.func`; and `vmap` as a batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _composite
from ._schema import bind

_OP = torch.ops.nystrom_ext.attention.default
_LIBRARY = torch.library.Library("nystrom_ext", "IMPL")


def composite(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    conv_weight: Tensor | None,
    rng_state: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_landmarks: int,
    pinv_iterations: int,
    scale: float,
    dropout_p: float,
    global_coefficient: bool,
    window: int,
    pinned: int,
) -> Tensor:
    """As the schema says; packed sequences by way of a padded batch."""
    attention = partial(
        _composite.attention,
        conv_weight=conv_weight,
        num_landmarks=num_landmarks,
        pinv_iterations=pinv_iterations,
        scale=scale,
        dropout_p=dropout_p,
        coefficient="global" if global_coefficient else "per_head",
        enable_gqa=query.shape[1] != key.shape[1],
        window=window,
        pinned=pinned,
        rng_state=rng_state,
    )
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return attention(query, key, value, key_padding_mask, query_padding_mask=query_padding_mask)
    q, no_queries = _pad(query, cu_seqlens_q, max_seqlen_q)
    k, no_keys = _pad(key, cu_seqlens_k, max_seqlen_k)
    v, _ = _pad(value, cu_seqlens_k, max_seqlen_k)
    return _unpad(attention(q, k, v, no_keys, query_padding_mask=no_queries), cu_seqlens_q, query.shape[2])


def _pad(x: Tensor, offsets: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """(1, H, total, d) -> (B, H, longest, d), and which tokens are none (B, longest)."""
    place = torch.arange(longest, device=x.device)
    ignored = place >= offsets.diff()[:, None]
    row = F.pad(x[0], (0, 0, 0, 1))  # one token more, for those that are none
    index = (offsets[:-1, None] + place).masked_fill(ignored, x.shape[2])
    return row[:, index].transpose(0, 1), ignored


def _unpad(x: Tensor, offsets: Tensor, total: int) -> Tensor:
    """(B, H, longest, e) -> (1, H, total, e)."""
    token = torch.arange(total, device=x.device)
    sample = torch.searchsorted(offsets[1:], token, right=True)
    place = sample * x.shape[2] + token - offsets[sample]
    return x.transpose(0, 1).flatten(1, 2).index_select(1, place)[None]


def _batched(keyset: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Tensor:
    """The batching rule of `torch.vmap`."""
    from torch._functorch.autograd_function import custom_function_call_vmap_helper
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    a = bind(_OP, args, kwargs)

    def call(*values: Any) -> Tensor:
        return _call(dict(zip(a, values, strict=True)))

    def rule(info: Any, dims: tuple[int | None, ...], *values: Any) -> tuple[Tensor, int]:
        return _vmap(info, dict(zip(a, dims, strict=True)), dict(zip(a, values, strict=True))), 0

    interpreter: Any = retrieve_current_functorch_interpreter()
    return custom_function_call_vmap_helper(interpreter, rule, call, *a.values())


def _vmap(info: Any, dims: dict[str, int | None], a: dict[str, Any]) -> Tensor:
    """The slices beside each other in the batch; one after another where that would couple or mix them."""
    n: int = info.batch_size
    if a["dropout_p"] > 0 and info.randomness != "different":
        raise RuntimeError(
            f"nystrom_attention: vmap with randomness={info.randomness!r} meets dropout_p={a['dropout_p']}; every "
            "slice draws its own dropout, so pass randomness='different' to vmap, or dropout_p=0"
        )
    first = {name: x if dims[name] is None else x.movedim(dims[name], 0) for name, x in a.items()}
    if n > 0 and (a["coefficient"] == "global" or dims["conv_weight"] is not None):
        slices = ({name: x if dims[name] is None else x[i] for name, x in first.items()} for i in range(n))
        return torch.stack([_call(one) for one in slices])
    samples = first["query"].shape[0 if dims["query"] is None else 1]
    for name in ("query", "key", "value", "key_padding_mask", "query_padding_mask"):
        if first[name] is not None:
            x = first[name] if dims[name] is not None else first[name].expand(n, *first[name].shape)
            first[name] = x.flatten(0, 1)
    if dims["conv_weight"] is not None:  # no slices: any weight will do
        first["conv_weight"] = first["conv_weight"].new_zeros(first["conv_weight"].shape[1:])
    out = _call(first)
    return out.unflatten(0, (n, samples))


def _call(a: dict[str, Any]) -> Tensor:
    positional = [a.pop(name) for name in ("query", "key", "value", "key_padding_mask")]
    return _OP(*positional, **a)


_LIBRARY.impl("_attention_composite", composite, "CompositeImplicitAutograd")
_LIBRARY.impl("attention", _batched, "FuncTorchBatched", with_keyset=True)
