"""Attention that is causal only by the mask that the module around it passes, judging by that module's code.

open_clip's text towers keep the mask in a buffer, PyTorch's language-model example builds it at each call.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

CORNER = 64  # so much of a mask is looked at
_MAKERS = ("subsequent_mask", "causal_mask", "future_mask")  # parts of names of functions that make such masks


def causal_by_mask(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Qualified name -> reason, of the modules that their owner gives a causal mask, and of all inside them."""
    found: dict[str, str] = {}
    for name, owner in modules.items():
        if type(owner).__module__.startswith(("torch.nn.", "torch.jit.")) or not owner._modules:
            continue
        masks = {attribute for attribute, x in _tensors(owner) if is_causal(x)}
        cls: Any = type(owner)
        given = _given_a_mask(cls, frozenset(masks)) & owner._modules.keys()
        for child in given or (owner._modules if masks else ()):  # where the code does not show it, everything inside
            prefix = f"{name}.{child}" if name else child
            reason = f"causal by the mask that {type(owner).__name__} passes; name it in include if that is not so"
            found |= {inner: reason for inner in modules if inner == prefix or inner.startswith(prefix + ".")}
    return found


def is_causal(mask: Tensor) -> bool:
    """Whether a square matrix holds one value above its diagonal and another one elsewhere. Tensors without values,
    on the meta device, are not."""
    mask = mask[(0,) * (mask.dim() - 2)] if mask.dim() > 2 and mask.shape[:-2].numel() == 1 else mask
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1] or mask.shape[0] < 2 or mask.is_meta:
        return False
    mask = mask[:CORNER, :CORNER].detach().cpu()
    above = torch.ones_like(mask, dtype=torch.bool).triu(1)
    future, past = mask[above], mask[~above]
    return bool((future == future[0]).all() and (past == past[0]).all() and future[0] != past[0])


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, x) for name, x in module._buffers.items() if x is not None)
    yield from ((name, x) for name, x in vars(module).items() if isinstance(x, Tensor))


@functools.cache
def _given_a_mask(cls: Any, masks: frozenset[str]) -> set[str]:
    """Names of the attributes of ``self`` that a method of ``cls`` calls, or a method of theirs, with one of ``masks``
    or a causal mask made on the spot."""
    given: set[str] = set()
    known = set(masks)
    for base in cls.__mro__:
        if base is object or base.__module__.startswith("torch.nn."):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # no source: what such masks would do is refused at the call
            continue
        methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for method in methods * 2:  # a second time for what one method assigns and another, above it, uses
            given |= _called_with(method, known)
    return given


def _called_with(method: ast.FunctionDef, masks: set[str]) -> set[str]:
    """The same for one method. Variables that a mask is assigned to are masks as well; attributes go into ``masks``."""
    variables: set[str] = set()

    def holds(node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return node.id in variables
        if isinstance(node, ast.Attribute) and _own(node):
            return node.attr in masks
        if isinstance(node, ast.Call):
            if any(maker in _name(node.func) for maker in _MAKERS):
                return True
            if not ast.unparse(node.func).startswith("torch."):
                return holds(node.func)  # mask.to(x): what a module makes of a mask that it is given is no mask
        return any(map(holds, ast.iter_child_nodes(node)))

    for node in ast.walk(method):
        if isinstance(node, ast.Assign) and holds(node.value):
            targets = [x for target in node.targets for x in ast.walk(target)]
            variables |= {x.id for x in targets if isinstance(x, ast.Name) and x.id != "self"}
            masks |= {own for x in targets if isinstance(x, ast.Attribute) and (own := _own(x))}
    calls = [node for node in ast.walk(method) if isinstance(node, ast.Call)]
    passing = [call for call in calls if any(map(holds, [*call.args, *(k.value for k in call.keywords)]))]
    return {own for call in passing for x in ast.walk(call.func) if isinstance(x, ast.Attribute) and (own := _own(x))}


def _own(node: ast.Attribute) -> str:
    """ "x" for ``self.x``, else nothing."""
    return node.attr if isinstance(node.value, ast.Name) and node.value.id == "self" else ""


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
