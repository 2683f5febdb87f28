"""The peers that pip has, reduced to attention: x (B, n, H d) -> its q, k, v and the peer's result (B, H, n, d).

Each function raises ImportError where its package is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor, nn


@dataclass
class Peer:
    """``project``: x -> q, k, v. ``attend``: x and a mask (B, n), True = keep, or None -> (B, H, n, d)."""

    package: str
    module: nn.Module
    project: Callable[[Tensor], list[Tensor]]
    attend: Callable[[Tensor, Tensor | None], Tensor]
    conv_weight: Tensor

    @property
    def title(self) -> str:
        return f"{self.package} {version(self.package)}"


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def lucidrains(dim: int, heads: int, m: int, taps: int, n: int) -> Peer:
    from nystrom_attention import NystromAttention

    module = NystromAttention(dim, dim // heads, heads, num_landmarks=m, residual_conv_kernel=taps).double()
    module.to_out = nn.Identity()
    return Peer(
        "nystrom-attention",
        module,
        lambda x: [_heads(y, heads) for y in module.to_qkv(x).chunk(3, -1)],
        lambda x, mask: _heads(module(x, mask=mask), heads),
        module.res_conv.weight,
    )


def huggingface(dim: int, heads: int, m: int, taps: int, n: int) -> Peer:
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = NystromformerConfig(
        hidden_size=dim, num_attention_heads=heads, num_landmarks=m, segment_means_seq_len=n, conv_kernel_size=taps
    )
    module = NystromformerSelfAttention(config).double()

    def attend(x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            mask = (1 - mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min
        return _heads(module(x, mask)[0], heads)

    return Peer(
        "transformers",
        module,
        lambda x: [_heads(layer(x), heads) for layer in (module.query, module.key, module.value)],
        attend,
        module.conv.weight,
    )


PEERS = {"lucidrains": lucidrains, "huggingface": huggingface}
