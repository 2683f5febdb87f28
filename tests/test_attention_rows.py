"""attention_rows of the modules: rows of the weights that they return, in O(n)."""

from __future__ import annotations

import pytest
import torch
from module_problems import E, L, M, N, S, f64, make, padding
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from nystrom_ext import NystromMultiheadAttention

ROWS = [3, -1, 0, 3]


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("mask", [None, "bool", "float", "queries"])
@pytest.mark.parametrize("num_landmarks", [M, 64])
@pytest.mark.parametrize(
    "variant",
    [
        {"batch_first": True},
        {"bias": False, "window": 2, "pinned": 1},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"conv_kernel_size": 3, "coefficient": "global"},
        {"dropout": 0.5, "self_attention": True},
    ],
    ids=str,
)
def test_rows_of_self_attention(variant, num_landmarks, mask, average):
    m = make(num_landmarks, **variant).eval()
    x, ignored = torch.randn(L, N, E, dtype=f64), padding(L, 20, 13, 9)
    x = x.transpose(0, 1) if m.batch_first else x
    masks = {}
    if mask == "queries":
        masks = {"query_padding_mask": ignored} | (
            {} if m.self_attention or not m.window else {"key_padding_mask": ignored}
        )
    elif mask:
        masks = {
            "key_padding_mask": ignored if mask == "bool" else torch.zeros(N, L, dtype=f64).masked_fill(ignored, -1e9)
        }
    weights = m(x, x, x, average_attn_weights=average, **masks)[1]
    m.train()  # no dropout
    rows = m.attention_rows(x, ROWS, average_attn_weights=average, **masks)
    assert_close(rows, weights[..., ROWS, :], rtol=1e-9, atol=1e-12)
    if mask == "queries":
        assert not rows[2, ..., 1, :].any()


@pytest.mark.parametrize("num_landmarks", [M, 64])
def test_rows_of_cross_attention(num_landmarks):
    m = make(num_landmarks, kdim=5, vdim=3, batch_first=True)
    query, key, value = (torch.randn(N, n, d, dtype=f64) for n, d in ((L, E), (S, 5), (S, 3)))
    masks = {"key_padding_mask": padding(S, 17, 3, 12), "query_padding_mask": padding(L, 9, 20, 4)}
    weights = m(query, key, value, average_attn_weights=False, **masks)[1]
    assert_close(
        m.attention_rows(query, torch.tensor(ROWS), key, average_attn_weights=False, **masks), weights[:, :, ROWS]
    )
    assert_close(m.attention_rows(query[0], ROWS, key[0]), m(query[0], key[0], value[0])[1][ROWS])


@pytest.mark.parametrize("num_landmarks", [M, 64])
def test_rows_are_differentiable(num_landmarks):
    m, x = make(num_landmarks, batch_first=True), torch.randn(N, L, E, dtype=f64, requires_grad=True)
    inputs, factor = [x, m.in_proj_weight], torch.randn(N, 2, L, dtype=f64)
    expected = torch.autograd.grad((m(x, x, x)[1][:, [0, 5]] * factor).sum(), inputs)
    assert_close(torch.autograd.grad((m.attention_rows(x, [0, 5]) * factor).sum(), inputs), expected)


@pytest.mark.parametrize("options", [{}, {"window": 4, "pinned": 1}], ids=str)
def test_rows_cost_no_projection_of_values_and_no_matrix(options):
    m = NystromMultiheadAttention(32, 2, batch_first=True, num_landmarks=8, **options)

    def operations(n):
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            m.attention_rows(torch.randn(1, n, 32), [0])
        return counted.get_total_flops()

    projections, attention = 2 * 32 * 32, 2 * (4 * 8 * 16 + 2 * 8 + 16)
    assert operations(2000) - operations(1000) <= 2 * 1000 * (projections + attention)


def test_rows_that_are_refused():
    m = make(batch_first=True)
    x = torch.randn(N, L, E, dtype=f64)
    for rows in ([L], [-L - 1]):
        for module in (m, make(64, batch_first=True)):
            with pytest.raises(ValueError, match="rows must be positions of queries"):
                module.attention_rows(x, rows)
    with pytest.raises(NotImplementedError, match="attention_rows takes no nested tensors, got one; pad it"):
        m.attention_rows(torch.nested.nested_tensor([x[0], x[1, :4]]), [0])
    with pytest.raises(AssertionError, match="expecting embedding dimension"):
        m.attention_rows(x[..., 1:], [0])
    with pytest.raises(RuntimeError, match="must hold 0 .keep. or values <= -1e4"):
        m.attention_rows(x, [0], key_padding_mask=torch.full((N, L), -1.0, dtype=f64))
    with pytest.raises(ValueError, match="window=2 and pinned=0 need self-attention"):
        make(batch_first=True, window=2).attention_rows(x, [0], x.clone())


def test_rows_compiled():
    torch.compiler.reset()
    m, x = make(batch_first=True), torch.randn(N, L, E, dtype=f64)
    compiled = torch.compile(m.attention_rows, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, [0, 2]), m.attention_rows(x, [0, 2]))
