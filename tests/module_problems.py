"""The module, the stock one with its parameters, and the module written out from its definition."""

import torch
from small_models import randomise
from torch import nn

from nystrom_ext import reference
from nystrom_ext.modules import NystromMultiheadAttention

E, H, N, L, S, M = 8, 2, 3, 20, 17, 6
INF = float("inf")
f64 = torch.float64


def make(num_landmarks=M, **kwargs):
    torch.manual_seed(0)
    return randomise(NystromMultiheadAttention(E, H, dtype=f64, num_landmarks=num_landmarks, **kwargs))


def make_pair(**kwargs):
    """nn.MultiheadAttention and ours in the exact regime, with the same parameters."""
    ours = make(num_landmarks=64, **kwargs)
    stock = nn.MultiheadAttention(E, H, dtype=f64, **kwargs)
    stock.load_state_dict(ours.state_dict(), strict=True)
    return stock, ours


def compose(m, query, key, value, kpm=None, query_mask=None, conv=None):
    """The module from its definition, batch first: projections, reference operator, output projection."""
    if m._qkv_same_embed_dim:
        weights = m.in_proj_weight.chunk(3)
    else:
        weights = m.q_proj_weight, m.k_proj_weight, m.v_proj_weight
    biases = [0.0] * 3 if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    n = len(q)
    if m.bias_k is not None:
        k, v = torch.cat([k, m.bias_k.expand(n, 1, E)], 1), torch.cat([v, m.bias_v.expand(n, 1, E)], 1)
    if m.add_zero_attn:
        k, v = torch.cat([k, k.new_zeros(n, 1, E)], 1), torch.cat([v, v.new_zeros(n, 1, E)], 1)
    if kpm is not None:
        kpm = torch.cat([kpm, kpm.new_zeros(n, k.shape[1] - kpm.shape[1])], 1)
    q, k, v = (x.view(n, -1, H, E // H).transpose(1, 2) for x in (q, k, v))
    out = reference.nystrom_attention(
        q,
        k,
        v,
        kpm,
        query_padding_mask=query_mask,
        num_landmarks=m.num_landmarks,
        pinv_iterations=m.pinv_iterations,
        coefficient=m.coefficient,
        conv_weight=conv,
        window=m.window,
        pinned=m.pinned,
    )
    return m.out_proj(out.transpose(1, 2).reshape(n, -1, E)), v


def outcome(module, inputs, **kwargs):
    """Outputs, and the gradients of inputs and parameters under a fixed random cotangent."""
    torch.manual_seed(1)
    given = {id(x): x.detach().requires_grad_() for x in inputs}
    inputs = [given[id(x)] for x in inputs]  # the same tensor stays the same tensor
    out, weights = module(*inputs, **kwargs)
    loss = (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum()
    if weights is not None:
        loss = loss + (weights * torch.linspace(2, -1, weights.numel(), dtype=out.dtype).view_as(weights)).sum()
    gradients = torch.autograd.grad(loss, [*given.values(), *module.parameters()], allow_unused=True)
    return out, weights, *gradients


def padding(n, *lengths):
    return torch.arange(n) >= torch.tensor(lengths)[:, None]


def gradients(m, out):
    loss = (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum()
    return torch.autograd.grad(loss, list(m.parameters()))
