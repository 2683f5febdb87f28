"""The classifier, and its attention exchanged."""

from __future__ import annotations

import argparse
import importlib
import math

import torch
from torch import Tensor, nn

from . import UsageError

ATTENTIONS = ("softmax", "nystrom")
SCALE = 0.02  # standard deviation of the initial embeddings


class TextClassifier(nn.Module):
    """Token and learned position embeddings, nn.TransformerEncoder, mean over the tokens, linear classifier."""

    def __init__(self, args: argparse.Namespace, vocab: int, labels: int) -> None:
        super().__init__()
        width = args.d_model
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(args.max_positions, width)
        self.dropout = nn.Dropout(args.dropout)
        layer = nn.TransformerEncoderLayer(
            width, args.heads, args.feedforward, args.dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, args.layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.classifier = nn.Linear(width, labels)
        nn.init.normal_(self.tokens.weight, std=SCALE)
        with torch.no_grad():  # neighbours look alike from the first step
            self.positions.weight.copy_(0.3 * SCALE * _sinusoids(args.max_positions, width))
            for parameter in self.encoder.parameters():  # TransformerEncoder copies one layer: make them differ
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        """ids (B, n), padding (B, n) bool with True = padding → logits (B, labels)."""
        x = self.dropout(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
        x = self.encoder(x, src_key_padding_mask=padding)
        keep = (~padding)[..., None]
        return self.classifier((x * keep).sum(1) / keep.sum(1))


def build(args: argparse.Namespace, attention: str, vocab: int, labels: int) -> nn.Module:
    """The model of one arm on its device. Every arm starts from the same values."""
    torch.manual_seed(args.seed)
    model: nn.Module = TextClassifier(args, vocab, labels)
    if attention == "nystrom":
        _convert(model, args.num_landmarks)
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


def _convert(model: nn.Module, num_landmarks: int) -> None:
    from nystrom_ext import convert_  # only the Nyström arm needs the compiled extension

    report = convert_(model, num_landmarks=num_landmarks)
    if not report.converted:
        raise UsageError(f"--attention nystrom must convert a module, got none: {report}; change the model")


def _sinusoids(count: int, features: int) -> Tensor:
    """(count, features); feature pairs turn at geometrically spaced rates."""
    rates = torch.exp(-math.log(10000) * torch.arange(0, features, 2) / features)
    angles = torch.arange(count)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :features]
