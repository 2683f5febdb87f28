"""NystromMultiheadAttention with copies, hooks, autocast and compilation."""

import copy
import io

import pytest
import torch
from module_problems import INF, E, L, M, N, f64, make, outcome, padding
from torch.testing import assert_close

from nystrom_ext import convert_, modules, revert_


def test_copies():
    m, x = make(conv_kernel_size=3), torch.randn(L, E, dtype=f64)
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(m), torch.load(buffer, weights_only=False)):
        assert other._forward_pre_hooks == m._forward_pre_hooks and len(m._forward_pre_hooks) == 1
        assert torch.equal(other(x, x, x)[0], m(x, x, x)[0])
        assert other.in_proj_weight is not m.in_proj_weight


@pytest.mark.parametrize("option", [{"window": 2}, {"pinned": 1}], ids=str)
def test_window_is_for_self_attention(option):
    m = make(batch_first=True, **option)
    x = torch.randn(N, L, E, dtype=f64)
    short = x[:, :M]
    assert m(x, short, short, need_weights=False)[0].shape == x.shape  # exact, whatever the options
    for key in (x.clone(), x[:, :-1]):
        with pytest.raises(ValueError, match="need self-attention.*that is not the query.*window=0, pinned=0"):
            m(x, key, key, need_weights=False)


def test_hook_survives_hooks_of_a_new_process(monkeypatch):
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", 0)  # as in the process that loads a pickle
    m = make()
    m.register_forward_pre_hook(lambda module, args: None).remove()
    assert modules.HOOK_KEY in m._forward_pre_hooks


def test_repr():
    text = repr(make(coefficient="global", conv_kernel_size=3))
    assert (
        "num_landmarks=6, pinv_iterations=6, coefficient='global', unsupported_mask='error', window=0, pinned=0" in text
    )
    assert "taps=3" in text


@pytest.mark.parametrize("num_landmarks", [64, M], ids=["exact", "nystrom"])
def test_weights_that_are_no_parameters(num_landmarks):
    m, x = make(num_landmarks), torch.randn(L, N, E, dtype=f64)
    expected = m(x, x, x, need_weights=False)[0]
    delta = torch.zeros_like(m.in_proj_weight, requires_grad=True)
    merged = m.in_proj_weight.detach() + delta
    del m.in_proj_weight
    m.in_proj_weight = merged
    out = m(x, x, x, need_weights=False)[0]
    assert torch.equal(out, expected)
    out.square().sum().backward()
    assert delta.grad.any()


@pytest.mark.parametrize("num_landmarks", [64, M], ids=["exact", "nystrom"])
def test_hooks_of_out_proj_run(num_landmarks):
    m, x, calls = make(num_landmarks), torch.randn(L, N, E, dtype=f64), []
    m.out_proj.register_forward_hook(lambda *args: calls.append(1))
    m(x, x, x, need_weights=False)
    assert calls


@pytest.mark.parametrize("num_landmarks", [64, M], ids=["exact", "nystrom"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast(num_landmarks, need_weights):
    m, x, kpm = make(num_landmarks, conv_kernel_size=3).float(), torch.randn(L, N, E), padding(L, 20, 13, 9)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = m(x, x, x, key_padding_mask=kpm, need_weights=need_weights)
    assert out.dtype == torch.bfloat16
    expected = m(x, x, x, key_padding_mask=kpm, need_weights=need_weights)[0]
    assert_close(out.float(), expected, atol=0.1, rtol=0.1)
    out.float().sum().backward()
    assert m.in_proj_weight.grad.dtype == torch.float32


@pytest.mark.parametrize("num_landmarks", [64, M], ids=["exact", "nystrom"])
@pytest.mark.parametrize("mask", [None, torch.bool, f64])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.filterwarnings("ignore:NystromMultiheadAttention. need_weights=True costs")
def test_compile(num_landmarks, mask, need_weights):
    m, x = make(num_landmarks, batch_first=True), torch.randn(N, L, E, dtype=f64)
    kpm = padding(L, 20, 13, 9) if mask else None
    kpm = torch.zeros(N, L, dtype=f64).masked_fill(kpm, -INF) if mask == f64 else kpm
    torch.compiler.reset()
    compiled = torch.compile(m, backend="eager", fullgraph=True)
    options = {"key_padding_mask": kpm, "need_weights": need_weights}
    for inputs in ((x, x, x), (x.clone(), x, x)):
        assert_close(outcome(compiled, inputs, **options), outcome(m, inputs, **options))


def test_compiled_views_of_one_tensor_are_refused():
    """Two equal views are self-attention; the compiler cannot tell, and padding would leak into the landmarks."""
    x, mask = torch.randn(L, N, E, dtype=f64), padding(L, 20, 13, 9)

    def of_views(attention, **options):
        query, key = x.transpose(0, 1), x.transpose(0, 1)
        return attention(query, key, key, need_weights=False, **options)[0]

    def of_a_view(attention, **options):
        y = x.transpose(0, 1).contiguous()
        return attention(y, y[:], y[:], need_weights=False, **options)[0]

    def of_one_tensor(attention, **options):
        y = x.transpose(0, 1)
        return attention(y, y, y, need_weights=False, **options)[0]

    m, exact = make(batch_first=True), make(num_landmarks=64, batch_first=True)
    for call in (of_views, of_a_view):
        compiled = torch.compile(call, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="one tensor object or share no memory, got two views of one tensor"):
            compiled(m, key_padding_mask=mask)
        assert_close(compiled(m), call(m))  # here it makes no difference, nor there
        assert_close(compiled(exact, key_padding_mask=mask), call(exact, key_padding_mask=mask))
    compiled = torch.compile(of_one_tensor, backend="eager", fullgraph=True)
    assert_close(compiled(m, key_padding_mask=mask), of_views(m, key_padding_mask=mask))


@pytest.mark.parametrize("form", ["module", "constructed", "converted"])
def test_scripting_is_refused_in_one_sentence(form):
    """The compiler's own error is "Unknown type annotation: 'int'"."""
    layer = torch.nn.TransformerEncoderLayer(E, 2, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    if form == "converted":
        convert_(model)
    if form == "constructed":
        model.layers[0].self_attn = make(batch_first=True)
    scripted = make() if form == "module" else model
    with pytest.raises(NotImplementedError, match="^torch.jit.script does not support NystromMulti.*converted$"):
        torch.jit.script(scripted)
    if form == "converted":
        revert_(model)
        torch.jit.script(model)
