"""torchmil's own models: convert_ and back. Run by `make test-torchmil`, which installs torchmil beside the rest."""

from __future__ import annotations

import pytest
import torch
from compat_problems import f64, keep_mask
from torch.testing import assert_close

from nystrom_ext import convert_, revert_

torchmil = pytest.importorskip("torchmil", reason="torchmil is tested by `make test-torchmil`")
from torchmil.models import CAMIL, TransMIL  # noqa: E402
from torchmil.nn import NystromAttention, NystromTransformerEncoder  # noqa: E402


def random(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=f64)


@pytest.mark.parametrize("use_mlp", [False, True])
def test_transmil(use_mlp, fused_calls):
    torch.manual_seed(0)
    model = TransMIL((20,), att_dim=32, n_heads=4, use_mlp=use_mlp).double().eval()
    x = random(2, 70, 20)
    expected, weights = model(x, return_att=True)
    report = convert_(model)
    assert report.converted == ["layers.0.att_module", "layers.1.att_module"] and not report.skipped
    fused_calls.clear()  # of the trials
    assert_close(model(x), expected)
    assert [call["num_landmarks"] for call in fused_calls] == [16, 16]
    assert_close(model.predict(x), (expected, weights))
    revert_(model)
    assert type(model.layers[0].att_module) is NystromAttention


def test_camil():
    torch.manual_seed(0)
    sizes = {"nystrom_att_dim": 16, "pool_att_dim": 8, "n_heads": 2, "n_landmarks": 8}
    model = CAMIL((20,), **sizes).double().eval()
    x, adjacency = random(1, 30, 20), torch.eye(30, dtype=f64)[None]
    expected = model(x, adjacency)
    assert convert_(model).converted == ["nystrom_transformer_layer.att_module"]
    assert_close(model(x, adjacency), expected)


def test_encoder_with_masks():
    torch.manual_seed(0)
    model = NystromTransformerEncoder(16, att_dim=24, n_heads=3, n_layers=2, n_landmarks=8).double().eval()
    x, mask = random(2, 43, 16), keep_mask(43)
    expected = [model(x), model(x, mask=mask), model(x, mask=mask, return_att=True)]
    assert len(convert_(model).converted) == 2
    actual = [model(x), model(x, mask=mask), model(x, mask=mask, return_att=True)]
    assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learn_weights", [False, True])
def test_attention_and_gradients(learn_weights):
    torch.manual_seed(0)
    module = NystromAttention(24, 7, 32, 4, learn_weights, n_landmarks=8).double()
    x = random(2, 43, 24).requires_grad_()
    results = []
    for _ in range(2):
        out = module(x)
        results.append((out, torch.autograd.grad(out.square().sum(), [x, *module.parameters()])))
        convert_(module)
    assert_close(results[1], results[0])
    matrix = module(x, return_att=True)[1]  # torchmil has cut the padding off
    assert_close(module.attention_rows(x, [0, -1]), matrix[:, :, [0, -1]])
