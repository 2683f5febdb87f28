"""Bad input gets one clear error that names the rule, the value and the way out; never a crash, never a reshape."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from nystrom_ext import nystrom_attention, nystrom_attention_weights

X = torch.randn(2, 4, 30, 8)
MASK = torch.zeros(2, 30, dtype=torch.bool)

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "3-D query": ({"query": X[0]}, "query must have 4 dimensions (batch, heads, tokens, features), got shape [4,"),
    "dtypes": ({"key": X.double()}, "must have one dtype, got Float, Double, Float; cast them with .to()"),
    "integers": (dict.fromkeys(("query", "key", "value"), X.long()), "float64, float32, bfloat16 or float16, got Long"),
    "devices": ({"value": X.to("meta")}, "must be on one device, got cpu, cpu, meta"),
    "batch": ({"key": X[:1], "value": X[:1]}, "one batch size, got 2, 1, 1; expand()"),
    "heads of value": ({"value": X[:, :2]}, "same number of heads, got 4 and 2"),
    "heads of key": ({"key": X[:, :2], "value": X[:, :2]}, "got 4 and 2; pass enable_gqa=True"),
    "groups": (
        {"key": X[:, :3], "value": X[:, :3], "enable_gqa": True},
        "the heads of query must be a positive multiple of the heads of key, got 4 and 3",
    ),
    "no heads": ({"query": X[:, :0], "enable_gqa": True}, "positive multiple of the heads of key, got 0 and 4"),
    "tokens": ({"value": X[:, :, :20]}, "same number of tokens, got 30 and 20"),
    "head_dim": ({"key": X[..., :7]}, "same head_dim, got 8 and 7"),
    "no features": ({"value": X[..., :0]}, "head_dim must be at least 1, got 8 for query and 0 for value"),
    "float mask": ({"key_padding_mask": MASK.float()}, "key_padding_mask must be bool with True = ignore, got Float"),
    "mask shape": ({"key_padding_mask": MASK[:, :5]}, "shape (batch, key tokens) = (2, 30), got [2, 5]"),
    "mask dims": ({"query_padding_mask": MASK[0]}, "shape (batch, query tokens) = (2, 30), got [30]"),
    "mask device": ({"key_padding_mask": MASK.to("meta")}, "must be on the device of query, cpu, got meta"),
    "no landmarks": ({"num_landmarks": 0}, "num_landmarks must be at least 1, got 0; 64 is a good start"),
    "iterations": ({"pinv_iterations": -1}, "pinv_iterations must not be negative, got -1; the paper uses 6"),
    "scale": ({"scale": float("inf")}, "scale must be finite, got inf; None means"),
    "dropout": ({"dropout_p": 1.5}, "dropout_p must be between 0 and 1, got 1.5"),
    "dropout nan": ({"dropout_p": float("nan")}, "dropout_p must be between 0 and 1, got nan"),
    "coefficient": ({"coefficient": "batch"}, 'coefficient must be "per_head" or "global", got "batch"'),
    "taps": ({"conv_weight": torch.randn(3, 5)}, "shape (heads, taps) with heads = 4, got [3, 5]"),
    "taps dtype": ({"conv_weight": torch.randn(4, 5).half()}, "must have the dtype and device of query, Float on cpu"),
    "taps cross": (
        {"query": X[:, :, :20], "conv_weight": torch.randn(4, 5)},
        "conv_weight needs as many queries as keys, got L = 20 and S = 30",
    ),
    "window": ({"window": -1}, "window must not be negative, got -1; 0 is no window"),
    "pinned": ({"pinned": -2}, "pinned must not be negative, got -2; 0 pins no tokens"),
    "window cross": (
        {"query": X[:, :, :20], "window": 3},
        "window and pinned need self-attention, got window = 3 and pinned = 0 with L = 20 and S = 30; leave them out",
    ),
    "window, one mask": (
        {"key_padding_mask": MASK, "pinned": 1},
        "same mask for queries and keys, got only key_padding_mask; pass it as query_padding_mask too",
    ),
    "window, query mask": (
        {"query_padding_mask": MASK, "window": 1},
        "got only query_padding_mask; pass it as key_padd",
    ),
    "window, two masks": (
        {"key_padding_mask": MASK, "query_padding_mask": ~MASK, "window": 1},
        "same mask for queries and keys, got two that differ; pass one mask twice",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_message(name: str) -> None:
    changes, message = BAD[name]
    arguments: dict[str, Any] = {"query": X, "key": X.clone(), "value": X, **changes}
    with pytest.raises(ValueError, match="nystrom_attention: .*" + re.escape(message)):
        nystrom_attention(**arguments)


def test_internal_ops_check_too() -> None:
    """Nothing reached through torch.ops may read out of bounds."""
    forward, backward = torch.ops.nystrom_ext._attention_forward, torch.ops.nystrom_ext._attention_backward
    options, none = (8, 6, 0.3, 0.0, False, 0, 0), (*(None,) * 6, 0, 0)
    everything = (True,) * 4
    with pytest.raises(ValueError, match="same number of tokens"):
        forward(X, X, X[:, :, :5], *none, *options)
    with pytest.raises(ValueError, match="dropout_p > 0 needs rng_state"):
        forward(X, X, X, *none, 8, 6, 0.3, 0.5, False, 0, 0)
    out, *saved = forward(X, X, X, *none, *options)
    with pytest.raises(ValueError, match="the gradient must have the shape"):
        backward(out[..., :3], X, X, X, *none, *saved, *options, everything)
    with pytest.raises(ValueError, match="saved tensors are not those"):
        backward(out, X, X, X, *none, *(s[:, :, :2] for s in saved), *options, everything)
    wrong = [saved[0][..., :8], saved[0][:, :1], saved[0].double(), saved[0][0], saved[0].mT.contiguous().mT]
    for i, tensor in [(0, tensor) for tensor in wrong] + [(3, saved[3][:1]), (5, saved[0])]:
        with pytest.raises(ValueError, match="saved tensors are not those"):
            changed = [tensor if i == j else s for j, s in enumerate(saved)]
            backward(out, X, X, X, *none, *changed, *options, everything)
    with pytest.raises(ValueError, match="saved tensors are not those"):  # of a call without a window
        backward(out, X, X, X, *none, *saved, *options[:-2], 3, 1, everything)
    longer, row = torch.tensor([0, 10, X.shape[2] + 1]), X[:1]
    same = torch.tensor([0, 10, X.shape[2]])
    packed = (None, None, None, None, same, same, X.shape[2], X.shape[2])
    out, *saved = forward(row, row, row, *packed, *options)
    for wrong in ((longer, same), (same, longer)):
        arguments = (row, row, row, *packed[:4], *wrong, *packed[6:])
        with pytest.raises(ValueError, match="must rise from 0 to the number of tokens"):
            forward(*arguments, *options)
        with pytest.raises(ValueError, match="must rise from 0 to the number of tokens"):
            backward(out, *arguments, *saved, *options, everything)
    with pytest.raises(ValueError, match="need cu_seqlens_q and cu_seqlens_k, got only one"):
        forward(row, row, row, *packed[:5], None, *packed[6:], *options)
    with pytest.raises(ValueError, match="packed samples are one row"):
        forward(X, X, X, *packed, *options)


def test_two_equal_masks_are_one() -> None:
    options = {"num_landmarks": 8, "window": 3}
    out = nystrom_attention(X, X, X, MASK, query_padding_mask=MASK.clone(), **options)
    assert torch.equal(out, nystrom_attention(X, X, X, MASK, query_padding_mask=MASK, **options))


def test_weights_need_no_value_but_check_the_rest() -> None:
    with pytest.raises(ValueError, match="num_landmarks must be at least 1"):
        nystrom_attention_weights(X, X, num_landmarks=0)


def test_what_the_dispatcher_would_say_in_words_of_its_own() -> None:
    with pytest.raises(TypeError, match="scale must be a float, got a tensor, which would get no gradient"):
        nystrom_attention(X, X, X, scale=torch.nn.Parameter(torch.tensor(0.3)))  # type: ignore[arg-type]
    for name, value in (("num_landmarks", 16.0), ("num_landmarks", True), ("window", 1.5), ("pinned", "1")):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least"):
            nystrom_attention(X, X, X, **{name: value})  # type: ignore[arg-type]
    ragged = torch.nested.nested_tensor([torch.randn(2, n, 8) for n in (3, 4)], layout=torch.jagged)
    for x in (ragged, X.to_sparse()):
        with pytest.raises(ValueError, match="must be dense.*nystrom_attention_varlen takes sequences"):
            nystrom_attention(x, x, x)
