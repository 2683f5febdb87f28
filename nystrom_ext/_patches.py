"""Modules whose `forward` somebody replaced on the instance, which a change of their class does not reach."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

from torch import nn


def own_forward(module: nn.Module) -> str | None:
    """What replaced ``forward`` on the module itself; None where nothing did, or only what :func:`rebind` reaches."""
    patch = vars(module).get("forward")
    if patch is None or _is_method(module, patch):
        return None
    if "_hf_hook" in vars(module) and _is_method(module, vars(module).get("_old_forward")):
        return None  # accelerate's hooks, which call the method that they keep
    while isinstance(patch, functools.partial):
        patch = patch.func
    return f"{getattr(patch, '__module__', '?')}.{getattr(patch, '__qualname__', type(patch).__qualname__)}"


def rebind(module: nn.Module, old: type[nn.Module]) -> None:
    """Points methods of the class ``old`` that the module keeps as attributes of its own to its present class:
    accelerate's hooks keep one, and leave one behind when they are removed."""
    for name in ("forward", "_old_forward"):
        kept = vars(module).get(name)
        if isinstance(kept, MethodType) and kept.__self__ is module and kept.__func__ is old.forward:
            setattr(module, name, MethodType(type(module).forward, module))


def _is_method(module: nn.Module, x: Any) -> bool:
    return isinstance(x, MethodType) and x.__self__ is module and x.__func__ is type(module).forward
