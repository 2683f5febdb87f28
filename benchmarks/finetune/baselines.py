"""Linformer, Performer and Reformer in the place of softmax attention: same projections, another way to mix tokens."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import UsageError

BUCKET = 64  # tokens per bucket of the Reformer


class Baseline(nn.MultiheadAttention):
    """`nn.MultiheadAttention` for self-attention with a padding mask; subclasses say how heads attend."""

    def __init__(self, stock: nn.MultiheadAttention, args: argparse.Namespace) -> None:
        super().__init__(stock.embed_dim, stock.num_heads, stock.dropout, batch_first=True)
        self.load_state_dict(stock.state_dict())
        self.prepare(args)

    def prepare(self, args: argparse.Namespace) -> None:
        """Parameters and modules of its own."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        """q, k, v (B, H, n, d), keep (B, n) bool → (B, H, n, d)"""
        raise NotImplementedError

    def forward(self, query: Tensor, *others: Any, key_padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        x = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = x.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        keep = torch.ones_like(query[..., 0], dtype=torch.bool)
        if key_padding_mask is not None:  # nn.TransformerEncoder makes it a floating-point one
            keep = ~key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask == 0
        return self.out_proj(self.attend(q, k, v, keep).transpose(1, 2).flatten(2)), None


class Linformer(Baseline):
    """Keys and values projected to ``--linformer-k`` positions by two learned matrices, which all heads share."""

    def prepare(self, args: argparse.Namespace) -> None:
        size = (args.max_length, min(args.linformer_k, args.max_length))
        self.project_keys, self.project_values = (nn.Parameter(torch.randn(size) / math.sqrt(size[1])) for _ in "kv")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        n, there = q.shape[2], keep[:, None, :, None]
        keys = self.project_keys[:n].mT @ (k * there)
        values = self.project_values[:n].mT @ (v * there)
        return F.scaled_dot_product_attention(q, keys, values, dropout_p=self.dropout if self.training else 0.0)


class Performer(Baseline):
    """FAVOR+: random features of the softmax kernel, from performer-pytorch; the features stay as they were drawn."""

    def prepare(self, args: argparse.Namespace) -> None:
        from performer_pytorch.performer_pytorch import gaussian_orthogonal_random_matrix, softmax_kernel

        self.kernel = softmax_kernel
        features = gaussian_orthogonal_random_matrix(args.performer_features, self.head_dim)
        self.register_buffer("features", features)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        queries = self.kernel(q, projection_matrix=self.features, is_query=True)
        keys = self.kernel(k, projection_matrix=self.features, is_query=False) * keep[:, None, :, None]
        return queries @ (keys.mT @ v) / (queries @ keys.sum(2)[..., None])


class Reformer(Baseline):
    """Locality-sensitive hashing, from reformer-pytorch: queries are keys too, so the projection of keys is unused."""

    def prepare(self, args: argparse.Namespace) -> None:
        from reformer_pytorch import LSHAttention

        self.hashing = LSHAttention(self.dropout, BUCKET, args.reformer_hashes)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        heads, n = q.shape[1:3]
        padding = -n % (2 * BUCKET)
        qk, values = (F.pad(x, (0, 0, 0, padding)).flatten(0, 1) for x in (q, v))
        mask = F.pad(keep, (0, padding)).repeat_interleave(heads, 0)
        return self.hashing(qk, values, input_mask=mask)[0].unflatten(0, (-1, heads))[:, :, :n]


BASELINES: dict[str, tuple[type[Baseline], str]] = {
    "linformer": (Linformer, ""),
    "performer": (Performer, "performer-pytorch"),
    "reformer": (Reformer, "reformer-pytorch"),
}


def replace_(model: nn.Module, attention: str, args: argparse.Namespace) -> None:
    """The attention of every nn.TransformerEncoderLayer in ``model``."""
    cls, package = BASELINES[attention]
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            try:
                layer.self_attn = cls(layer.self_attn, args)
            except ImportError as error:
                raise UsageError(f"--attention {attention} needs the package {package}: {error}; install it") from error
