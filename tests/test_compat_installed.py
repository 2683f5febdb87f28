"""The installed packages of others themselves."""

from __future__ import annotations

import itertools

import pytest
import torch
from compat_problems import SELF, TAPS, B, D, H, assert_same, f64, keep_mask, ours
from peers import installed
from torch.testing import assert_close

from nystrom_ext import compat

ANY_PEER = [(40, 8, None), (40, 8, "holes"), (40, 8, "tail"), (40, 40, "tail")]
LUCIDRAINS = [(43, 8, None), (43, 8, "holes"), (5, 8, None), (5, 8, "tail"), (40, 8, "empty sample")]
PEER_CASES = [*itertools.product(installed.PEERS, ANY_PEER), *(("lucidrains", case) for case in LUCIDRAINS)]


@pytest.mark.parametrize("name, case", PEER_CASES)
def test_installed_peer(name, case):
    pytest.importorskip({"lucidrains": "nystrom_attention", "huggingface": "transformers"}[name])
    n, m, mask = case
    torch.manual_seed(0)
    original = installed.PEERS[name](H * D, H, m, TAPS, n)
    x = 3 * torch.randn(B, n, H * D, dtype=f64)
    x.requires_grad_()
    mask = None if mask is None else keep_mask(n, mask)
    conv = original.conv_weight
    for fused in (True, False):
        actual = compat.attention(name, *original.project(x), mask, num_landmarks=m, conv_weight=conv, fused=fused)
        assert_same(actual, original.attend(x, mask), [x, conv])


def test_checkpoint_of_the_installed_lucidrains():
    peers = pytest.importorskip("nystrom_attention")
    torch.manual_seed(0)
    original = peers.NystromAttention(H * D, D, H, num_landmarks=8, residual_conv_kernel=TAPS).double()
    module = ours("lucidrains")
    compat.load_state_dict(module, original.state_dict(), "lucidrains")
    x = torch.randn(B, 40, H * D, dtype=f64)
    assert_close(module(x, x, x, need_weights=False)[0], original(x))


def test_checkpoint_of_the_installed_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": H * D, "num_attention_heads": H, "intermediate_size": 8, "num_hidden_layers": 2}
    config = transformers.NystromformerConfig(
        **sizes, vocab_size=9, num_landmarks=8, segment_means_seq_len=40, conv_kernel_size=TAPS
    )
    model = transformers.NystromformerModel(config).double().eval()
    module = ours("huggingface")
    compat.load_state_dict(module, model.state_dict(), "huggingface", prefix="encoder.layer.1.attention.")
    layer = model.encoder.layer[1].attention
    x = torch.randn(B, 40, H * D, dtype=f64)
    expected = layer.output.dense(layer.self(x)[0])
    assert_close(module(x, x, x, need_weights=False)[0], expected)


def test_parity_table(capsys):
    pytest.importorskip("rich")
    from peers import __main__ as table
    from peers import modules

    table.main()
    shown = capsys.readouterr().out
    assert all(name in shown for name in SELF)
    for case in table.CASES:
        *_, fused, pytorch = table.row(case)
        assert float(pytorch) < 1e-12 and (fused == "–" or float(fused) < 1e-12), case
    pytest.importorskip("nystrom_attention")
    assert "both ways" in shown
    for name in ("compat", "convert_"):
        for n, masked in ((256, False), (250, True), (10, False)):
            *_, out, gradients, first, loading = modules.row(name, n, masked)
            assert max(float(out), float(gradients), float(first)) < 1e-12 and loading == "both ways"
