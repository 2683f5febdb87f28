"""In other people's programs: one sequence that arrives as several tensors, and whose padding is whose."""

import copy
import warnings

import pytest
import torch
from module_problems import E, H, L, M, N, compose, f64, make, padding
from torch import nn
from torch.testing import assert_close

from nystrom_ext import convert_, diagnose, nystrom_attention, reference, revert_
from nystrom_ext.modules import NystromMultiheadAttention


@pytest.fixture(autouse=True)
def no_other_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def ignored():
    return padding(L, 20, 13, 9)


# How programs write self-attention without passing one tensor twice.
EXPRESSIONS = {
    "three norms": lambda norm, x, pos: (norm(x), norm(x), norm(x)),
    "positions added twice": lambda norm, x, pos: (x + pos, x + pos, x),
    "a copy": lambda norm, x, pos: (x, x.clone(), x),
    "a permuted copy": lambda norm, x, pos: (x, x.transpose(0, 1).contiguous().transpose(0, 1), x),
}


def written(expression, x):
    torch.manual_seed(5)
    return EXPRESSIONS[expression](nn.LayerNorm(E, dtype=f64), x, torch.randn(1, L, E, dtype=f64))


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("options", [{}, {"window": 3, "pinned": 1}, {"conv_kernel_size": 3}], ids=str)
def test_self_attention_in_several_tensors(expression, options, ignored):
    m = make(batch_first=True, self_attention=True, **options)
    x = torch.randn(N, L, E, dtype=f64)
    q, k, v = written(expression, x)
    out = m(q, k, v, key_padding_mask=ignored, need_weights=False)[0]
    assert_close(out, compose(m, q, k, v, ignored, ignored, None if m.conv is None else m.conv.weight)[0])
    other = torch.where(ignored[..., None], torch.randn_like(x), x)  # what the padding holds
    changed = m(*written(expression, other), key_padding_mask=ignored, need_weights=False)[0]
    assert torch.equal(changed, out)


def test_in_doubt_there_is_one_warning_per_module(ignored):
    x = torch.randn(N, L, E, dtype=f64)
    first, second = make(batch_first=True), make(batch_first=True)
    for module in (first, second):
        with pytest.warns(UserWarning, match="self_attention=True.*batch=") as caught:
            module(x, x.clone(), x, key_padding_mask=ignored, need_weights=False)
        assert [warning.filename for warning in caught] == [__file__]
        module(x, x.clone(), x, key_padding_mask=ignored, need_weights=False)
    with pytest.warns(UserWarning, match="self_attention"):  # another module, though it has the attributes of the first
        copy.deepcopy(first)(x, x.clone(), x, key_padding_mask=ignored, need_weights=False)


def test_there_is_no_doubt(ignored):
    """Where the padding is known, of no effect, or said to be none."""
    x, m = torch.randn(N, L, E, dtype=f64), make(batch_first=True)
    m(x, x, x, key_padding_mask=ignored, need_weights=False)
    m(x, x.clone(), x, need_weights=False)
    m(x, x[:, :-1], x[:, :-1], key_padding_mask=ignored[:, :-1], need_weights=False)
    m(x[:, :M], x[:, :M].clone(), x[:, :M], key_padding_mask=ignored[:, :M])  # exact
    m(x, x.clone(), x, key_padding_mask=ignored, query_padding_mask=ignored, need_weights=False)
    apart = make(batch_first=True, self_attention=False)
    out = apart(x, x.clone(), x, key_padding_mask=ignored, need_weights=False)[0]
    assert_close(out, compose(apart, x, x, x, ignored)[0])
    assert torch.equal(out, apart(x, x, x, key_padding_mask=ignored, need_weights=False)[0])


def test_options_that_do_not_fit():
    x = torch.randn(N, L, E, dtype=f64)
    with pytest.raises(ValueError, match=f"self_attention=True needs as many queries as keys, got {L} and {L - 1}"):
        make(batch_first=True, self_attention=True)(x, x[:, 1:], x[:, 1:])
    with pytest.raises(ValueError, match="need self-attention.*set self_attention=True if both are the same tokens"):
        make(batch_first=True, window=3)(x, x.clone(), x)
    with pytest.raises(ValueError, match="self_attention must be None, True or False, got 'yes'"):
        NystromMultiheadAttention(E, H, self_attention="yes")
    with pytest.raises(ValueError, match="query_padding_mask must have shape"):
        make(batch_first=True)(x, x, x, query_padding_mask=torch.zeros(N, L - 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="query_padding_mask must be bool"):
        make(batch_first=True)(x, x, x, query_padding_mask=torch.zeros(N, L))


@pytest.mark.parametrize("num_landmarks", [M, 64], ids=["nystrom", "exact"])
def test_padded_queries_of_cross_attention(num_landmarks):
    m = make(num_landmarks, batch_first=True)
    q, k = torch.randn(N, L, E, dtype=f64), torch.randn(N, 33, E, dtype=f64)
    queries, keys = padding(L, 20, 13, 9), padding(33, 33, 20, 12)
    out = m(q, k, k, key_padding_mask=keys, query_padding_mask=queries, need_weights=False)[0]
    assert_close(out, compose(m, q, k, k, keys, queries)[0])
    assert_close(out[1, 13:], m.out_proj.bias.expand(L - 13, E))
    q[queries] = torch.nan
    assert torch.equal(m(q, k, k, key_padding_mask=keys, query_padding_mask=queries, need_weights=False)[0], out)
    single = m(q[1], k[1], k[1], key_padding_mask=keys[1], query_padding_mask=queries[1], need_weights=False)[0]
    assert torch.equal(single, out[1])


def test_the_function(ignored):
    x = torch.randn(N, L, 3 * H * 4, dtype=f64)
    q, k, v = (part.unflatten(-1, (H, 4)).transpose(1, 2) for part in x.chunk(3, -1))  # qkv.chunk(3)
    both = nystrom_attention(q, k, v, ignored, query_padding_mask=ignored, num_landmarks=M)
    assert torch.equal(nystrom_attention(q, k, v, ignored, num_landmarks=M, self_attention=True), both)
    queries = {"query_padding_mask": ignored, "num_landmarks": M, "self_attention": True}
    assert torch.equal(nystrom_attention(q, k, v, **queries), both)
    assert_close(reference.nystrom_attention(q, k, v, ignored, num_landmarks=M, self_attention=True), both)
    alone = nystrom_attention(q, k, v, ignored, num_landmarks=M, self_attention=False)
    assert_close(alone, reference.nystrom_attention(q, k, v, ignored, num_landmarks=M))
    assert torch.equal(
        nystrom_attention(q, q, v, ignored, num_landmarks=M),
        nystrom_attention(q, q.clone(), v, ignored, num_landmarks=M, self_attention=True),
    )
    with pytest.warns(UserWarning, match="Pass self_attention=True"):
        from nystrom_ext import _warnings

        _warnings._given.clear()
        assert torch.equal(nystrom_attention(q, k, v, ignored, num_landmarks=M), alone)
    with pytest.raises(ValueError, match="self_attention=True needs as many queries as keys"):
        nystrom_attention(q, k[:, :, 1:], v[:, :, 1:], self_attention=True)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(E), nn.MultiheadAttention(E, H, batch_first=True)
        self.cross = nn.MultiheadAttention(E, H, batch_first=True)

    def forward(self, x, mask, memory):
        n = self.norm
        x = x + self.mixer(n(x), n(x), n(x), key_padding_mask=mask, need_weights=False)[0]
        return x + self.cross(x, memory, memory, need_weights=False)[0]


@pytest.fixture
def sample(ignored):
    torch.manual_seed(0)
    return {"x": torch.randn(N, L, E), "mask": ignored, "memory": torch.randn(N, L, E)}


def test_a_sample_tells_conversion(sample):
    model = Layer()
    hooks = len(model.mixer._forward_pre_hooks)
    report = convert_(model, num_landmarks=M, batch=sample)
    assert model.mixer.self_attention is True and model.cross.self_attention is None
    assert model.training and len(model.mixer._forward_pre_hooks) == hooks + 1  # ours
    assert "mixer  converted (self_attention=True)" in str(report)
    out = model(**sample)  # no warning
    assert torch.equal(model(**{**sample, "x": sample["x"] + sample["mask"][..., None]})[0, :20], out[0, :20])
    again = Layer()
    again.load_state_dict(model.state_dict())
    assert convert_(again, **report.to_dict()["options"]).options == report.options
    assert torch.equal(again(**sample), out)
    revert_(model)
    convert_(model, num_landmarks=M, window=3, include="mixer", batch=sample)
    model(**sample)


def test_diagnose_tells_too(sample):
    diagnosis = diagnose(Layer(), sample, num_landmarks=M, window=3, include="mixer")
    assert diagnosis.options["options_for"] == {"mixer": {"self_attention": True}}


def test_a_sample_on_which_the_model_fails_changes_nothing(sample):
    model = Layer()
    del sample["memory"]
    with pytest.raises(TypeError, match="memory"):
        convert_(model, batch=sample)
    assert type(model.mixer) is nn.MultiheadAttention and not model.mixer._forward_pre_hooks
