"""The attention function of the Hugging Face integration, as transformers calls it: honoured, or refused by name."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim, export

T = pytest.importorskip("transformers")
from huggingface import Attention, CrossAttention, EitherAttention, M  # noqa: E402
from transformers import BertConfig, BertModel  # noqa: E402

from nystrom_ext.integrations import transformers as integration  # noqa: E402

SELF, WINDOW = {"self_attention": True}, {"window": 3, "pinned": 1}
for name, options in {
    "nystrom-8": {},
    "nystrom-8-exact": {"unsupported_mask": "exact"},
    "nystrom-8-window": WINDOW,
    "nystrom-8-window-exact": WINDOW | {"unsupported_mask": "exact"},
    "nystrom-8-self-window": WINDOW | SELF,
    "nystrom-8-self": SELF,
    "nystrom-8-never": {"self_attention": False},
    "nystrom-64-self": SELF | {"num_landmarks": 64},
}.items():
    integration.register(name, **{"num_landmarks": M} | options)


def call(mask=None, module=None, name="nystrom-8", L=20, S=20, kv_heads=4, **kwargs):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, n, 8, generator=generator) for h, n in ((4, L), (kv_heads, S), (kv_heads, S)))
    out, weights = T.AttentionInterface()[name](module or Attention(), q, k, v, mask, scaling=0.3, **kwargs)
    assert weights is None and out.is_contiguous()
    return out


def padding(S=20):
    keep = torch.ones(2, S, dtype=torch.bool)
    keep[0, 13:] = False
    return keep


BIAS = torch.zeros(1, 4, 20, 20)


@pytest.mark.parametrize("length", [4, 20])
@pytest.mark.parametrize(
    "arguments, message, sdpa_can",
    [
        ({"is_causal": True}, "causal attention is not supported", True),
        ({"module": nn.Identity()}, "neither the call nor the module sets is_causal", True),
        ({"sliding_window": 5}, "sliding_window=5", True),
        ({"softcap": 2.0}, "softcap=2.0", False),
        ({"s_aux": torch.zeros(4)}, r"s_aux=tensor of shape \(4,\)", False),
        ({"attn_bias": BIAS}, r"attn_bias=tensor of shape \(1, 4, 20, 20\)", False),
        ({"mask": torch.ones(2, 20)}, r"a float32 mask of shape \(2, 20\)", True),
    ],
)
def test_refuses_what_landmarks_cannot_honour_at_any_length(arguments, message, sdpa_can, length):
    for name in ("nystrom-8", *([] if sdpa_can else ["nystrom-8-exact"])):
        with pytest.raises(NotImplementedError, match=message) as caught:
            call(name=name, L=length, S=length, **arguments)
        assert ('attn_implementation="sdpa"' in str(caught.value)) == sdpa_can
        assert ('unsupported_mask="exact"' in str(caught.value)) == sdpa_can


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"position_bias": BIAS}, r"position_bias=tensor of shape \(1, 4, 20, 20\)"),
        ({"mask": BIAS == 0}, r"a bool mask of shape \(1, 4, 20, 20\)"),
        ({"mask": BIAS}, r"a float32 mask of shape \(1, 4, 20, 20\)"),
    ],
)
def test_biases_are_exact_up_to_m_tokens_and_refused_beyond(arguments, message):
    with pytest.raises(NotImplementedError, match=f"{message}.* is not supported; use"):
        call(**arguments)
    assert torch.equal(call(name="nystrom", **arguments), call(name="sdpa", **arguments))
    short = {name: torch.randn(1, 4, M, 20) for name in arguments}
    assert torch.equal(call(L=M, **short), call(L=M, name="sdpa", **short))


@pytest.mark.parametrize(
    "arguments",
    [{"is_causal": True}, {"mask": BIAS}, {"position_bias": BIAS}, {"sliding_window": 5, "mask": BIAS == 0}],
)
def test_unsupported_mask_exact_is_sdpa(arguments):
    assert torch.equal(call(name="nystrom-8-exact", **arguments), call(name="sdpa", **arguments))


def test_options_that_say_nothing_are_accepted():
    nothing = {"sliding_window": None, "softcap": None, "s_aux": None, "position_bias": None}
    others = {"position_ids": torch.arange(20), "is_causal": False, "num_items_in_batch": 3}
    assert torch.equal(call(**nothing, **others), call())


def test_padding_masks_of_users():
    keep = padding()
    expected = call(keep)
    additive = torch.zeros(2, 20).masked_fill(~keep, torch.finfo(torch.float32).min)
    for mask in (keep, additive, additive.clamp(min=-1e4), additive.masked_fill(~keep, -torch.inf)):
        assert torch.equal(call(mask[:, None, None] if mask.dim() == 2 else mask), expected)
    shared = call(keep[:1, None, None])
    assert torch.equal(shared[0], expected[0]) and torch.equal(shared, call(keep[[0, 0]]))
    biased = additive.clamp(min=-1)[:, None, None]
    with pytest.raises(RuntimeError, match="must hold 0 .keep. or values <= -1e4"):
        call(biased)
    assert torch.equal(call(biased, name="nystrom"), call(biased, name="sdpa"))
    assert call(torch.zeros(2, 20, dtype=torch.bool)).count_nonzero() == 0


def test_grouped_queries_without_repetition(ran):
    grouped = call(padding(), kv_heads=2)
    (_, key, value, _), options = ran.arguments
    assert key.shape[1] == value.shape[1] == 2 and options["enable_gqa"] and options["scale"] == 0.3
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, 20, 8, generator=generator) for h in (4, 2, 2))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    repeated, _ = T.AttentionInterface()["nystrom-8"](Attention(), q, k, v, padding(), scaling=0.3)
    torch.testing.assert_close(grouped, repeated, atol=1e-6, rtol=1e-5)


def test_cross_attention_keeps_its_queries(ran):
    call(padding(), module=Attention())
    assert ran.arguments[1]["query_padding_mask"] is not None
    with pytest.warns(UserWarning, match="may attend to other tokens"):
        call(padding(), module=EitherAttention())  # as many queries as keys, but maybe not the same tokens
    assert ran.arguments[1]["query_padding_mask"] is None
    call(padding(), module=CrossAttention())
    assert ran.arguments[1]["query_padding_mask"] is None
    module = EitherAttention()
    module.is_decoder = False  # the encoder's use of a class that both use, as in Bart
    call(padding(), module=module)
    assert ran.arguments[1]["query_padding_mask"] is not None
    call(padding(), L=12)
    assert ran.arguments[1]["query_padding_mask"] is None
    module.is_decoder = True
    with pytest.raises(NotImplementedError, match="cross-attention of a causal decoder"):
        call(padding(), module=module)
    call(padding(), module=module, L=1)


def test_self_attention_is_said_where_the_class_does_not_show_it(ran):
    module = EitherAttention()
    for expected_warnings in (2, 1):  # of the module, if it has not warned yet, and of its copy, another module
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for twin in (module, pickle.loads(pickle.dumps(copy.deepcopy(module)))):
                call(padding(), module=twin)
                call(padding(), module=twin)
            call(padding(), module=CrossAttention())
        messages = [str(w.message) for w in caught]
        assert all("register(..., self_attention=True) or convert_(..., self_attention=True)" in m for m in messages)
        assert len(messages) == expected_warnings
    expected = call(padding(), module=Attention())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(call(padding(), module=module, name="nystrom-8-self"), expected)
        assert ran.arguments[1]["query_padding_mask"] is not None
        call(padding(), module=Attention(), name="nystrom-8-never")
        assert ran.arguments[1]["query_padding_mask"] is None
        call(module=EitherAttention())
        call(padding(), module=EitherAttention(), L=12)
    for name in ("nystrom-8-self", "nystrom-64-self"):  # at any length
        with pytest.raises(ValueError, match="self_attention=True needs as many queries as keys, got 12 and 20"):
            call(padding(), name=name, L=12)


def test_a_window_is_refused_where_it_may_be_cross_attention(ran):
    call(padding(), name="nystrom-8-window")
    assert (ran.arguments[1]["window"], ran.arguments[1]["pinned"]) == (3, 1)
    call(padding(), module=EitherAttention(), name="nystrom-8-self-window")
    assert (ran.arguments[1]["window"], ran.arguments[1]["pinned"]) == (3, 1)
    for arguments in ({"module": EitherAttention()}, {"module": CrossAttention()}, {"L": 12}):
        with pytest.raises(NotImplementedError, match="may be cross-attention with window=3 and pinned=1") as caught:
            call(padding(), name="nystrom-8-window", **arguments)
        doubtful = isinstance(arguments.get("module"), EitherAttention)
        assert ("register(..., self_attention=True)" in str(caught.value)) == doubtful
        exact = call(padding(), name="nystrom-8-window-exact", **arguments)
        assert torch.equal(exact, call(padding()[:, None, None], name="sdpa", **arguments))


def test_what_is_of_no_effect_is_refused_at_the_door():
    with pytest.raises(ValueError, match="unpad=True drops padded tokens before the projections of nn.MultiheadAttent"):
        integration.register("nystrom-unpadded", unpad=True)


@pytest.mark.parametrize("exported_at", [M - 2, 50])
def test_a_model_exported_at_any_length_runs_at_any_other(exported_at):
    integration.register("nystrom-exported", num_landmarks=M)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=99, **sizes)).eval()
    model.set_attn_implementation("nystrom-exported")
    dynamic = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=512)}
    ids = torch.randint(99, (2, exported_at))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, dynamic)).module()
    for batch, length in ((1, M - 1), (3, 70)):
        ids, keep = torch.randint(99, (batch, length)), torch.ones(batch, length, dtype=torch.long)
        keep[0, length // 2 :] = 0
        actual, expected = (run(input_ids=ids, attention_mask=keep)[0][keep.bool()] for run in (program, model))
        torch.testing.assert_close(actual, expected)


def test_a_mask_of_another_length_is_a_mistake():
    module, x = Attention(), torch.randn(2, 2, 20, 4)
    with pytest.raises(ValueError, match="the attention_mask has 19 entries for 20 tokens; pass one for each"):
        integration.attention(
            module, x, x, x, torch.ones(2, 1, 1, 19).bool(), default_options=integration.REGISTERED["nystrom-8"]
        )
