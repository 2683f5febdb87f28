"""How a module becomes ours and stock again: by its class, in place, so that parameters, hooks and names stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import nn

from ._choice import CONVERTED as CONVERTED_CONFIG
from ._patches import own_forward, rebind
from .modules import HOOK_KEY, NystromMultiheadAttention, Options

# Attributes that conversion leaves for the way back: on a module whose class it changed, and on one of ours that was
# constructed with options of its own.
CONVERTED = "_converted_from_stock"
CONSTRUCTED = "_constructed_with"


def is_ours(module: nn.Module) -> bool:
    if isinstance(module, NystromMultiheadAttention) or hasattr(type(module), "nystrom_options"):
        return True
    # Options of a Hugging Face module count as long as its config has not been given another attention.
    config = None if hasattr(type(module), "configure") else vars(module).get("config")
    present = getattr(config, "_attn_implementation", CONVERTED_CONFIG)
    return "nystrom_options" in vars(module) and present == CONVERTED_CONFIG


def settings(module: nn.Module) -> tuple[str, ...]:
    """Names of the attributes that hold the options of a converted module."""
    return tuple(vars(Options())) if isinstance(module, NystromMultiheadAttention) else ("nystrom_options",)


def present(module: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Those of the attributes that the module itself has; its class may have them too."""
    return {name: vars(module)[name] for name in names if name in vars(module)}


def restore(module: nn.Module, names: Iterable[str], attributes: Mapping[str, Any]) -> None:
    """What :func:`present` found before."""
    for name in names:
        vars(module).pop(name, None)
    vars(module).update(attributes)


def written_class(module: nn.Module) -> type:
    """The class of ``module`` below those that parametrizations and FSDP2 derive from it for a single module."""
    cls = type(module)
    while cls.__module__.startswith(("torch.nn.utils.parametrize", "torch.distributed.")):
        cls = cls.__bases__[-1]
    return cls


def _exchange(cls: type, old: type, new: type) -> type:
    """``cls`` with ``new`` instead of ``old`` below the classes that :func:`written_class` skips."""
    if cls is old:
        return new
    *mixins, base = cls.__bases__
    return type(cls.__name__.replace(old.__name__, new.__name__), (*mixins, _exchange(base, old, new)), {**vars(cls)})


def match(module: nn.Module, swaps: Mapping[type[nn.Module], Any]) -> tuple[type[nn.Module], Any] | None:
    """The first stock class that the module is an instance of, and ours."""
    return next(((stock, ours) for stock, ours in swaps.items() if isinstance(module, stock)), None)


def swap(module: nn.Module, swaps: Mapping[type[nn.Module], Any], options: Options) -> None:
    """Make a stock module ours, by its class. Modules of other kinds are left alone."""
    if (pair := match(module, swaps)) is None:
        return
    stock, ours = pair
    if not isinstance(module, ours):
        module.__class__ = _exchange(type(module), stock, ours)
        rebind(module, stock)
        setattr(module, CONVERTED, ours)
    elif not {CONVERTED, CONSTRUCTED} & vars(module).keys():
        setattr(module, CONSTRUCTED, present(module, settings(module)))
    cast(Any, module).configure(options)


def swap_back(modules: Mapping[str, nn.Module]) -> None:
    """Undo :func:`swap`. RuntimeError, before anything is changed, where something was put on top of it since."""
    converted = {
        m: vars(m)[CONVERTED] for m in modules.values() if CONVERTED in vars(m)
    }  # hasattr sees through wrappers
    for name, module in modules.items():
        if module not in converted:
            continue
        if written_class(module) is not converted[module]:
            raise RuntimeError(
                f"cannot revert {name!r}, whose class became {type(module).__qualname__} after conversion; first undo "
                f"what changed it"
            )
        if (patch := own_forward(module)) is not None:
            raise RuntimeError(
                f"cannot revert {name!r}, whose forward was replaced by {patch} after conversion and would call what "
                f"is no longer there; first undo that, for example with `del module.forward`"
            )
    for module, ours in converted.items():
        for attribute in (*settings(module), CONVERTED):
            delattr(module, attribute)
        if isinstance(module, NystromMultiheadAttention):
            del module.conv
            module._forward_pre_hooks.pop(HOOK_KEY, None)
        module.__class__ = _exchange(type(module), ours, ours.__bases__[0])  # ours derives from the class it replaces
        rebind(module, ours)
    for module in modules.values():
        if CONSTRUCTED in vars(module):
            restore(module, settings(module), vars(module).pop(CONSTRUCTED))
