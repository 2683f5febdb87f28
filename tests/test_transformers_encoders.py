"""Which attention of Hugging Face models is an encoder's: by its config, its model's mask, and what its code adds."""

import pytest
import torch

T = pytest.importorskip("transformers")
from huggingface import BIDIRECTIONAL, IMAGE, LAYERS, SIZES, TEXT, WAV2VEC2, M, build, hidden, inputs  # noqa: E402
from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TSpeechEncoder  # noqa: E402

from nystrom_ext import reference  # noqa: E402
from nystrom_ext.convert import convert_, nystrom, revert_  # noqa: E402
from nystrom_ext.integrations import transformers as integration  # noqa: E402

integration.register("nystrom-8", num_landmarks=M)
integration.register("nystrom-8-exact", num_landmarks=M, unsupported_mask="exact")

SPEECH = SIZES | WAV2VEC2 | {"apply_spec_augment": False}
FEATURES = SIZES | {"feature_projection_input_dim": 16}
SEAMLESS = {
    **{"hidden_size": 32, "speech_encoder_layers": LAYERS, "speech_encoder_attention_heads": 2},
    **{"speech_encoder_intermediate_size": 32, "feature_projection_input_dim": 16, "vocab_size": 50},
}
LAYOUT = TEXT | {"coordinate_size": 5, "shape_size": 6, "visual_embed": False}
NO_BIAS = {"has_relative_attention_bias": False, "has_spatial_attention_bias": False}
PARAKEET = SIZES | {"subsampling_conv_channels": 8, "num_mel_bins": 16}


def waves():
    return {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(1))}


def features():
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(1))
    return {"input_features": x, "attention_mask": torch.arange(40) < torch.tensor([[25], [40]])}


def runs_nystrom(model, name, batch, ran, monkeypatch):
    """``check`` and ``convert_`` agree, every layer calls the operator, and the result is the reference's."""
    model.set_attn_implementation("nystrom-8")
    assert len(integration.check(model)) == LAYERS
    out = hidden(model, batch)
    assert (ran.nystrom, ran.sdpa) == (LAYERS, 0)
    model.set_attn_implementation("eager")
    exact = hidden(model, batch)
    with nystrom(model, num_landmarks=M) as report:
        assert len(report.converted) == LAYERS and not report.skipped
        assert torch.equal(hidden(model, batch), out)
        monkeypatch.setattr(integration, "nystrom_attention", reference.nystrom_attention)
        torch.testing.assert_close(hidden(model, batch), out, atol=1e-4, rtol=1e-3)
    with nystrom(model, num_landmarks=64):
        torch.testing.assert_close(hidden(model, batch), exact, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(out, exact, atol=1e-5, rtol=1e-5)


# Decoders that are used as encoders


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_language_models_whose_config_says_that_they_are_not_causal(name, padded, ran, monkeypatch):
    batch = inputs("bert", valid=25) if padded else {"input_ids": inputs("bert")["input_ids"]}
    model = build(lambda: BIDIRECTIONAL[name](is_causal=False), "eager")
    runs_nystrom(model, name, batch, ran, monkeypatch)


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_language_models_that_are_called_as_encoders(name):
    """No conversion can know; the reason says how to let it know."""
    model, batch = build(BIDIRECTIONAL[name], "nystrom-8"), inputs("bert", valid=25)
    for advised in (integration.check, convert_):
        with pytest.raises(ValueError, match="in a causal decoder; if it is always called with is_causal=False.*confi"):
            advised(model)
    out = hidden(model, batch | {"is_causal": False})
    with pytest.raises(NotImplementedError, match="causal attention"):
        hidden(model, batch)
    model.config.is_causal = False
    assert torch.equal(hidden(model, batch), out) and len(integration.check(model)) == LAYERS
    convert_(model, num_landmarks=M)
    assert torch.equal(hidden(model, batch), out)
    with pytest.raises(NotImplementedError, match="causal attention"):
        hidden(model, batch | {"is_causal": True})


# Encoders whose attention does not say that it is not causal


SILENT = {
    "layoutlm": lambda: T.LayoutLMModel(T.LayoutLMConfig(**TEXT)),
    "markuplm": lambda: T.MarkupLMModel(T.MarkupLMConfig(**TEXT)),
    "splinter": lambda: T.SplinterModel(T.SplinterConfig(**TEXT, question_token_id=3)),
    "clap": lambda: T.ClapTextModel(T.ClapTextConfig(**TEXT)),
    "align": lambda: T.AlignTextModel(T.AlignTextConfig(**TEXT)),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", SILENT)
def test_encoders_are_known_by_the_mask_of_their_model(name, padded, ran, monkeypatch):
    batch = inputs("bert", valid=25) if padded else {"input_ids": inputs("bert")["input_ids"]}
    runs_nystrom(build(SILENT[name], "eager"), name, batch, ran, monkeypatch)


def test_a_silent_attention_below_another_mask_stays_undecided():
    config = T.DogeConfig(**TEXT, num_key_value_heads=1)
    report = convert_(T.DogeModel(config), strict=False)  # its masks are causal
    assert not report.converted and set(report.skipped.values()) == {"does not say whether it is causal"}


# Attention that passes a bias in every call


BIASED = {
    "wav2vec2-conformer": (lambda **o: T.Wav2Vec2ConformerModel(T.Wav2Vec2ConformerConfig(**SPEECH, **o)), waves),
    "wav2vec2-bert": (lambda **o: T.Wav2Vec2BertModel(T.Wav2Vec2BertConfig(**FEATURES, **o)), features),
    "seamless_m4t": (lambda **o: SeamlessM4TSpeechEncoder(T.SeamlessM4TConfig(**SEAMLESS, **o)), features),
    "parakeet": (lambda: T.ParakeetEncoder(T.ParakeetEncoderConfig(**PARAKEET)), None),
    "layoutlmv3": (lambda **o: T.LayoutLMv3Model(T.LayoutLMv3Config(**LAYOUT, **o)), None),
}


@pytest.mark.parametrize("name", BIASED)
def test_attention_with_a_bias_is_skipped_with_the_reason(name):
    make, batch = BIASED[name]
    model = make().eval()
    attentions = [n for n, _ in model.named_modules() if n.endswith(("layers.0.self_attn", "attention.self"))]
    reasons = convert_(model, num_landmarks=M, strict=False).skipped
    biased = [n for n in attentions if "adapter" not in n]
    assert biased and all("relative position bias (" in reasons[n] for n in biased)
    revert_(model)
    model.set_attn_implementation("nystrom-8")
    with pytest.raises(ValueError, match="(?s)cannot honour its attn_implementation.*relative position bias"):
        integration.check(model)
    if batch is None:
        return
    model.set_attn_implementation("eager")
    expected = hidden(model, batch())
    convert_(model, num_landmarks=M, strict=False)  # only the adapter of SeamlessM4T, with few tokens
    torch.testing.assert_close(hidden(model, batch()), expected, atol=1e-5, rtol=1e-4)
    for exact in ("nystrom", "nystrom-8-exact"):  # up to m tokens, or call by call
        model.set_attn_implementation(exact)
        torch.testing.assert_close(hidden(model, batch()), expected, atol=1e-5, rtol=1e-4)
    model.set_attn_implementation("nystrom-8")
    with pytest.raises(NotImplementedError, match="position_bias=tensor of shape .* is not supported"):
        hidden(model, batch())


@pytest.mark.parametrize("name", ["wav2vec2-conformer", "wav2vec2-bert", "layoutlmv3"])
def test_the_same_attention_without_the_bias_is_converted(name, ran):
    make, batch = BIASED[name]
    if name == "layoutlmv3":
        model, batch = make(**NO_BIAS), inputs("bert", valid=25) | {"bbox": torch.zeros(2, 40, 4, dtype=torch.long)}
    else:
        model, batch = make(position_embeddings_type="rotary"), batch()
    assert len(convert_(model.eval(), num_landmarks=M).converted) == LAYERS
    assert hidden(model, batch).isfinite().all() and (ran.nystrom, ran.sdpa) == (LAYERS, 0)


# Parts of a model without converted modules


def clip(implementation):
    torch.manual_seed(0)
    text, vision = TEXT | {"eos_token_id": 2}, IMAGE
    model = T.CLIPModel(T.CLIPConfig(text_config=text, vision_config=vision)).eval()
    model.set_attn_implementation(implementation)
    return model, inputs("bert") | inputs("clip")


def implementations(model):
    return [str(c._attn_implementation) for c in (model.config, model.config.text_config, model.config.vision_config)]


def test_the_advice_to_convert_does_not_loop():
    model, batch = clip("nystrom-8")
    for refused in (lambda: integration.check(model), lambda: model(**batch)):
        with pytest.raises((ValueError, NotImplementedError), match=r"nystrom_ext.convert_\(model\)"):
            refused()
    report = convert_(model, num_landmarks=M)
    assert len(integration.check(model)) == len(report.converted) == LAYERS
    stock, _ = clip("sdpa")
    out, expected = model(**batch), stock(**batch)
    torch.testing.assert_close(out.text_embeds, expected.text_embeds, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out.image_embeds, expected.image_embeds, atol=1e-4)
    outer = implementations(model)
    with nystrom(model, num_landmarks=4):
        model(**batch)
    assert implementations(model) == outer and torch.equal(model(**batch).logits_per_image, out.logits_per_image)
    revert_(model)
    assert implementations(model) == ["nystrom-8"] * 3
    with nystrom(model, num_landmarks=M):
        model(**batch)
    assert implementations(model) == ["nystrom-8"] * 3


def test_other_names_of_parts_are_left_alone():
    model, _ = clip("sdpa")
    model.config.text_config._attn_implementation = "eager"
    convert_(model, num_landmarks=M)
    assert implementations(model) == ["sdpa", "eager", integration.CONVERTED]
