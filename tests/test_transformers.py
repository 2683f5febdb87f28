"""Hugging Face models with attn_implementation="nystrom": against "sdpa" up to m tokens, on their own terms beyond."""

import copy

import pytest
import torch
from torch import nn

T = pytest.importorskip("transformers")
from huggingface import IMAGE, LAYERS, MODELS, SWIN, T5, TEXT, TEXT_MODELS, M, build, hidden, inputs, modern_bert  # noqa: E402

from nystrom_ext import reference  # noqa: E402
from nystrom_ext.convert import convert_  # noqa: E402
from nystrom_ext.integrations import transformers as integration  # noqa: E402

integration.register(name="nystrom-8", num_landmarks=M)
integration.register(name="nystrom-8-exact", num_landmarks=M, unsupported_mask="exact")
integration.register(name="nystrom-8-window", num_landmarks=M, window=3, pinned=1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_up_to_m_tokens_models_compute_what_sdpa_computes(name, training, ran):
    outputs = []
    for implementation in ("sdpa", "nystrom"):
        model = build(name, implementation).train(training)
        torch.manual_seed(2)
        outputs.append(hidden(model, inputs(name, valid=25)))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-6, rtol=1e-5)
    assert (ran.sdpa, ran.nystrom) == (LAYERS, 0)  # "sdpa" itself does not pass through our function


@pytest.mark.parametrize("implementation", ["nystrom-8", "nystrom-8-window"])
@pytest.mark.parametrize("name", MODELS)
def test_beyond_m_tokens_every_layer_runs_the_operator(name, implementation, ran, monkeypatch):
    exact = hidden(build(name), inputs(name, valid=25))
    model = build(name, implementation)
    out = hidden(model, inputs(name, valid=25))
    assert (ran.sdpa, ran.nystrom) == (0, LAYERS)
    assert integration.check(model) and not torch.allclose(out, exact, atol=1e-4)
    monkeypatch.setattr(integration, "nystrom_attention", reference.nystrom_attention)
    torch.testing.assert_close(hidden(model, inputs(name, valid=25)), out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["nystrom-8", "nystrom-8-window"])
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_padding_never_matters(name, implementation):
    model = build(name, implementation)
    alone = {key: x[:1] for key, x in inputs(name, length=20).items()}
    expected = hidden(model, alone)[0]
    for length in (21, 32, 60):
        batch = inputs(name, length=length, valid=20)
        torch.testing.assert_close(hidden(model, batch)[0, :20], expected, atol=1e-6, rtol=1e-5)


def test_masks_stay_two_dimensional(ran, monkeypatch):
    monkeypatch.setattr(integration, "sdpa_mask", None)
    hidden(build("bert", "nystrom-8"), inputs("bert", valid=25))
    (_, key, _, ignored), options = ran.arguments
    assert ignored.shape == (2, 40) and ignored.dtype == torch.bool
    assert ignored[0].sum() == 15 and not ignored[1].any()
    assert options["query_padding_mask"] is ignored
    assert hidden(build("bert", "nystrom-8"), {"input_ids": torch.ones(2, 40, dtype=torch.long)}).shape[1] == 40
    assert ran.arguments[0][3] is None


def test_dropout_reaches_the_operator(ran):
    model = build("bert", "nystrom-8").train()
    hidden(model, inputs("bert"))
    assert ran.arguments[1]["dropout_p"] == model.config.attention_probs_dropout_prob > 0
    hidden(model.eval(), inputs("bert"))
    assert ran.arguments[1]["dropout_p"] == 0


@pytest.mark.parametrize("length", [M, 40])
def test_output_attentions_is_refused(length):
    """transformers drops what is None and would return an empty tuple, also with "sdpa"."""
    batch = inputs("bert", length=length)
    model = build("bert", "nystrom-8")
    with pytest.raises(NotImplementedError, match='output_attentions=True asks for weights.*"eager"'):
        model(**batch, output_attentions=True)
    config = T.BertConfig(**TEXT, output_attentions=True)
    with pytest.raises(NotImplementedError, match="output_attentions=True asks for weights"):
        T.BertModel._from_config(config, attn_implementation="nystrom-8")(**batch)
    convert_(model := build("bert"), num_landmarks=M)
    with pytest.raises(NotImplementedError, match="output_attentions=True asks for weights"):
        model(**batch, output_attentions=True)
    convert_(model, num_landmarks=M, need_weights="never")
    assert model(**batch, output_attentions=True).attentions == ()
    assert torch.equal(hidden(model, batch), hidden(build("bert", "nystrom-8"), batch))


@pytest.mark.parametrize("name", ["", "a/b", "a|b", "a:b", "nystrom-flash", "sdpa", "nystrom-sdpa", "eager"])
def test_names_that_transformers_would_misread(name):
    with pytest.raises(ValueError, match="must not be empty or contain"):
        integration.register(name)


def test_register():
    integration.register(name="nystrom-8", num_landmarks=M)  # once more is fine
    with pytest.raises(ValueError, match="already registered, for Options.num_landmarks=8"):
        integration.register(name="nystrom-8", num_landmarks=9)
    with pytest.raises(ValueError, match="num_landmarks must be an integer"):
        integration.register(name="nystrom-0", num_landmarks=0)
    with pytest.raises(TypeError, match="landmarks"):
        integration.register(name="nystrom-9", landmarks=9)
    T.AttentionInterface.register("somebody", lambda *args: None)
    with pytest.raises(ValueError, match="already registered, for something else"):
        integration.register("somebody")
    with pytest.raises(ValueError, match="nystrom-9"):
        build("bert", "nystrom-9")


# Whole models


@pytest.mark.parametrize("implementation", ["nystrom", "nystrom-8"])
def test_models_that_are_refused_when_called(implementation):
    """Biases only beyond m tokens, the other things at any length."""
    ids = torch.arange(3, 23)[None]
    image = torch.randn(1, 3, 24, 24)
    for model, batch, message in [
        (T.LlamaModel(T.LlamaConfig(**TEXT)), {"input_ids": ids}, "causal attention"),
        (T.GPT2Model(T.GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=50)), {"input_ids": ids}, "causal"),
        (T.BertModel(T.BertConfig(**TEXT, is_decoder=True)), {"input_ids": ids}, "causal"),
        (T.CLIPTextModel(T.CLIPTextConfig(**TEXT, eos_token_id=2)), {"input_ids": ids}, "causal"),
        (modern_bert(every=2), {"input_ids": ids}, "sliding_window="),
        (T.BeitModel(T.BeitConfig(**IMAGE, use_relative_position_bias=True)), {"pixel_values": image}, "mask of shape"),
        (T.SwinModel(T.SwinConfig(**SWIN)), {"pixel_values": image}, "mask of shape"),
        (T.T5EncoderModel(T.T5Config(**T5)), {"input_ids": ids}, "position_bias="),
    ]:
        expected = hidden(model.eval(), batch)
        model.set_attn_implementation(implementation)
        if implementation == "nystrom" and message in ("mask of shape", "position_bias="):
            torch.testing.assert_close(hidden(model, batch), expected, atol=1e-5, rtol=1e-4)
        else:
            with pytest.raises(NotImplementedError, match=message):
                model(**batch)
        with pytest.raises(ValueError, match="cannot honour its attn_implementation"):
            integration.check(model)


def test_models_whose_attention_never_asks():
    model = T.MPNetModel._from_config(T.MPNetConfig(**TEXT), attn_implementation="nystrom")  # accepted in silence
    with pytest.raises(ValueError, match="MPNetModel cannot honour.*\n.*mpnet: relative position bias"):
        integration.check(model)
    with pytest.raises(ValueError, match="no attention of BertModel runs Nyström attention"):
        integration.check(build("bert"))
    with pytest.raises(ValueError, match="no attention of Linear runs"):
        integration.check(nn.Linear(2, 2))
    assert integration.check(build("bert", "nystrom")) == [f"encoder.layer.{i}.attention.self" for i in range(LAYERS)]


def test_modernbert_with_exact_local_layers(ran):
    """Its even layers attend globally, its odd ones within a window."""
    model = build(lambda: modern_bert(every=2), "nystrom-8-exact")
    batch = inputs("modernbert", valid=25)
    out = hidden(model, batch)
    assert (ran.nystrom, ran.sdpa) == (1, 1)
    convert_(other := build(lambda: modern_bert(every=2)), num_landmarks=M)
    assert torch.equal(hidden(other, batch), out) and (ran.nystrom, ran.sdpa) == (2, 2)
    convert_(model, num_landmarks=64, include="layers.0.attn")
    expected = hidden(build(lambda: modern_bert(every=2)), batch)
    torch.testing.assert_close(hidden(model, batch), expected, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model = build("bert", "nystrom-8").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        hidden(model, inputs("bert", valid=25)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


def test_save_and_reload(tmp_path):
    model = build("bert", "nystrom-8")
    model.save_pretrained(tmp_path)
    assert "nystrom" not in (tmp_path / "config.json").read_text()
    assert T.AutoModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    again = T.AutoModel.from_pretrained(tmp_path, attn_implementation="nystrom-8").eval()
    assert torch.equal(hidden(again, inputs("bert")), hidden(model, inputs("bert")))


def test_trainer_takes_a_step(tmp_path, ran):
    pytest.importorskip("accelerate")
    model = T.BertForSequenceClassification(T.BertConfig(**TEXT))
    model.set_attn_implementation("nystrom-8")
    data = [{"input_ids": torch.arange(3, n), "labels": n % 2} for n in (20, 35, 50, 40)]
    before = copy.deepcopy(model.state_dict())
    arguments = T.TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True
    )

    def collate(samples):
        ids = nn.utils.rnn.pad_sequence([s["input_ids"] for s in samples], batch_first=True)
        return {"input_ids": ids, "attention_mask": ids > 0, "labels": torch.tensor([s["labels"] for s in samples])}

    trainer = T.Trainer(model, arguments, train_dataset=data, data_collator=collate)
    assert trainer.train().training_loss > 0
    assert ran.nystrom == LAYERS
    changed = [name for name, p in model.state_dict().items() if not torch.equal(p, before[name])]
    assert any("query.weight" in name for name in changed)


@pytest.mark.filterwarnings("error:.*lru_cache")
def test_compiles_into_one_graph():
    convert_(other := build("bert"), num_landmarks=M, include="*layer.1.*")
    for model in (build("bert", "nystrom-8"), other):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        batch = inputs("bert", valid=25)
        torch.testing.assert_close(hidden(compiled, batch), hidden(model, batch), atol=1e-6, rtol=1e-5)
