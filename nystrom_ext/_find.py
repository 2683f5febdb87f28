"""Which modules of a model are attention, which of them a conversion takes, and why not the others."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from ._causal import causal_by_mask
from ._choice import Names, Pattern
from ._masks import added_keys
from ._patches import own_forward
from ._swap import is_ours, match, written_class
from .integrations import lucidrains
from .modules import NystromMultiheadAttention, Options

# Libraries whose attention can be converted: they come into play when a model has classes of theirs. lucidrains' is
# copied into projects, so that only a look at all modules tells.
_LIBRARIES = {"timm": "timm", "transformers": "pretrained"}

_STOCK_FILE = inspect.getfile(nn.MultiheadAttention)

_AFTER_TARGETS = (
    "cross-attention of nn.TransformerDecoderLayer: query landmarks average over later targets; where the decoder may "
    "see those, name it in include"
)


def integrations_of(modules: Iterable[nn.Module]) -> list[Any]:
    libraries = {cls.__module__.partition(".")[0] for module in modules for cls in type(module).__mro__}
    names = [integration for library, integration in _LIBRARIES.items() if library in libraries]
    return [lucidrains, *(importlib.import_module(f"{__package__}.integrations.{name}") for name in names)]


def swaps_of(modules: dict[str, nn.Module], integrations: Iterable[Any]) -> dict[type[nn.Module], Any]:
    """Stock class -> our subclass of it; a module is of the first that it is an instance of."""
    swaps: dict[type[nn.Module], Any] = {nn.MultiheadAttention: NystromMultiheadAttention}
    for integration in integrations:
        swaps |= integration.swaps(modules) if integration is lucidrains else integration.SWAPS
    return swaps


def find(modules: dict[str, nn.Module], integrations: Iterable[Any]) -> dict[str, str | None]:
    """Qualified names of all attention modules, in the model's order -> None, or why one is never converted."""
    found: dict[str, str | None] = {}
    for integration in integrations:
        found |= integration.find(modules)
    decoder_layers = (m for m in modules.values() if isinstance(m, nn.TransformerDecoderLayer))
    causal = {m for layer in decoder_layers for m in layer.self_attn.modules()}  # within an adapter's wrapper as well
    swaps = swaps_of(modules, integrations)
    for name, module in modules.items():
        pair = match(module, swaps)
        if pair is None or found.get(name) is not None:
            continue
        stock, ours = pair
        cls = type(module)
        special = written_class(module) is not stock and not isinstance(module, ours)
        reason = f"{cls.__module__}.{cls.__qualname__} is a subclass with its own behaviour" if special else None
        found[name] = "self-attention of nn.TransformerDecoderLayer, causal by use" if module in causal else reason
    if (code := nn.MultiheadAttention.forward.__code__).co_filename != _STOCK_FILE:
        patch = f"nn.MultiheadAttention.forward was replaced by {code.co_name}, which conversion does not reach"
        found |= {n: patch for n, m in modules.items() if isinstance(m, nn.MultiheadAttention) and not is_ours(m)}
    for name in [name for name, reason in found.items() if reason is None]:
        if (replaced := own_forward(modules[name])) is not None:
            found[name] = f"its forward was replaced by {replaced}, which conversion does not reach; convert first"
    return {name: found[name] for name in modules if name in found}


def skipped(
    names: Names,
    modules: dict[str, nn.Module],
    found: dict[str, str | None],
    include: Pattern | Sequence[Pattern] | None,
    exclude: Pattern | Sequence[Pattern] | None,
    filter_fn: Callable[[nn.Module, str], bool] | None,
) -> dict[str, str]:
    """Qualified name -> reason, of the attention modules that are not to be converted."""
    unless_included = unless_named(modules) if include is None else {}
    result = {}
    for name, reason in found.items():
        if include is not None and not names.match(name, include):
            result[name] = "not in include"
        elif exclude is not None and names.match(name, exclude):
            result[name] = "in exclude"
        elif filter_fn is not None and not filter_fn(modules[name], name):
            result[name] = "filter_fn returned False"
        elif reason is not None:
            result[name] = reason
        elif name in unless_included and not is_ours(modules[name]):
            result[name] = unless_included[name]
    return result


def unless_named(modules: dict[str, nn.Module]) -> dict[str, str]:
    """What is converted only where ``include`` names it: qualified name -> reason."""
    decoder_layers = (m for m in modules.values() if isinstance(m, nn.TransformerDecoderLayer))
    after_targets = {m for layer in decoder_layers for m in layer.multihead_attn.modules()}
    return causal_by_mask(modules) | {name: _AFTER_TARGETS for name, m in modules.items() if m in after_targets}


def takes(options: Options, module: nn.Module) -> bool:
    """Whether the module can have the options: added keys go with neither window nor pinned tokens."""
    extended = options.window or options.pinned
    return not (extended and isinstance(module, nn.MultiheadAttention) and added_keys(module))


def refusals(options: Options, module: nn.Module, included: str | None) -> str | None:
    """What to know of a converted module: that it was converted only because it was named, or what it will refuse."""
    if included:
        return f"named in include: {included}"
    if isinstance(module, nn.MultiheadAttention) and options.unsupported_mask == "error":
        return f"refuses attn_mask beyond {options.num_landmarks} tokens"
    return None
