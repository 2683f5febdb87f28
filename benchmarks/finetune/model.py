"""The classifier, and its attention exchanged."""

from __future__ import annotations

import argparse
import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from . import UsageError, baselines

ATTENTIONS = ("softmax", "nystrom", *baselines.BASELINES)
SCALE = 0.02  # standard deviation of the initial embeddings


class TextClassifier(nn.Module):
    """Token and learned position embeddings, nn.TransformerEncoder, mean over the tokens, linear classifier.

    ``dual``: two texts per example, encoded apart; a hidden layer compares their means, as in Long-Range Arena.
    """

    def __init__(self, args: argparse.Namespace, vocab: int, labels: int, dual: bool = False) -> None:
        super().__init__()
        width = args.d_model
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(args.max_positions, width)
        self.dropout = nn.Dropout(args.dropout)
        layer = nn.TransformerEncoderLayer(
            width, args.heads, args.feedforward, args.dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, args.layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.classifier: nn.Module = nn.Linear(width, labels)
        if dual:
            hidden = nn.Linear(4 * width, args.feedforward)
            self.classifier = nn.Sequential(hidden, nn.ReLU(), nn.Linear(args.feedforward, labels))
        nn.init.normal_(self.tokens.weight, std=SCALE)
        with torch.no_grad():  # neighbours look alike from the first step
            self.positions.weight.copy_(0.3 * SCALE * _sinusoids(args.max_positions, width))
            for parameter in self.encoder.parameters():  # TransformerEncoder copies one layer: make them differ
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        """ids and padding, bool with True = padding, (B, n), or (B, 2, n) if dual → logits (B, labels)."""
        if ids.dim() == 3:
            a, b = self.encode(ids.flatten(0, 1), padding.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
            return self.classifier(torch.cat([a, b, a * b, a - b], -1))
        return self.classifier(self.encode(ids, padding))

    def encode(self, ids: Tensor, padding: Tensor) -> Tensor:
        """(B, n) → means over the tokens (B, d_model)"""
        x = self.dropout(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
        x = self.encoder(x, src_key_padding_mask=padding)
        keep = (~padding)[..., None]
        return (x * keep).sum(1) / keep.sum(1)


def build(args: argparse.Namespace, attention: str, vocab: int, labels: int, dual: bool = False) -> nn.Module:
    """The model of one arm on its device. Every arm starts from the same values."""
    torch.manual_seed(args.seed)
    model: nn.Module = TextClassifier(args, vocab, labels, dual)
    if attention == "nystrom":
        convert(model, args)
    elif attention in baselines.BASELINES:
        baselines.replace_(model, attention, args)
    return model.to(args.device)


def check(args: argparse.Namespace) -> None:
    """Whether the machine has what ``build`` needs."""
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device must be a device of this machine, got {args.device}: {reason}; try cpu") from error
    if "nystrom" in args.attention:
        try:
            importlib.import_module("nystrom_ext")
        except ImportError as error:
            raise UsageError(f"--attention nystrom needs nystrom_ext: {error}; or use --attention softmax") from error
        nystrom_options(args)


def convert(model: nn.Module, args: argparse.Namespace) -> None:
    """Nyström attention in ``model``, as the options say."""
    from nystrom_ext import NystromMultiheadAttention, convert_  # only the Nyström arm needs the compiled extension

    options = nystrom_options(args)
    try:
        report = convert_(model, include=args.include, exclude=args.exclude, **options)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--attention nystrom must convert a module: {reason}; change the model or --include"
        ) from error
    if args.conv_kernel_size:
        for name in report.converted:  # the convolution is a parameter, which conversion never adds
            stock = model.get_submodule(name)
            assert isinstance(stock, NystromMultiheadAttention)
            ours = NystromMultiheadAttention(
                stock.embed_dim, stock.num_heads, stock.dropout, batch_first=True,
                conv_kernel_size=args.conv_kernel_size, **options,
            )  # fmt: skip
            ours.load_state_dict(stock.state_dict(), strict=False)
            model.set_submodule(name, ours)


def nystrom_options(args: argparse.Namespace) -> dict[str, Any]:
    from nystrom_ext._options import Options

    options = {"num_landmarks": args.num_landmarks}
    for name in ("window", "pinned"):
        if getattr(args, name):
            if not hasattr(Options(), name):
                raise UsageError(f"--{name} needs a nystrom_ext that has it, got {getattr(args, name)}; leave it out")
            options[name] = getattr(args, name)
    return options


def _sinusoids(count: int, features: int) -> Tensor:
    """(count, features); feature pairs turn at geometrically spaced rates."""
    rates = torch.exp(-math.log(10000) * torch.arange(0, features, 2) / features)
    angles = torch.arange(count)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :features]
