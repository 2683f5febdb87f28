"""Whole-slide models as their users write them, around Nyström attention of a given class."""

from __future__ import annotations

import inspect
from math import ceil
from types import ModuleType

import pytest
import torch
from torch import nn


def package():
    return pytest.importorskip("nystrom_attention")


def vendored(*edits: tuple[str, str]) -> ModuleType:
    """A copy of the package's file in somebody's project, with edits (old, new)."""
    source = inspect.getsource(package().nystrom_attention)
    for old, new in edits:
        assert old in source, old
        source = source.replace(old, new)
    module = ModuleType("project.transmil")
    exec(compile(source, "<transmil>", "exec"), vars(module))  # noqa: S102  the installed package's own
    return module


class TransLayer(nn.Module):
    def __init__(self, attention, dim, heads):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = attention(
            dim=dim, dim_head=dim // heads, heads=heads, num_landmarks=dim // 2, pinv_iterations=6, dropout=0.1
        )

    def forward(self, x, return_attn=False):
        if return_attn:
            out, weights = self.attn(self.norm(x), return_attn=True)
            return x + out, weights
        return x + self.attn(self.norm(x))


class PPEG(nn.Module):
    """Depthwise convolutions over the patches, laid out as a square."""

    def __init__(self, dim):
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(dim, dim, taps, padding=taps // 2, groups=dim) for taps in (7, 5, 3)
        )

    def forward(self, x, side):
        first, patches = x[:, :1], x[:, 1:]
        image = patches.mT.unflatten(2, (side, side))
        image = image + sum(convolution(image) for convolution in self.convolutions)
        return torch.cat([first, image.flatten(2).mT], 1)


class TransMIL(nn.Module):
    """A class token, a square of patches (the first ones fill it up), two layers with a PPEG between them."""

    def __init__(self, attention, features=12, dim=32, heads=4, classes=2):
        super().__init__()
        self.project = nn.Sequential(nn.Linear(features, dim), nn.ReLU())
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.layer1, self.layer2 = TransLayer(attention, dim, heads), TransLayer(attention, dim, heads)
        self.position = PPEG(dim)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, bag, return_attn=False):
        x = self.project(bag)
        side = ceil(x.shape[1] ** 0.5)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x, x[:, : side * side - x.shape[1]]], 1)
        x = self.position(self.layer1(x), side)
        x, weights = self.layer2(x, True) if return_attn else (self.layer2(x), None)
        logits = self.head(self.norm(x)[:, 0])
        return (logits, weights) if return_attn else logits
