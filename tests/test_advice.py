"""What is said about attention that conversion does not know."""

from torch import nn

from nystrom_ext import NystromMultiheadAttention
from nystrom_ext._advice import unknown_attention

IN_FORWARD = "call nystrom_ext.nystrom_attention(q, k, v) in its forward"


class Attention(nn.Module):
    """As people write it."""

    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


class BiasedAttention(nn.Module):
    def forward(self, x):
        return (x @ x.mT + self.rel_pos).softmax(-1) @ x


class AttentionBlock(nn.Module):
    """Around other attention; not the place to change."""

    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.ModuleList(inner)


class NystromAttention(nn.Module):
    pass


def advice(model, known=()):
    return unknown_attention(dict(model.named_modules()), known)


def test_each_class_once_with_its_first_name():
    model = nn.Sequential(AttentionBlock(Attention(), Attention()), nn.Linear(2, 2), BiasedAttention())
    first, *rows = advice(model).split("\n")
    assert first == "convert_ does not know these classes:" and len(rows) == 2
    assert rows[0].startswith(f"  0.inner.0 and 1 more: {__name__}.Attention: {IN_FORWARD}")
    assert rows[1].startswith(f"  2: {__name__}.BiasedAttention: may add position biases")
    assert advice(Attention()).split("\n")[1].startswith("  (the model itself): ")


def test_nothing_to_tell():
    known = nn.Sequential(Attention(), AttentionBlock(nn.MultiheadAttention(4, 2)))
    assert advice(known, ["0", "1.inner.0"]) == ""
    assert advice(AttentionBlock(Attention()), ["inner.0"]) == ""
    assert advice(NystromMultiheadAttention(4, 2)) == advice(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == ""


def test_nystrom_attention_of_others():
    assert "nystrom_ext.compat.attention(name, q, k, v, mask)" in advice(nn.Sequential(NystromAttention()))
