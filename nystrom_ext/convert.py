"""Switch the attention of an existing model to Nyström attention and back, in place.

Conversion assigns the class of each `nn.MultiheadAttention` and sets options on it: Parameter objects, state_dict keys,
hooks, training mode and names stay what they were, so optimizers, checkpoints and tied modules keep working. Attention
of other libraries is converted by :mod:`nystrom_ext.integrations`: by its class too, or through Hugging Face's
``attn_implementation``.
"""

from __future__ import annotations

import glob
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ._choice import CONVERTED, OptionsFor, Pattern, build, check_used, matches, own_options
from .modules import HOOK_KEY, NystromMultiheadAttention, Options, added_keys

# Libraries whose attention can be converted: they come into play when a model has classes of theirs.
_LIBRARIES = {"transformers": "pretrained", "timm": "timm"}

# Attributes that conversion leaves for the way back: on a module whose class it changed, on one of ours that was
# constructed with options of its own, and on an encoder.
_CONVERTED = "_converted_from_stock"
_CONSTRUCTED = "_constructed_with"
_STOCK_SETTING = "_stock_use_nested_tensor"

_AFTER_TARGETS = (
    "cross-attention of nn.TransformerDecoderLayer: query landmarks average over later targets; where the decoder may "
    "see those, name it in include"
)


@dataclass(frozen=True)
class Report:
    """What :func:`convert_` did: names of converted modules, skipped name -> reason, options that reproduce it.

    Options of single layers are in ``options["options_for"]``, where there are any.
    """

    converted: list[str]
    skipped: dict[str, str]
    options: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; ``convert_(model, **report.to_dict()["options"])`` converts the same modules of the same model."""
        return {"converted": list(self.converted), "skipped": dict(self.skipped), "options": dict(self.options)}

    def __str__(self) -> str:
        own = self.options.get("options_for", {})
        rows = [(name, _listed("converted", own.get(glob.escape(name), {}))) for name in self.converted]
        rows += [(name, f"skipped: {reason}") for name, reason in self.skipped.items()]
        rows = [(name or "(the model itself)", result) for name, result in rows]
        width = max((len(name) for name, _ in rows), default=0)
        counts = f"{len(self.converted)} converted, {len(self.skipped)} skipped"
        summary = _listed(counts, {name: self.options[name] for name in vars(Options())})
        return "\n".join([f"{name:<{width}}  {result}" for name, result in rows] + [summary])


def convert_(
    model: nn.Module,
    *,
    num_landmarks: int = 64,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    options_for: OptionsFor | None = None,
    strict: bool = True,
    **options: Any,
) -> Report:
    """Make every `nn.MultiheadAttention` in ``model``, itself included, a :class:`NystromMultiheadAttention`, in place.

    The attention of Hugging Face models and `timm.layers.Attention` is converted as well; what stays exact in a Hugging
    Face model, or in another that shares its config object, runs "sdpa". Each `nn.TransformerEncoder` around a
    converted module gets ``use_nested_tensor = False``. Modules that are Nyström attention already get the new options.
    Skipped, with a reason in the report: the self-attention of `nn.TransformerDecoderLayer` and other causal attention,
    attention with position biases, windows, other subclasses of `nn.MultiheadAttention`, and what the filters leave
    out. Only where ``include`` matches it: the cross-attention of `nn.TransformerDecoderLayer`, for decoders that see
    all targets at once. A module that appears several times counts once, under its first name.

    Args:
        include, exclude: globs of qualified names (``*`` also matches dots), or classes, which stand for their
            instances and everything inside them; one or several. ``exclude`` wins.
        filter_fn: called with (module, qualified name); False leaves the module as it is.
        options_for: options of single layers, on top of the others: ``{pattern: options}``, where the first pattern
            that matches counts, or a function of (module, qualified name). None instead of options leaves a layer as
            it is: ``{"*.0.*": None, "*.[12].*": {"window": 16}}``.
        strict: raise ValueError when nothing is converted, or a pattern of ``options_for`` matches no attention.
        num_landmarks, options: keyword options of :class:`NystromMultiheadAttention`, except ``conv_kernel_size``. All
            are set, those not given to their defaults. They are checked before anything is changed.
    """
    general = build({"num_landmarks": num_landmarks, **options})
    modules = dict(model.named_modules())
    integrations = _integrations(modules.values())
    found = _find(modules, integrations)
    skipped = _skipped(modules, found, include, exclude, filter_fn)
    own = {name: own_options(modules, name, options_for) for name in found if name not in skipped}
    skipped |= {name: "options_for gives None" for name, layer in own.items() if layer is None}
    settings = {name: build({**vars(general), **layer}) for name, layer in own.items() if layer is not None}
    for name in [name for name, options in settings.items() if not _fits(options, modules[name])]:
        del settings[name]
        skipped[name] = "add_bias_kv or add_zero_attn: window and pinned need as many keys as queries"
    converted = list(settings)
    if strict and isinstance(options_for, Mapping):
        check_used(modules, found, options_for)
    if strict and not converted:
        listing = "".join(f"\n  {name or '(the model itself)'}: {reason}" for name, reason in skipped.items())
        stock = sum(isinstance(modules[name], nn.MultiheadAttention) for name in found)
        others = f" and {len(found) - stock} other attention modules" if len(found) > stock else ""
        raise ValueError(
            f"nothing to convert in {type(model).__name__}, {stock} nn.MultiheadAttention{others} found{listing}\n"
            f"Change include, exclude or filter_fn, or pass strict=False"
        )
    for integration in integrations:
        integration.convert(modules, settings)
    swaps = _swaps(integrations)
    for name in converted:
        _swap(modules[name], swaps, settings[name])
    for encoder in modules.values():
        if isinstance(encoder, nn.TransformerEncoder) and any(map(_is_ours, encoder.modules())):
            vars(encoder).setdefault(_STOCK_SETTING, getattr(encoder, "use_nested_tensor", False))
            encoder.use_nested_tensor = False  # decided once, in its constructor; would hide padding in a NestedTensor
    reproduce: dict[str, Any] = {"include": [glob.escape(name) for name in converted], "strict": strict}
    if any(own[name] for name in settings):
        reproduce["options_for"] = {
            glob.escape(name): {option: getattr(settings[name], option) for option in layer}
            for name in settings
            if (layer := own[name])
        }
    return Report(converted, skipped, {**vars(general), **reproduce})


def revert_(model: nn.Module) -> None:
    """Undo :func:`convert_` exactly; what was :class:`NystromMultiheadAttention` before gets its options back."""
    modules = list(model.modules())
    _revert(modules, modules)


@contextmanager
def nystrom(model: nn.Module, **arguments: Any) -> Iterator[Report]:
    """Convert within a ``with`` block, arguments as for :func:`convert_`; afterwards ``model`` is as it was before."""
    modules = list(model.modules())
    kept = {m: (*_settings(m), _CONSTRUCTED) for m in modules if _is_ours(m)}
    before = {m: _present(m, names) for m, names in kept.items()}
    report = convert_(model, **arguments)
    try:
        yield report
    finally:
        _revert([m for m in modules if m not in before], modules)
        for module, names in kept.items():
            _restore(module, names, before[module])


def _integrations(modules: Iterable[nn.Module]) -> list[Any]:
    libraries = {cls.__module__.partition(".")[0] for module in modules for cls in type(module).__mro__}
    names = [integration for library, integration in _LIBRARIES.items() if library in libraries]
    return [importlib.import_module(f"{__package__}.integrations.{name}") for name in names]


def _swaps(integrations: Iterable[Any]) -> dict[type[nn.Module], Any]:
    """Stock class -> our subclass of it."""
    swaps: dict[type[nn.Module], Any] = {nn.MultiheadAttention: NystromMultiheadAttention}
    for integration in integrations:
        swaps |= integration.SWAPS
    return swaps


def _is_ours(module: nn.Module) -> bool:
    if isinstance(module, NystromMultiheadAttention) or hasattr(type(module), "nystrom_options"):
        return True
    # Options of a Hugging Face module count as long as its config has not been given another attention.
    config = None if hasattr(type(module), "configure") else vars(module).get("config")
    return "nystrom_options" in vars(module) and getattr(config, "_attn_implementation", CONVERTED) == CONVERTED


def _settings(module: nn.Module) -> tuple[str, ...]:
    """Names of the attributes that hold the options of a converted module."""
    return tuple(vars(Options())) if isinstance(module, NystromMultiheadAttention) else ("nystrom_options",)


def _find(modules: dict[str, nn.Module], integrations: Iterable[Any]) -> dict[str, str | None]:
    """Qualified names of all attention modules, in the model's order -> None, or why one is never converted."""
    found: dict[str, str | None] = {}
    for integration in integrations:
        found |= integration.find(modules)
    decoder_layers = (m for m in modules.values() if isinstance(m, nn.TransformerDecoderLayer))
    causal = {m for layer in decoder_layers for m in layer.self_attn.modules()}  # within an adapter's wrapper as well
    for stock, ours in _swaps(integrations).items():
        for name, module in modules.items():
            if not isinstance(module, stock):
                continue
            cls = type(module)
            special = _written_class(module) is not stock and not isinstance(module, ours)
            reason = f"{cls.__module__}.{cls.__qualname__} is a subclass with its own behaviour" if special else None
            found[name] = "self-attention of nn.TransformerDecoderLayer, causal by use" if module in causal else reason
    return {name: found[name] for name in modules if name in found}


def _skipped(
    modules: dict[str, nn.Module],
    found: dict[str, str | None],
    include: Pattern | Sequence[Pattern] | None,
    exclude: Pattern | Sequence[Pattern] | None,
    filter_fn: Callable[[nn.Module, str], bool] | None,
) -> dict[str, str]:
    """Qualified name -> reason, of the attention modules that are not to be converted."""
    decoder_layers = (m for m in modules.values() if isinstance(m, nn.TransformerDecoderLayer))
    after_targets = {m for layer in decoder_layers for m in layer.multihead_attn.modules()}
    skipped = {}
    for name, reason in found.items():
        if include is not None and not matches(modules, name, include):
            skipped[name] = "not in include"
        elif exclude is not None and matches(modules, name, exclude):
            skipped[name] = "in exclude"
        elif filter_fn is not None and not filter_fn(modules[name], name):
            skipped[name] = "filter_fn returned False"
        elif reason is not None:
            skipped[name] = reason
        elif include is None and modules[name] in after_targets and not _is_ours(modules[name]):
            skipped[name] = _AFTER_TARGETS
    return skipped


def _fits(options: Options, module: nn.Module) -> bool:
    extended = options.window or options.pinned
    return not (extended and isinstance(module, nn.MultiheadAttention) and added_keys(module))


def _listed(text: str, options: Mapping[str, Any]) -> str:
    return f"{text} ({', '.join(f'{name}={value!r}' for name, value in options.items())})" if options else text


def _present(module: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Those of the attributes that the module itself has; its class may have them too."""
    return {name: vars(module)[name] for name in names if name in vars(module)}


def _restore(module: nn.Module, names: Iterable[str], attributes: Mapping[str, Any]) -> None:
    """What :func:`_present` found before."""
    for name in names:
        vars(module).pop(name, None)
    vars(module).update(attributes)


def _written_class(module: nn.Module) -> type:
    """The class of ``module`` below those that parametrizations and FSDP2 derive from it for a single module."""
    cls = type(module)
    while cls.__module__.startswith(("torch.nn.utils.parametrize", "torch.distributed.")):
        cls = cls.__bases__[-1]
    return cls


def _exchange(cls: type, old: type, new: type) -> type:
    """``cls`` with ``new`` instead of ``old`` below the classes that :func:`_written_class` skips."""
    if cls is old:
        return new
    *mixins, base = cls.__bases__
    return type(cls.__name__.replace(old.__name__, new.__name__), (*mixins, _exchange(base, old, new)), {**vars(cls)})


def _swap(module: nn.Module, swaps: dict[type[nn.Module], Any], options: Options) -> None:
    """Make a stock module ours, by its class. Modules of other kinds are left alone."""
    for stock, ours in swaps.items():
        if isinstance(module, stock):
            if not isinstance(module, ours):
                module.__class__ = _exchange(type(module), stock, ours)
                setattr(module, _CONVERTED, ours)
            elif not {_CONVERTED, _CONSTRUCTED} & vars(module).keys():
                setattr(module, _CONSTRUCTED, _present(module, _settings(module)))
            cast(Any, module).configure(options)


def _revert(modules: list[nn.Module], scope: list[nn.Module]) -> None:
    """Revert ``modules``, and in ``scope`` what surrounds them as far as nothing converted needs it any more."""
    converted = {m: vars(m)[_CONVERTED] for m in modules if _CONVERTED in vars(m)}  # hasattr would see through wrappers
    for module, ours in converted.items():
        if _written_class(module) is not ours:
            raise RuntimeError(
                f"cannot revert a module whose class became {type(module).__qualname__} after conversion; first undo "
                f"what changed it"
            )
    for module, ours in converted.items():
        for attribute in (*_settings(module), _CONVERTED):
            delattr(module, attribute)
        if isinstance(module, NystromMultiheadAttention):
            del module.conv
            module._forward_pre_hooks.pop(HOOK_KEY, None)
        module.__class__ = _exchange(type(module), ours, ours.__bases__[0])  # ours derives from the class it replaces
    for module in modules:
        if _CONSTRUCTED in vars(module):
            _restore(module, _settings(module), vars(module).pop(_CONSTRUCTED))
    for integration in _integrations(scope):
        integration.revert(modules, scope)
    for encoder in modules:
        if _STOCK_SETTING in vars(encoder) and not any(_CONVERTED in vars(m) for m in encoder.modules()):
            encoder.use_nested_tensor = vars(encoder).pop(_STOCK_SETTING)
