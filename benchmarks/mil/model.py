"""A classifier of bags as TransMIL's paper describes it (arXiv 2106.00908), around attention of a given class.

Shapes: B bags, n instances of each, N = 1 + k² tokens, E features of a token.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.finetune import UsageError
from nystrom_ext import convert_
from nystrom_ext.compat.lucidrains import NystromAttention

from .bags import FEATURES

EXACT, PACKAGE, OURS = "exact", "nystrom-attention", "nystrom_ext"
ATTENTIONS = (EXACT, PACKAGE, OURS)
SIDES = (7, 5, 3)  # of the convolutions that encode where a patch is


class ExactAttention(NystromAttention):
    """nystrom-attention's module with softmax attention: same parameters, same convolution of the values."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self._heads(x)
        out = F.scaled_dot_product_attention(q, k, v) + self.res_conv(v)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def attention_rows(  # type: ignore[override]
        self, x: Tensor, rows: Sequence[int], *, average_attn_weights: bool
    ) -> Tensor:
        q, k, _ = self._heads(x)
        weights = (self.scale * q[:, :, list(rows)] @ k.mT).softmax(-1)
        return weights.mean(1) if average_attn_weights else weights

    def _heads(self, x: Tensor) -> list[Tensor]:
        return [y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.to_qkv(x).chunk(3, -1)]


class Layer(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, attention: Callable[..., nn.Module], args: argparse.Namespace) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(args.dim)
        width = args.dim // args.heads
        self.attention: Any = attention(args.dim, width, args.heads, args.num_landmarks, dropout=args.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


class Position(nn.Module):
    """Depthwise convolutions of the square of patches, added to them: the paper's PPEG. The class token passes by."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim) for k in SIDES)

    def forward(self, x: Tensor, side: int) -> Tensor:
        square = x[:, 1:].mT.unflatten(2, (side, side))
        for convolution in self.convolutions:
            x = torch.cat([x[:, :1], x[:, 1:] + convolution(square).flatten(2).mT], 1)
        return x


class Classifier(nn.Module):
    """(B, n, FEATURES) -> logits (B, 2). The first instances fill the square up."""

    def __init__(self, attention: Callable[..., nn.Module], args: argparse.Namespace) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(FEATURES, args.dim), nn.ReLU())
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, args.dim))
        self.first, self.position, self.second = Layer(attention, args), Position(args.dim), Layer(attention, args)
        self.norm, self.head = nn.LayerNorm(args.dim), nn.Linear(args.dim, 2)

    def forward(self, bag: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self._tokens(bag))[:, 0]))

    def attention_of_class_token(self, bag: Tensor) -> Tensor:
        """(B, n): what the class token attends to in the last layer, the mean of the heads, in O(n)."""
        x = self.second.norm(self._tokens(bag))
        return self.second.attention.attention_rows(x, [0], average_attn_weights=True)[:, 0, 1 : 1 + bag.shape[1]]

    def _tokens(self, bag: Tensor) -> Tensor:
        """Of the last layer, (B, N, E)."""
        x = self.project(bag)
        side = ceil(x.shape[1] ** 0.5)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x, x[:, : side**2 - x.shape[1]]], 1)
        return self.position(self.first(x), side)


def build(args: argparse.Namespace, name: str) -> Classifier:
    """The same parameters whatever the attention. UsageError where a package is missing."""
    classes: dict[str, Callable[..., nn.Module]] = {EXACT: ExactAttention, OURS: NystromAttention}
    if name == PACKAGE:
        try:
            from nystrom_attention import NystromAttention as Package
        except ImportError as error:
            rule = f"--attention {PACKAGE} needs the package of that name: {error}"
            raise UsageError(f"{rule}; pip install {PACKAGE}, or leave it out") from error
        classes[PACKAGE] = Package
    torch.manual_seed(args.seed)
    return Classifier(classes[name], args).to(args.device)


def with_rows(model: Classifier) -> Classifier:
    """The same model, whose attention can say single rows: the package's own is converted in place."""
    if not hasattr(model.second.attention, "attention_rows"):
        convert_(model)
    return model.eval()
