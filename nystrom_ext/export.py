"""The operator in programs for runtimes that lack this package: ONNX Runtime, OpenVINO, TensorRT, ExecuTorch.

`torch.export` leaves the operator in the graph as one node, which a runtime without this package does not know. The
table of :func:`decompositions` puts ATen operations in its place, :func:`onnx` goes on to a file. Batch and lengths may
be dynamic: each sample takes its regime when the program runs.

The cost: what one fused kernel does becomes some hundred operations whose intermediates are in memory. Time is
O((L + S) m), memory O((L + S) (m + window + pinned)); no (L, S) matrix appears unless ``num_landmarks`` or ``window``
is as large. AOTInductor needs none of this where the package's library can be loaded: it calls the kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import _composite
from ._schema import bind
from ._transforms import composite

Table = dict[Any, Callable[..., Any]]

_PACKED = (
    "nystrom_ext.export: nystrom_attention_varlen does not lower to ATen, as its sequences are of different lengths; "
    "pad them in the exported model and call nystrom_attention with key_padding_mask and query_padding_mask"
)
_MISSING = 'nystrom_ext.export.onnx needs the package {}, which is not installed; pip install "nystrom-ext[onnx]"'


def decompositions() -> Table:
    """For ``ExportedProgram.run_decompositions``: :func:`nystrom_ext.nystrom_attention` as ATen operations.

    Windows, pinned tokens, masks, convolution, grouped queries, both coefficients and the exact regimes of single
    samples are the operator's, at every batch and length that the program allows; float16 and bfloat16 are computed in
    float32, as there. The table has entries for this package's operators alone. With those of PyTorch, for core ATen::

        program.run_decompositions({**torch.export.default_decompositions(), **decompositions()})

    Raises (in ``run_decompositions``):
        ValueError: dropout; its random numbers would differ from the operator's. Export ``model.eval()``.
        NotImplementedError: packed sequences (``nystrom_attention_varlen``), and a backward pass in the graph.
    """
    ops = torch.ops.nystrom_ext
    return {
        ops.attention.default: _attention,
        ops._attention_forward.default: _forward,
        ops.attention_varlen.default: _refuse_packed,
        ops._attention_backward.default: _refuse_backward,
    }


def onnx(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    path: str | os.PathLike[str] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    strict: bool = False,
    **options: Any,
) -> Any:
    """Writes a model that uses Nyström attention as an ONNX file of standard operators.

    The file needs neither this package nor PyTorch to run. Needs the extra ``nystrom-ext[onnx]``.

    Args:
        model: in evaluation mode, as dropout is refused; or a program that `torch.export.export` made of one, for which
            ``args``, ``kwargs``, ``dynamic_shapes`` and ``strict`` are settled already.
        args, kwargs: example inputs. Dynamic sizes are better neither 0 nor 1 there, nor equal to others.
        path: where to write; None writes nothing. Weights beyond 2 GB go to a file beside it.
        dynamic_shapes, strict: as of `torch.export.export`.
        options: of `torch.onnx.export`: input_names, output_names, opset_version and so on.

    Returns:
        The `torch.onnx.ONNXProgram`.

    Raises:
        ImportError: a package of the extra is missing.
        ValueError, NotImplementedError: as :func:`decompositions`.
    """
    for name in ("onnx", "onnxscript"):
        if find_spec(name) is None:
            raise ImportError(_MISSING.format(name))
    if isinstance(model, torch.export.ExportedProgram):
        if args or kwargs or dynamic_shapes is not None:
            raise ValueError(
                "nystrom_ext.export.onnx: an ExportedProgram has its inputs and dynamic_shapes already; leave out "
                "args, kwargs and dynamic_shapes, or pass the module"
            )
        program = model
    else:
        program = torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=strict)
    return torch.onnx.export(program.run_decompositions(decompositions()), (), path, dynamo=True, **options)


def _attention(query: Tensor, key: Tensor, value: Tensor, *masks: Tensor | None, **options: Any) -> Tensor:
    _refuse_dropout(options.get("dropout_p", 0.0))
    return _composite.attention(query, key, value, *masks, **options)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    """What `torch.export` makes of the operator when it decomposes. What a backward pass would want is left empty: the
    only one that reads it, `_refuse_backward` refuses."""
    call = bind(torch.ops.nystrom_ext._attention_forward.default, args, {})
    if call["cu_seqlens_q"] is not None:
        _refuse_packed()
    _refuse_dropout(call["dropout_p"])
    return (composite(**call), *(call["query"].new_empty(0) for _ in range(6)))


def _refuse_dropout(p: float) -> None:
    if p > 0:
        raise ValueError(
            f"nystrom_ext.export: dropout_p must be 0, got {p}, as other runtimes draw other random numbers; export "
            "model.eval(), or pass dropout_p=0.0"
        )


def _refuse_packed(*args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError(_PACKED)


def _refuse_backward(*args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError(
        "nystrom_ext.export: the operator's backward pass does not lower to ATen; export the forward pass alone, "
        "or leave the operators as they are where this package can be loaded"
    )
