"""The models that tests convert: one attention with a head, and a stock encoder of two layers."""

import pytest
import torch
from torch import nn

from nystrom_ext import NystromMultiheadAttention, convert_

E, H, N, L, M = 8, 2, 4, 24, 4

PADDING = torch.arange(L) >= torch.tensor([24, 9, 17, 3])[:, None]
regimes = pytest.mark.parametrize("num_landmarks", [L, M], ids=["exact", "nystrom"])


def randomise(module):
    for p in module.parameters():  # biases start at zero, which would hide mistakes
        nn.init.uniform_(p, -0.7, 0.7)
    return module


class Net(nn.Module):
    def __init__(self, attention=None):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=True) if attention is None else attention
        self.head = nn.Linear(E, 2)

    def forward(self, x, padding=None):
        return self.head(self.attention(x, x, x, padding, need_weights=False)[0].square().mean(1))


def stock(seed=0):
    torch.manual_seed(seed)
    return randomise(Net())


def converted(model, num_landmarks=M):
    convert_(model, num_landmarks=num_landmarks)
    return model


def constructed(num_landmarks=M, state=None):
    model = Net(NystromMultiheadAttention(E, H, batch_first=True, num_landmarks=num_landmarks))
    model.load_state_dict(stock().state_dict() if state is None else state, strict=True)
    return model


def encoder():
    torch.manual_seed(0)
    return randomise(nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True), 2))


def inputs():
    return torch.randn(N, L, E, generator=torch.Generator().manual_seed(2))


def gradients(model, out):
    """Of a loss that no normalisation makes constant, by parameter name."""
    model.zero_grad()
    (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def effective(model):
    """The state_dict of a plain Net with the weights that ``model`` computes with."""
    a = model.attention
    weights = {"in_proj_weight": a.in_proj_weight, "in_proj_bias": a.in_proj_bias}
    weights |= {"out_proj.weight": a.out_proj.weight, "out_proj.bias": a.out_proj.bias}
    state = {f"attention.{name}": w.detach().clone() for name, w in weights.items()}
    return state | {f"head.{name}": p for name, p in model.head.state_dict().items()}
