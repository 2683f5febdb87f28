"""Switch the attention of an existing model to Nyström attention and back, in place.

Conversion assigns the class of each `nn.MultiheadAttention` and sets options on it: Parameter objects, state_dict keys,
hooks, training mode and names stay what they were, so optimizers, checkpoints and tied modules keep working. Attention
of other libraries is converted by :mod:`nystrom_ext.integrations`: by its class too, or through Hugging Face's
``attn_implementation``.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ._advice import unknown_attention
from ._choice import Names, OptionsFor, Pattern, build, check_used, listed, own_options
from ._find import find, integrations_of, refusals, skipped, swaps_of, takes, unless_named
from ._report import Report
from ._samples import check_model, self_attention_in
from ._swap import CONSTRUCTED, CONVERTED, is_ours, present, restore, settings, swap, swap_back
from .integrations.lucidrains import kept_options

# On an encoder: what its attribute was.
_STOCK_SETTING = "_stock_use_nested_tensor"


def convert_(
    model: nn.Module,
    *,
    num_landmarks: int | None = None,
    include: Pattern | Sequence[Pattern] | None = None,
    exclude: Pattern | Sequence[Pattern] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    options_for: OptionsFor | None = None,
    strict: bool = True,
    batch: Any = None,
    **options: Any,
) -> Report:
    """Make every `nn.MultiheadAttention` in ``model``, itself included, a :class:`NystromMultiheadAttention`, in place.

    The attention of Hugging Face models, `timm.layers.Attention` and lucidrains' nystrom-attention, copies of it too,
    are converted as well; what stays exact in a Hugging Face model, or in another that shares its config object, runs
    "sdpa". Each `nn.TransformerEncoder` around a
    converted module gets ``use_nested_tensor = False``. Modules that are Nyström attention already get the new options.
    Skipped, with a reason in the report: the self-attention of `nn.TransformerDecoderLayer` and other causal attention,
    attention with position biases, windows, other subclasses of `nn.MultiheadAttention`, modules whose ``forward`` was
    replaced (accelerate's hooks are kept), and what the filters leave out. Only where ``include`` matches it: the
    cross-attention of `nn.TransformerDecoderLayer`, for decoders that see all targets at once, and attention that its
    owner gives a causal mask, as far as its code or its buffers show it. A module that appears several times counts
    once; patterns match it by any of its names.

    Args:
        include, exclude: globs of qualified names (``*`` also matches dots), or classes, which stand for their
            instances and everything inside them; one or several. ``exclude`` wins.
        filter_fn: called with (module, qualified name); False leaves the module as it is.
        options_for: options of single layers, on top of the others: ``{pattern: options}``, where the first pattern
            that matches counts, or a function of (module, qualified name). None instead of options leaves a layer as
            it is: ``{"*.0.*": None, "*.[12].*": {"window": 16}}``.
        strict: raise ValueError when nothing is converted, or a pattern of ``include``, ``exclude`` or ``options_for``
            matches no attention.
        batch: a sample for ``model``, a dict, a tuple or a single tensor: the model runs on it once, as it is, and
            ``self_attention=True`` is set in the modules whose queries and keys are equal without being one tensor.
        num_landmarks, options: keyword options of :class:`NystromMultiheadAttention`, except ``conv_kernel_size``. All
            are set, those not given to their defaults: 64 landmarks. lucidrains' attention keeps what it was built
            with, and computes what it computed, as long as it is not told otherwise; the report says what that is.
            They are checked before anything is changed.
    """
    check_model("convert_", model)
    if num_landmarks is not None:
        options = {"num_landmarks": num_landmarks, **options}
    general = build(options)
    modules = dict(model.named_modules())
    integrations = integrations_of(modules.values())
    found = find(modules, integrations)
    names = Names(model)
    if strict:
        for what, patterns in (("include", include), ("exclude", exclude)):
            check_used(names, found, what, () if patterns is None else listed(patterns))
        if isinstance(options_for, Mapping):
            check_used(names, found, "options_for", options_for)
    left = skipped(names, modules, found, include, exclude, filter_fn)
    own = {name: own_options(names, name, options_for) for name in found if name not in left}
    left |= {name: "options_for gives None" for name, layer in own.items() if layer is None}
    kept = {name: {k: v for k, v in kept_options(modules[name]).items() if k not in options} for name in own}
    layers = {name: {**kept[name], **layer} for name, layer in own.items() if layer is not None}
    if batch is not None and general.self_attention is None:
        for name in self_attention_in(model, list(layers), batch):
            layers[name].setdefault("self_attention", True)
    chosen = {name: build({**vars(general), **layer}) for name, layer in layers.items()}
    for name in [name for name, options in chosen.items() if not takes(options, modules[name])]:
        del chosen[name]
        left[name] = "add_bias_kv or add_zero_attn: window and pinned need as many keys as queries"
    if strict and not chosen:
        raise ValueError(_nothing(model, modules, found, left))
    special = {} if include is None else unless_named(modules)
    _convert(modules, integrations, chosen)
    reproduce: dict[str, Any] = {"include": [glob.escape(name) for name in chosen], "strict": strict}
    if any(layers[name] for name in chosen):
        reproduce["options_for"] = {
            glob.escape(name): {option: getattr(chosen[name], option) for option in layers[name]}
            for name in chosen
            if layers[name]
        }
    notes = {name: note for name in chosen if (note := refusals(chosen[name], modules[name], special.get(name)))}
    return Report(list(chosen), left, {**vars(general), **reproduce}, notes)


def revert_(model: nn.Module) -> None:
    """Undo :func:`convert_` exactly; what was :class:`NystromMultiheadAttention` before gets its options back.

    Raises:
        RuntimeError: a converted module's class or ``forward`` was replaced since; nothing has been changed.
    """
    check_model("revert_", model)
    modules = dict(model.named_modules())
    _revert(modules, modules)


@contextmanager
def nystrom(model: nn.Module, **arguments: Any) -> Iterator[Report]:
    """Convert within a ``with`` block, arguments as for :func:`convert_`; afterwards ``model`` is as it was before."""
    check_model("nystrom", model)
    modules = dict(model.named_modules())
    kept = {m: (*settings(m), CONSTRUCTED) for m in modules.values() if is_ours(m)}
    before = {m: present(m, names) for m, names in kept.items()}
    report = convert_(model, **arguments)
    try:
        yield report
    finally:
        _revert({name: m for name, m in modules.items() if m not in before}, modules)
        for module, names in kept.items():
            restore(module, names, before[module])


def _convert(modules: dict[str, nn.Module], integrations: list[Any], chosen: dict[str, Any]) -> None:
    for integration in integrations:
        integration.convert(modules, chosen)
    swaps = swaps_of(modules, integrations)
    for name, options in chosen.items():
        swap(modules[name], swaps, options)
    for encoder in modules.values():
        if isinstance(encoder, nn.TransformerEncoder) and any(map(is_ours, encoder.modules())):
            vars(encoder).setdefault(_STOCK_SETTING, getattr(encoder, "use_nested_tensor", False))
            encoder.use_nested_tensor = False  # decided once, in its constructor; would hide padding in a NestedTensor


def _revert(modules: dict[str, nn.Module], scope: dict[str, nn.Module]) -> None:
    """Revert ``modules``, and in ``scope`` what surrounds them as far as nothing converted needs it any more."""
    swap_back(modules)
    for integration in integrations_of(scope.values()):
        integration.revert(modules.values(), scope.values())
    for encoder in modules.values():
        if _STOCK_SETTING in vars(encoder) and not any(CONVERTED in vars(m) for m in encoder.modules()):
            encoder.use_nested_tensor = vars(encoder).pop(_STOCK_SETTING)


def _nothing(model: nn.Module, modules: dict[str, nn.Module], found: Mapping[str, Any], left: dict[str, str]) -> str:
    listing = "".join(f"\n  {name or '(the model itself)'}: {reason}" for name, reason in left.items())
    stock = sum(isinstance(modules[name], nn.MultiheadAttention) for name in found)
    others = f" and {len(found) - stock} other attention modules" if len(found) > stock else ""
    unknown = unknown_attention(modules, found)
    advice = unknown if not found and unknown else "Change include, exclude or filter_fn, or pass strict=False"
    return (
        f"nothing to convert in {type(model).__name__}, {stock} nn.MultiheadAttention{others} found{listing}\n{advice}"
    )
