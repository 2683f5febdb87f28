"""The diagnosis against the definition, and that it leaves the model alone."""

import json
import math

import pytest
import torch
from test_convert import snapshot
from torch import nn

from nystrom_ext import NystromMultiheadAttention, convert_, diagnose, nystrom, reference
from nystrom_ext.diagnosis import SAMPLED_QUERIES

E, H, M = 16, 2, 6
LAYERS = [f"layers.{i}.self_attn" for i in range(3)]

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.1, batch_first=True, dtype=torch.float64)
    return nn.TransformerEncoder(layer, 3)


def heads(module, x):
    """(N, n, E) -> q, k, v (N, H, n, d) of an attention module."""
    projected = nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    return [p.unflatten(-1, (H, E // H)).transpose(1, 2) for p in projected]


def relative(x, exact):
    return ((x - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("options", [{}, {"window": 2, "pinned": 1}])
def test_of_one_module_is_the_definition(options):
    torch.manual_seed(1)
    module = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    x = 3 * torch.randn(3, SAMPLED_QUERIES, E, dtype=torch.float64)
    ignored = torch.arange(SAMPLED_QUERIES) >= torch.tensor([[SAMPLED_QUERIES], [40], [9]])
    batch = {"query": x, "key": x, "value": x, "key_padding_mask": ignored, "need_weights": False}
    with torch.no_grad():
        found = diagnose(module, batch, num_landmarks=M, **options)
        near, errors, outs = [], [], []
        for b in range(3):
            q, k, v = (t[b : b + 1, :, ~ignored[b]] for t in heads(module, x))
            weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            out = reference.nystrom_attention(q, k, v, num_landmarks=M, **options)
            errors += [relative(out[0, h], (weights @ v)[0, h]) for h in range(H)]
            rank = torch.arange(q.shape[2])
            close = (rank - rank[:, None]).abs() <= (options.get("window") or 16)
            near.append((weights * (close | (rank < options.get("pinned", 0)))).sum(-1).flatten())
            outs.append([module.out_proj(o[0].transpose(0, 1).flatten(1)) for o in (out, weights @ v)])
    (layer,) = found.layers
    assert layer.tokens == SAMPLED_QUERIES and layer.window == (options.get("window") or 16)
    torch.testing.assert_close(layer.median_error, torch.tensor(errors).median().item())
    torch.testing.assert_close(layer.worst_error, max(errors))
    torch.testing.assert_close(layer.near_mass, torch.cat(near).mean().item())
    # The module's output, with the bias alone at padded queries.
    bias = module.out_proj.bias.expand(int(ignored.sum()), E)
    approximate, exact = (torch.cat([*side, bias]) for side in zip(*outs, strict=True))
    torch.testing.assert_close(layer.output_change, relative(approximate, exact))
    assert found.cumulative_change == [layer.output_change] and found.order == [""]


def test_changes_of_the_output(encoder):
    """Alone and together, as conversion itself changes it."""
    x = 2 * torch.randn(2, 50, E, dtype=torch.float64)
    found = diagnose(encoder, x, num_landmarks=M, window=3)
    assert encoder.training
    encoder.eval()
    with torch.no_grad():
        exact = encoder(x)
        for layer in found.layers:
            with nystrom(encoder, num_landmarks=M, window=3, include=layer.name):
                torch.testing.assert_close(layer.output_change, relative(encoder(x), exact))
        for k in (1, 2, 3):
            with nystrom(encoder, num_landmarks=M, window=3, include=found.order[:k]):
                torch.testing.assert_close(found.cumulative_change[k - 1], relative(encoder(x), exact))
    assert sorted(found.order) == LAYERS
    alone = {layer.name: layer.output_change for layer in found.layers}
    assert [alone[name] for name in found.order] == sorted(alone.values())


def test_suggestion(encoder):
    x = 2 * torch.randn(2, 50, E, dtype=torch.float64)
    changes = diagnose(encoder, x, num_landmarks=M).cumulative_change
    found = diagnose(encoder, x, num_landmarks=M, tolerance=changes[1])
    assert found.suggested == found.order[:2]  # names without special characters and "include=[" in str(found)
    assert sorted(convert_(encoder, include=found.suggested).converted) == sorted(found.suggested)
    assert diagnose(encoder, x, num_landmarks=M, tolerance=0.0).suggested == []
    assert "fine-tune" in str(diagnose(encoder, x, num_landmarks=M, tolerance=0.0))


def test_leaves_the_model_alone(encoder):
    """Modes, classes, options and hooks, also after an error; the layers before keep what they had."""
    encoder.layers[1].eval()
    convert_(encoder, num_landmarks=9, include=LAYERS[2])
    before = snapshot(encoder)
    x = torch.randn(1, 30, E, dtype=torch.float64)
    found = diagnose(encoder, x, num_landmarks=M, options_for={"layers.0.*": None})
    assert [layer.name for layer in found.layers] == LAYERS[1:]
    with pytest.raises(ValueError, match="output_fn"):
        diagnose(encoder, x, output_fn=lambda output: "nothing")
    with pytest.raises(TypeError):
        diagnose(encoder, {"no_such": x})
    assert snapshot(encoder) == before


def test_short_input_is_exact(encoder):
    found = diagnose(encoder, (torch.randn(2, M, E, dtype=torch.float64),), num_landmarks=M)
    assert [(layer.tokens, layer.worst_error, layer.output_change) for layer in found.layers] == [(0, 0.0, 0.0)] * 3
    assert found.cumulative_change == [0.0] * 3 and "lower num_landmarks" in str(found)


def test_cross_attention_and_constructed_modules():
    module = NystromMultiheadAttention(E, H, batch_first=True, num_landmarks=64)
    x, y = torch.randn(1, 40, E), torch.randn(1, 70, E)
    (layer,) = diagnose(module, (x, y, y), num_landmarks=M).layers
    assert layer.near_mass is None and layer.worst_error > 0 and layer.tokens == 70
    assert module.num_landmarks == 64


def test_compiled_models(encoder):
    x = 2 * torch.randn(2, 50, E, dtype=torch.float64)
    expected = diagnose(encoder, x, num_landmarks=M)
    encoder.compile(backend="eager")
    assert diagnose(encoder, x, num_landmarks=M) == expected


def test_hugging_face_and_files(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=E, num_hidden_layers=2, num_attention_heads=H, intermediate_size=32
    )
    model = transformers.AutoModel.from_config(config)
    ids = torch.randint(99, (2, 40))
    mask = torch.arange(40) < torch.tensor([[40], [21]])
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    found = diagnose(model, batch, num_landmarks=M, window=2, output_fn=lambda output: output.pooler_output)
    assert [layer.name for layer in found.layers] == [f"encoder.layer.{i}.attention.self" for i in range(2)]
    assert all(0 < layer.median_error <= layer.worst_error and 0 < layer.near_mass < 1 for layer in found.layers)
    model.eval()
    with torch.no_grad():
        exact = model(**batch).pooler_output
        with nystrom(model, num_landmarks=M, window=2):
            torch.testing.assert_close(found.cumulative_change[-1], relative(model(**batch).pooler_output, exact))
    lines = str(found).splitlines()
    assert lines[0].startswith("layer") and lines[1].split()[0] == found.layers[0].name and "(±2)" in lines[1]
    assert json.loads(json.dumps(found.to_dict()))["suggested"] == found.suggested
    found.plot(tmp_path / "diagnosis.png")
    assert (tmp_path / "diagnosis.png").read_bytes().startswith(b"\x89PNG")


def test_samples_of_padding_have_no_error_and_what_is_no_number_shows(encoder):
    x = torch.randn(2, 40, E, dtype=torch.float64)
    one = diagnose(encoder, {"src": x[:1]}, num_landmarks=M)
    with torch.no_grad():
        padded = {"src": x, "src_key_padding_mask": torch.tensor([[False], [True]]).expand(2, 40)}
        both = diagnose(encoder, padded, num_landmarks=M)
        bad = diagnose(encoder, {"src": x.index_fill(0, torch.tensor(1), torch.nan)}, num_landmarks=M)
    assert [layer.median_error for layer in both.layers] == pytest.approx([layer.median_error for layer in one.layers])
    assert all(math.isnan(layer.worst_error) for layer in bad.layers)
