"""Packed batches of Hugging Face models: every sequence gets what it gets alone, or the call is refused."""

import pytest
import torch
from torch import nn

T = pytest.importorskip("transformers")
from huggingface import BIDIRECTIONAL, LAYERS, TEXT, Attention, EitherAttention, M, build, hidden, modern_bert  # noqa: E402

from nystrom_ext.convert import convert_  # noqa: E402
from nystrom_ext.integrations import transformers as integration  # noqa: E402

NAMES = {
    "nystrom": {},  # longer than every sequence, but not than all together
    "nystrom-8": {"num_landmarks": M},
    "nystrom-8-window": {"num_landmarks": M, "window": 3, "pinned": 1},
    "nystrom-8-exact": {"num_landmarks": M, "unsupported_mask": "exact"},
    "nystrom-128": {"num_landmarks": 128},  # longer than all together
}
for name, options in NAMES.items():
    integration.register(name, **options)

LENGTHS = (20, 9, 33, 1, 5)
MODELS = {
    "bert": lambda: T.BertModel(T.BertConfig(**TEXT)),
    "modernbert": modern_bert,
    "llama": lambda: BIDIRECTIONAL["llama"](is_causal=False),
    "qwen3": lambda: BIDIRECTIONAL["qwen3"](is_causal=False),
}


def sequences():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 50, (n,), generator=generator) for n in LENGTHS]


def flattened(**options):
    collate = T.DataCollatorWithFlattening(**options)
    batch = collate([{"input_ids": ids.tolist()} for ids in sequences()], return_tensors="pt")
    del batch["labels"]
    return batch


def alone(model):
    return torch.cat([hidden(model, {"input_ids": ids[None]}) for ids in sequences()], dim=1)


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("name", MODELS)
def test_a_flattened_batch_is_its_sequences(name, implementation):
    model = build(MODELS[name], implementation)
    expected = alone(model)
    for kwargs in (False, True):
        if name == "modernbert" and not kwargs:
            continue  # it keeps position_ids to itself, from FlashAttention too, and so needs the others
        out = hidden(model, flattened(return_flash_attn_kwargs=kwargs, return_seq_idx=kwargs))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_local_layers_that_stay_exact_do_not_mix_either():
    """ModernBERT's odd layers have sliding windows, which are exact call by call, or left alone by convert_."""
    batch = flattened(return_flash_attn_kwargs=True)
    one, other = build(lambda: modern_bert(every=2), "nystrom-8-exact"), build(lambda: modern_bert(every=2))
    convert_(other, num_landmarks=M)
    for model in (one, other):
        torch.testing.assert_close(hidden(model, batch), alone(model), atol=1e-5, rtol=1e-4)
    strict = build(lambda: modern_bert(every=2), "nystrom-8")
    with pytest.raises(NotImplementedError, match="sliding_window="):
        hidden(strict, batch)


def test_a_causal_model_left_alone_does_not_mix_either():
    model = build(BIDIRECTIONAL["llama"], "nystrom-8-exact")
    for options in ({}, {"return_flash_attn_kwargs": True}):
        torch.testing.assert_close(hidden(model, flattened(**options)), alone(model), atol=1e-5, rtol=1e-4)


def test_gradients_of_a_flattened_batch():
    gradients = []
    for checkpointing in (None, False, True):
        model = build("bert", "nystrom-8")
        if checkpointing:
            model.train().gradient_checkpointing_enable()
            for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
                dropout.p = 0.0
        out = alone(model) if checkpointing is None else hidden(model, flattened())
        (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for separate, *packed in zip(*gradients, strict=True):
        for gradient in packed:
            torch.testing.assert_close(gradient, separate, atol=1e-4, rtol=1e-3)


# The function itself


def call(module=None, mask=None, name="nystrom-8", batch=1, L=30, S=30, **kwargs):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(batch, h, n, 8, generator=generator) for h, n in ((4, L), (2, S), (2, S)))
    module = module or Attention()
    module.num_key_value_groups = 2
    return T.AttentionInterface()[name](module, q, k, v, mask, scaling=0.3, **kwargs)[0]


def offsets(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def four(*lengths):
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return dict(zip(names, (offsets(*lengths), offsets(*lengths), max(lengths), max(lengths)), strict=True))


def test_offsets_in_every_form():
    expected = call(**four(12, 18))
    assert not torch.allclose(expected, call(), atol=1e-3)
    given = four(12, 18)
    given |= {"max_length_q": torch.tensor(18), "max_length_k": torch.tensor(25)}
    torch.testing.assert_close(call(**given), expected, atol=1e-6, rtol=1e-5)
    positions = torch.cat([torch.arange(12), torch.arange(18)])
    for ids in (positions, positions[None], positions[None] + 2):
        torch.testing.assert_close(call(position_ids=ids), expected, atol=1e-6, rtol=1e-5)
    two = call(batch=2, **four(30, 12, 18))
    torch.testing.assert_close(two[:1], call(batch=2)[:1], atol=1e-6, rtol=1e-5)


def test_packed_cross_attention():
    arguments = four(12, 18) | {"cu_seq_lens_k": offsets(25, 15), "max_length_k": 25}
    out = call(module=EitherAttention(), L=30, S=40, **arguments)
    exact = call(module=EitherAttention(), L=30, S=40, name="nystrom", **arguments)
    assert out.shape == exact.shape == (1, 30, 4, 8) and not torch.allclose(out, exact, atol=1e-3)
    mask = torch.zeros(1, 1, 30, 40, dtype=torch.bool)
    mask[..., :12, :25] = mask[..., 12:, 25:] = True
    expected = call(module=EitherAttention(), L=30, S=40, name="sdpa", mask=mask)
    torch.testing.assert_close(exact, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(NotImplementedError, match="may be cross-attention with window=3"):
        call(module=EitherAttention(), name="nystrom-8-window", **four(12, 18))
    with pytest.raises(RuntimeError, match="must be equal in self-attention"):
        call(**(four(12, 18) | {"cu_seq_lens_k": offsets(13, 17)}))


def test_a_mask_means_a_padded_batch():
    keep = torch.ones(2, 30, dtype=torch.bool)
    keep[0, 21:] = False
    positions = torch.arange(30).expand(2, -1)
    assert torch.equal(call(batch=2, mask=keep, **four(21, 30)), call(batch=2, mask=keep))
    assert torch.equal(call(batch=2, mask=keep, position_ids=positions % 7), call(batch=2, mask=keep))
    left = torch.arange(30)[None] >= 9  # as in generation
    ids = (left.cumsum(-1) - 1).masked_fill(~left, 1)
    assert torch.equal(call(mask=left, position_ids=ids), call(mask=left))
    assert torch.equal(call(mask=left, **four(21)), call(mask=left))


def test_a_mask_that_masks_nothing_does_not_hide_the_packing():
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    for mask in (torch.ones(1, 30, dtype=torch.bool), torch.zeros(1, 1, 1, 30)):
        for packing in ({"position_ids": positions}, four(12, 18)):
            assert torch.equal(call(mask=mask, **packing), call(**packing))
            mask_with_padding = mask.clone()
            mask_with_padding[..., -3:] = False if mask.dtype == torch.bool else -1e9
            with pytest.raises(NotImplementedError, match="packed sequences and a mask with padding"):
                call(mask=mask_with_padding, **packing)


@pytest.mark.parametrize("name", ["nystrom-8", "nystrom-128", "nystrom-8-exact"])
@pytest.mark.parametrize("left_out", four(1))
def test_incomplete_offsets_are_refused_by_name(left_out, name):
    arguments = {key: x for key, x in four(12, 18).items() if key != left_out}
    with pytest.raises(NotImplementedError, match=f"without {left_out}; pass all four or none"):
        call(name=name, **arguments)


def test_positions_that_say_something_else():
    for same in (torch.arange(30) * 3, torch.full((30,), 4), torch.zeros(3, 1, 30)):
        assert torch.equal(call(position_ids=same), call())
    assert call(position_ids=torch.tensor([[7]]), L=1).shape[1] == 1
    for odd in (torch.arange(30) // 2, torch.arange(30, 0, -1), torch.cat([torch.arange(5, 12), torch.arange(23)])):
        with pytest.raises(NotImplementedError, match="neither rise throughout nor restart at their first value"):
            call(position_ids=odd)
        assert torch.equal(call(position_ids=odd, name="nystrom-8-exact"), call(name="sdpa"))
    with pytest.raises(RuntimeError, match="must rise from token to token in a batch of several rows"):
        call(batch=2, position_ids=torch.arange(30) % 7)
    causal = {"batch": 2, "is_causal": True, "name": "nystrom-8-exact"}  # with no mask, which would have heeded them
    with pytest.raises(RuntimeError, match="must rise from token to token"):
        call(position_ids=torch.arange(30) % 7, **causal)
    left_padded = torch.cat([torch.ones(9), torch.arange(21)])
    assert torch.equal(call(position_ids=left_padded, **causal), call(**causal | {"name": "sdpa"}))


def test_compiled_models_do_not_mix():
    torch.compiler.reset()
    model = build(MODELS["llama"], "nystrom-8")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        rising = {"input_ids": flattened()["input_ids"][:, :40]}
        torch.testing.assert_close(hidden(compiled, rising), hidden(model, rising), atol=1e-5, rtol=1e-4)
        batch = flattened(return_flash_attn_kwargs=True)
        torch.testing.assert_close(hidden(compiled, batch), alone(model), atol=1e-5, rtol=1e-4)
        with pytest.raises(RuntimeError, match="position_ids must rise"):
            hidden(compiled, flattened())


# Arguments that nobody knows


@pytest.mark.parametrize("name", ["nystrom-8", "nystrom-128", "nystrom-8-exact"])
@pytest.mark.parametrize("argument", [torch.zeros(1, 1, 30, 30), torch.tensor(0), True, "yes", 3, [1]])
def test_unknown_arguments_are_refused_by_name(argument, name):
    with pytest.raises(NotImplementedError, match="block_table=.* is not supported; use .*eager.* or leave it out"):
        call(name=name, block_table=argument)


def test_sequence_numbers_alone_are_refused():
    numbers = torch.arange(2).repeat_interleave(15)[None]
    with pytest.raises(NotImplementedError, match="seq_idx="):
        call(seq_idx=numbers)
    assert torch.equal(call(seq_idx=numbers, **four(15, 15)), call(**four(15, 15)))


@pytest.mark.parametrize("argument", [None, False, 0, "", (), []])
def test_arguments_that_say_nothing_are_accepted(argument):
    assert torch.equal(call(block_table=argument, softcap=argument), call())


def test_what_models_pass_along_is_accepted():
    harmless = {
        "position_ids": torch.arange(30)[None],
        "num_items_in_batch": torch.tensor(3),
        "output_hidden_states": True,
        "use_cache": True,
        "return_dict": True,
        "cache_position": torch.arange(30),
        "position_embeddings": (torch.ones(1, 30, 8), torch.ones(1, 30, 8)),
        "token_type_ids": torch.zeros(1, 30),
        "deterministic": True,
    }
    assert torch.equal(call(**harmless), call())
    model = T.BertForSequenceClassification(T.BertConfig(**TEXT))
    model.set_attn_implementation("nystrom-8")
    ids, labels = torch.arange(3, 43)[None], torch.tensor([1])
    assert model(ids, labels=labels, num_items_in_batch=torch.tensor(1), output_hidden_states=True).loss > 0
    assert len(model(ids, output_hidden_states=True, return_dict=True).hidden_states) == LAYERS + 1


def test_the_trainer_on_flattened_batches(tmp_path):
    torch.manual_seed(0)
    config = T.BertConfig(**TEXT, num_labels=3, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    model = T.BertForTokenClassification(config)
    model.set_attn_implementation("nystrom-8")
    samples = [{"input_ids": ids.tolist(), "labels": (ids % 3).tolist()} for ids in sequences()]
    logits = [model(input_ids=ids[None]).logits[0, 1:] for ids in sequences()]  # the collator ignores first labels
    labels = torch.cat([ids[1:] % 3 for ids in sequences()])
    expected = nn.functional.cross_entropy(torch.cat(logits), labels)
    arguments = T.TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=len(samples), report_to=[], save_strategy="no", use_cpu=True
    )
    collate = T.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    trainer = T.Trainer(model, arguments, train_dataset=samples, data_collator=collate)
    assert abs(trainer.train().training_loss - expected.item()) < 1e-5
