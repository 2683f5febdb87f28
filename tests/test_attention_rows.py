"""attention_rows of the modules: rows of the weights that they return, in O(n)."""

from __future__ import annotations

import pytest
import torch
from compat_problems import keep_mask
from mil_models import TransMIL, package, vendored
from module_problems import E, L, M, N, S, f64, make, padding
from test_weights import allocated
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from nystrom_ext import NystromMultiheadAttention, convert_, nystrom_attention_weights, revert_
from nystrom_ext.compat.lucidrains import NystromAttention

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


# lucidrains' attention


SIZES = {"dim": 12, "dim_head": 5, "heads": 3, "num_landmarks": 8, "residual_conv_kernel": 5}


def class_token(model, bag):
    """The input of the second layer's attention, without its weights."""
    seen = []
    handle = model.layer2.attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(bag)
    handle.remove()
    return model.layer2.attn.attention_rows(seen[0], [0])


@pytest.mark.parametrize("source", ["package", "copy"])
@pytest.mark.parametrize("dtype", [torch.float32, f64], ids=str)
def test_the_class_token_of_transmil(source, dtype, monkeypatch):
    """82 tokens behind 14 zeros in the package's matrix; and nothing of its size is made."""
    torch.manual_seed(0)
    model = TransMIL((package() if source == "package" else vendored()).NystromAttention).to(dtype).eval()
    bag = torch.randn(1, 70, 12, dtype=dtype)
    expected = model(bag, return_attn=True)[1]
    assert expected.shape == (1, 4, 96, 96)
    convert_(model)
    monkeypatch.setattr("nystrom_ext.compat._lucidrains.weights", None)
    actual = class_token(model, bag)
    assert actual.shape == (1, 4, 1, 82)
    assert (actual[:, :, 0] - expected[:, :, 14, 14:]).abs().max() <= 1e-5 * expected.abs().max()
    revert_(model)
    assert not hasattr(model.layer2.attn, "attention_rows")


@pytest.mark.parametrize("padding", ["package", "ours"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [5, 8, 40, 43])
def test_rows_of_the_packages_matrix(n, masked, padding):
    torch.manual_seed(0)
    ours = NystromAttention(**SIZES, padding=padding).double()
    x, mask = 3 * torch.randn(2, n, 12, dtype=f64), keep_mask(n) if masked else None
    matrix = ours(x, mask, return_attn=True)[1]
    left = matrix.shape[-1] - n
    expected = matrix[..., left:, left:][:, :, [3, -1, 0]]
    assert_close(ours.attention_rows(x, [3, -1, 0], mask), expected, rtol=1e-9, atol=1e-12)
    rows = ours.attention_rows(x, torch.tensor([3, -1, 0]), mask=mask, average_attn_weights=True)
    assert_close(rows, expected.mean(1), rtol=1e-9, atol=1e-12)
    if padding == "package":
        theirs = package().NystromAttention(**SIZES).double()
        theirs.load_state_dict(ours.state_dict())
        theirs = theirs(x, mask=mask, return_attn=True)[1][..., left:, left:][:, :, [3, -1, 0]]
        assert_close(expected, theirs, rtol=1e-5, atol=1e-6)


def test_rows_of_other_options_precisions_and_masks():
    x = torch.randn(2, 43, 12, dtype=f64)
    module = package().NystromAttention(**SIZES).double()
    convert_(module, window=2, coefficient="per_head")  # this project's attention
    q, k, _ = (y.unflatten(-1, (3, 5)).transpose(1, 2) for y in module.to_qkv(x).chunk(3, -1))
    expected = nystrom_attention_weights(q, k, num_landmarks=8, window=2)
    assert_close(module.attention_rows(x, [7]), expected[:, :, [7]])
    module = NystromAttention(**SIZES).double()
    truth = module.attention_rows(x, [7])
    low = module.bfloat16().attention_rows(x.bfloat16(), [7])
    assert low.dtype == torch.float32 and (low - truth).abs().max() < 0.02
    with torch.autocast("cpu"):
        assert module.float().attention_rows(x.float(), [7]).dtype == torch.float32
    for rows in ([43], [-44]):
        with pytest.raises(ValueError, match="rows must be positions of queries"):
            module.attention_rows(x.float(), rows)
    turned = ("# pad so that", "mask = None if mask is None else ~mask\n        # pad so that")
    copied = vendored(turned).NystromAttention(**SIZES).double()
    convert_(copied)
    with pytest.raises(NotImplementedError, match="attention_rows takes no mask here, as NystromAttention does"):
        copied.attention_rows(x, [0], mask=keep_mask(43))


def test_a_row_of_a_whole_slide_takes_little_memory(tmp_path):
    """20,000 patches, 8 heads: the package's matrix has 12.9 GB, a factor of it 165 MB."""
    module, x = NystromAttention(64, 64, 8), torch.randn(1, 20001, 64)
    with torch.no_grad():
        projections = allocated(lambda: module.to_qkv(torch.cat([x, x[:, :223]], 1)), tmp_path)
        assert allocated(lambda: module.attention_rows(x, [0]), tmp_path) < projections + 100e6
