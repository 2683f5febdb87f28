"""Switch the attention of an existing model to Nyström attention and back, in place.

Conversion assigns the class of each `nn.MultiheadAttention` and sets options on it: Parameter objects, state_dict keys,
hooks, training mode and names stay what they were, so optimizers, checkpoints and tied modules keep working.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn

from .modules import HOOK_KEY, NystromMultiheadAttention, Options

Pattern = str | type[nn.Module]

# Attributes that conversion leaves on a converted module and on an encoder, for the way back.
_CONVERTED = "_converted_from_stock"
_STOCK_SETTING = "_stock_use_nested_tensor"


@dataclass(frozen=True)
class Report:
    """What :func:`convert_` did: names of converted modules, skipped name -> reason, options that reproduce it."""

    converted: list[str]
    skipped: dict[str, str]
    options: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; ``convert_(model, **report.to_dict()["options"])`` converts the same modules of the same model."""
        return {"converted": list(self.converted), "skipped": dict(self.skipped), "options": dict(self.options)}

    def __str__(self) -> str:
        rows = [(name, "converted") for name in self.converted]
        rows += [(name, f"skipped: {reason}") for name, reason in self.skipped.items()]
        rows = [(name or "(the model itself)", result) for name, result in rows]
        width = max((len(name) for name, _ in rows), default=0)
        settings = ", ".join(f"{name}={self.options[name]!r}" for name in vars(Options()))
        summary = f"{len(self.converted)} converted, {len(self.skipped)} skipped ({settings})"
        return "\n".join([f"{name:<{width}}  {result}" for name, result in rows] + [summary])


def convert_(
    model: nn.Module,
    *,
    num_landmarks: int = 64,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    strict: bool = True,
    **options: Any,
) -> Report:
    """Make every `nn.MultiheadAttention` in ``model``, itself included, a :class:`NystromMultiheadAttention`, in place.

    Each `nn.TransformerEncoder` around a converted module gets ``use_nested_tensor = False``. Modules that are Nyström
    attention already get the new options. Skipped, with a reason in the report: the self-attention of
    `nn.TransformerDecoderLayer`, other subclasses of `nn.MultiheadAttention`, and what the filters leave out. A module
    that appears several times counts once, under its first name.

    Args:
        include, exclude: globs of qualified names (``*`` also matches dots), or classes, which stand for their
            instances and everything inside them; one or several. ``exclude`` wins.
        filter_fn: called with (module, qualified name); False leaves the module as it is.
        strict: raise ValueError when nothing is converted.
        num_landmarks, options: keyword options of :class:`NystromMultiheadAttention`, except ``conv_kernel_size``. All
            are set, those not given to their defaults. They are checked before anything is changed.
    """
    if "conv_kernel_size" in options:
        raise ValueError(
            f"convert_ keeps the state_dict keys, but conv_kernel_size={options['conv_kernel_size']} adds a parameter; "
            f"construct NystromMultiheadAttention(..., conv_kernel_size=...) instead"
        )
    settings = Options(num_landmarks=num_landmarks, **options)
    modules = dict(model.named_modules())
    skipped = _skipped(modules, include, exclude, filter_fn)
    found = {name: m for name, m in modules.items() if isinstance(m, nn.MultiheadAttention)}
    converted = [name for name in found if name not in skipped]
    if strict and not converted:
        listing = "".join(f"\n  {name or '(the model itself)'}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            f"nothing to convert in {type(model).__name__}, {len(found)} nn.MultiheadAttention found{listing}\n"
            f"Change include, exclude or filter_fn, or pass strict=False"
        )
    for name in converted:
        _convert(found[name], settings)
    for encoder in modules.values():
        if isinstance(encoder, nn.TransformerEncoder) and any(map(_is_ours, encoder.modules())):
            vars(encoder).setdefault(_STOCK_SETTING, getattr(encoder, "use_nested_tensor", False))
            encoder.use_nested_tensor = False  # decided once, in its constructor; would hide padding in a NestedTensor
    reproduce = {"include": [glob.escape(name) for name in converted], "strict": strict}
    return Report(converted, skipped, {**vars(settings), **reproduce})


def revert_(model: nn.Module) -> None:
    """Undo :func:`convert_` exactly. Modules constructed as :class:`NystromMultiheadAttention` stay what they are."""
    _revert(model.modules())


@contextmanager
def nystrom(model: nn.Module, **arguments: Any) -> Iterator[Report]:
    """Convert within a ``with`` block, arguments as for :func:`convert_`; afterwards ``model`` is as it was before."""
    modules = list(model.modules())
    before = {m: {name: getattr(m, name) for name in vars(Options())} for m in modules if _is_ours(m)}
    report = convert_(model, **arguments)
    try:
        yield report
    finally:
        _revert(m for m in modules if m not in before)
        for module, attributes in before.items():
            vars(module).update(attributes)


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, NystromMultiheadAttention)


def _skipped(
    modules: dict[str, nn.Module],
    include: Pattern | Sequence[Pattern] | None,
    exclude: Pattern | Sequence[Pattern] | None,
    filter_fn: Callable[[nn.Module, str], bool] | None,
) -> dict[str, str]:
    """Qualified name -> reason, of the nn.MultiheadAttention modules that are not to be converted."""
    causal = {m.self_attn for m in modules.values() if isinstance(m, nn.TransformerDecoderLayer)}
    skipped = {}
    for name, module in modules.items():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        if include is not None and not _matches(modules, name, include):
            skipped[name] = "not in include"
        elif exclude is not None and _matches(modules, name, exclude):
            skipped[name] = "in exclude"
        elif filter_fn is not None and not filter_fn(module, name):
            skipped[name] = "filter_fn returned False"
        elif module in causal:
            skipped[name] = "self-attention of nn.TransformerDecoderLayer, causal by use"
        elif type(module) is not nn.MultiheadAttention and not isinstance(module, NystromMultiheadAttention):
            cls = type(module)
            skipped[name] = f"{cls.__module__}.{cls.__qualname__} is a subclass with its own behaviour"
    return skipped


def _matches(modules: dict[str, nn.Module], name: str, patterns: Pattern | Sequence[Pattern]) -> bool:
    parts = name.split(".") if name else []
    around = [modules[".".join(parts[:i])] for i in range(len(parts) + 1)]  # the model ... the module itself
    for pattern in (patterns,) if isinstance(patterns, (str, type)) else patterns:
        if fnmatchcase(name, pattern) if isinstance(pattern, str) else any(isinstance(m, pattern) for m in around):
            return True
    return False


def _convert(module: nn.MultiheadAttention, options: Options) -> None:
    if not isinstance(module, NystromMultiheadAttention):
        module.__class__ = NystromMultiheadAttention
        setattr(module, _CONVERTED, True)
    cast(NystromMultiheadAttention, module).configure(options)


def _revert(modules: Iterable[nn.Module]) -> None:
    modules = list(modules)
    converted = [m for m in modules if hasattr(m, _CONVERTED)]
    for module in converted:
        if type(module) is not NystromMultiheadAttention:
            raise RuntimeError(
                f"cannot revert a module whose class became {type(module).__qualname__} after conversion; first remove "
                f"what changed it, for example its parametrizations"
            )
    for module in converted:
        for attribute in (*vars(Options()), "conv", _CONVERTED):
            delattr(module, attribute)
        module._forward_pre_hooks.pop(HOOK_KEY, None)
        module.__class__ = nn.MultiheadAttention
    for encoder in modules:
        if hasattr(encoder, _STOCK_SETTING) and not any(hasattr(m, _CONVERTED) for m in encoder.modules()):
            encoder.use_nested_tensor = getattr(encoder, _STOCK_SETTING)
            delattr(encoder, _STOCK_SETTING)
