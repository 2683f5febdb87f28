"""Weights of other implementations' attention blocks into `NystromMultiheadAttention`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..modules import NystromMultiheadAttention


@dataclass(frozen=True)
class Layout:
    """Names in a source: the modules of the projections (three or one packed), the output's, the convolution's weight.

    ``beside`` are keys of the same block that belong to no attention.
    """

    inputs: tuple[str, ...]
    output: str
    conv: str
    beside: tuple[str, ...] = ()


LAYOUTS = {
    "official": Layout(("W_q", "W_k", "W_v"), "ff", "attn.conv.weight"),
    "huggingface": Layout(
        ("self.query", "self.key", "self.value"),
        "output.dense",
        "self.conv.weight",
        beside=("output.LayerNorm.weight", "output.LayerNorm.bias"),
    ),
    "lucidrains": Layout(("to_qkv",), "to_out.0", "res_conv.weight"),
    "xformers": Layout(
        ("in_proj_container.q_proj", "in_proj_container.k_proj", "in_proj_container.v_proj"),
        "proj",
        "attention.skip_connection.weight",
    ),
    "flashnystrom": Layout(("q_proj", "k_proj", "v_proj"), "out_proj", "conv_weight"),
}
ALIASES = {"hf": "huggingface"}


def load_state_dict(
    module: NystromMultiheadAttention, state_dict: Mapping[str, Tensor], source: str, *, prefix: str = ""
) -> None:
    """Load the weights of another implementation's attention block. All or nothing; values take the module's dtype.

    ==============  =====================================================  ======================================
    source          the keys that follow ``prefix``                        prefix of a layer, for example
    ==============  =====================================================  ======================================
    official        W_q, W_k, W_v, ff, attn.conv                           model.transformer_0.mha.
    huggingface     self.query, self.key, self.value, self.conv,           nystromformer.encoder.layer.0.attention.
                    output.dense; output.LayerNorm is left out
    lucidrains      to_qkv (packed), to_out.0, res_conv                    that of its NystromAttention
    xformers        in_proj_container.{q,k,v}_proj, proj,                  that of its MultiHeadDispatch
                    attention.skip_connection
    flashnystrom    {q,k,v}_proj, out_proj, conv_weight                    that of its FlashNystromAttention
    ==============  =====================================================  ======================================

    A bias that the source lacks becomes zero where the module has one. The weight of the convolution (H, 1, taps, 1)
    becomes ``conv.weight`` (H, taps). Construct the module with the source's ``conv_kernel_size`` and, for its results,
    with :func:`~nystrom_ext.compat.preset`.

    Args:
        state_dict: of the whole model; keys without ``prefix`` are ignored.
        source: official, huggingface or hf, lucidrains, xformers, flashnystrom.

    Raises:
        ValueError: an unknown source.
        TypeError: another module than `NystromMultiheadAttention`.
        RuntimeError: missing or unexpected keys, wrong shapes, all of them in one message; the module is untouched.
    """
    source = ALIASES.get(source, source)
    if source not in LAYOUTS:
        raise ValueError(f"unknown source {source!r}; known are {', '.join([*LAYOUTS, *ALIASES])}")
    if not isinstance(module, NystromMultiheadAttention):
        raise TypeError(f"expected a NystromMultiheadAttention, got {type(module).__name__}; load it module by module")
    layout = LAYOUTS[source]
    given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    given = {key: value for key, value in given.items() if key not in layout.beside}
    problems = [f"{key} is no tensor but {type(x).__name__}" for key, x in given.items() if not isinstance(x, Tensor)]
    if not given:
        problems = [f"no key starts with {prefix!r}; the first keys are {list(state_dict)[:3]}"]
    problems = problems or _mismatches(given, _expected(module, layout), layout)
    weights = {} if problems else _assemble(module, given, layout)
    problems = problems or _gaps(weights, module)
    if problems:
        raise RuntimeError(
            f"Error in loading a {source} state_dict with prefix {prefix!r} into NystromMultiheadAttention, which is "
            "unchanged:\n\t" + "\n\t".join(problems)
        )
    module.load_state_dict(weights)


Shape = tuple[int, ...]


def _expected(module: NystromMultiheadAttention, layout: Layout) -> dict[str, list[Shape]]:
    """Every key of the source that the module has room for, with the shapes it may have; all but biases must exist."""
    E = module.embed_dim
    rows = 3 * E // len(layout.inputs)  # 3 E where the three projections are packed
    expected: dict[str, list[Shape]] = {}
    for name, width in zip(layout.inputs, (E, module.kdim, module.vdim), strict=False):
        expected[f"{name}.weight"] = [(rows, width)]
        expected[f"{name}.bias"] = [(rows,)]
    expected[f"{layout.output}.weight"] = [(E, E)]
    expected[f"{layout.output}.bias"] = [(E,)]
    if module.in_proj_bias is None:
        expected = {key: shapes for key, shapes in expected.items() if not key.endswith(".bias")}
    if module.conv is not None:
        H, taps = module.conv.weight.shape
        expected[layout.conv] = [(H, 1, taps, 1), (H, taps)]
    return expected


def _mismatches(given: dict[str, Tensor], expected: dict[str, list[Shape]], layout: Layout) -> list[str]:
    problems = [f"missing key {key}" for key in expected if key not in given and not key.endswith(".bias")]
    for key, value in given.items():
        shape = tuple(value.shape)
        if key not in expected:
            problems.append(f"unexpected key {key} of shape {shape}{_way_out(key, shape, layout)}")
        elif shape not in expected[key]:
            problems.append(f"size mismatch for {key}: expected {expected[key][0]}, got {shape}")
    return problems


def _way_out(key: str, shape: Shape, layout: Layout) -> str:
    if key == layout.conv:
        return f"; construct the module with conv_kernel_size={shape[2 if len(shape) == 4 else -1]}"
    if key in [f"{name}.bias" for name in (*layout.inputs, layout.output)]:
        return "; construct the module with bias=True"
    return ""


def _assemble(module: NystromMultiheadAttention, given: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The module's state_dict from the source's, whose shapes fit."""

    def bias(name: str) -> Tensor:
        weight = given[f"{name}.weight"]
        return given.get(f"{name}.bias", weight.new_zeros(len(weight)))

    new = {"out_proj.weight": given[f"{layout.output}.weight"]}
    if module._qkv_same_embed_dim:
        new["in_proj_weight"] = torch.cat([given[f"{name}.weight"] for name in layout.inputs])
    else:
        weights = [w for name in layout.inputs for w in given[f"{name}.weight"].chunk(3 // len(layout.inputs))]
        new |= zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), weights, strict=True)
    if module.in_proj_bias is not None:
        new["in_proj_bias"] = torch.cat([bias(name) for name in layout.inputs])
        new["out_proj.bias"] = bias(layout.output)
    if module.conv is not None:
        new["conv.weight"] = given[layout.conv].reshape(module.conv.weight.shape)
    return new


def _gaps(weights: dict[str, Tensor], module: NystromMultiheadAttention) -> list[str]:
    """Parameters of the module that the source cannot fill: added keys, other widths than a packed projection has."""
    own = module.state_dict()
    gaps = [key for key, value in own.items() if key not in weights or weights[key].shape != value.shape]
    return [f"{key} {tuple(own[key].shape)} of the module has no counterpart in this source" for key in gaps]
