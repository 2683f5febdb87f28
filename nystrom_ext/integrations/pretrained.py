"""Which attention modules of Hugging Face models can run Nyström attention, and how conversion switches them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .._choice import CONVERTED
from ..modules import Options
from .lucidrains import layout_of
from .nystromformer import SWAPS, announce
from .transformers import REGISTERED, Converted, implementation_of, options_of

# Attention that no AttentionInterface function could replace, or that receives its bias where nobody can tell.
REFUSED = {
    "beit": "relative position bias",
    "big_bird": "block-sparse attention",
    "bigbird_pegasus": "block-sparse attention in the encoder",
    "data2vec-vision": "relative position bias",
    "deberta": "disentangled attention to relative positions",
    "deberta-v2": "disentangled attention to relative positions",
    "led": "sliding-window attention",
    "longformer": "sliding-window attention",
    "mpnet": "relative position bias",
    # Text towers that declare is_causal=False and pass is_causal=True.
    "clip_text_model": "causal",
    "clipseg_text_model": "causal",
    "groupvit_text_model": "causal",
    "metaclip_2_text_model": "causal",
    "owlv2_text_model": "causal",
    "owlvit_text_model": "causal",
    "xclip_text_model": "causal",
}


def find(modules: dict[str, nn.Module]) -> dict[str, str | None]:
    """Attention modules of Hugging Face models -> None, or why they are never converted.

    A model without attention that could ever be converted is listed itself.
    """
    found: dict[str, str | None] = {}
    without: dict[str, str | None] = {}
    owners = _owners(modules)
    others = {name for name, module in modules.items() if isinstance(module, tuple(SWAPS)) or layout_of(module)}
    for name, module in modules.items():
        owner = owners[name]
        if _uses_interface(module):
            found[name] = _reason(module, None if owner is None else modules[owner])
        elif owner is not None and "Attention" in type(module).__name__ and name not in others:
            model_type = _model_type(modules[owner])
            reason = REFUSED.get(model_type, "its attention does not go through transformers' AttentionInterface")
            without.setdefault(owner, f"{model_type}: {reason}")
    served = {owners[name] for name in {*found, *others}}
    return found | {name: reason for name, reason in without.items() if name not in served}


def convert(modules: dict[str, Any], options: dict[str, Options]) -> None:
    """Let those of the modules named in ``options`` that :func:`find` lists run Nyström attention, and no others."""
    announce({modules[name]: own for name, own in options.items()})  # first: a warning may be turned into an error
    owners = _owners(modules)
    for _, config in list(_configs(modules.values())):  # left at a registered name, the others would go on refusing
        if config._attn_implementation in REGISTERED:
            _switch(config, modules.values())
    for name in filter(lambda name: _uses_interface(modules[name]), options):
        owner = owners[name]
        for config in (modules[name].config, *([] if owner is None else [modules[owner].config])):
            _switch(config, modules.values())
        modules[name].nystrom_options = options[name]


def revert(modules: Iterable[nn.Module], scope: Iterable[nn.Module]) -> None:
    """Undo :func:`convert` for ``modules``, and for the configs in ``scope`` that no converted module needs now."""
    for module in filter(_uses_interface, modules):
        vars(module).pop("nystrom_options", None)
    configs = list(_configs(scope))
    needed = {id(config) for module, config in configs if "nystrom_options" in vars(module)}
    for _, config in configs:
        implementation = config._attn_implementation
        if isinstance(implementation, Converted) and id(config) not in needed:
            if not (needed and implementation.stock in REGISTERED):  # which any conversion takes out of the way
                config._attn_implementation_internal = implementation.stock


def check(model: nn.Module) -> list[str]:
    """See :func:`nystrom_ext.integrations.transformers.check`."""
    modules = dict(model.named_modules())
    running, wrong = [], {}
    found = find(modules)
    for name, reason in found.items():
        module = modules[name]
        options = options_of(module)
        if options is None:
            continue
        if reason is None:
            running.append(name)
        elif options.unsupported_mask == "error":
            wrong[name] = reason
    listing = "".join(f"\n  {name or '(the model itself)'}: {reason}" for name, reason in wrong.items())
    if wrong:
        raise ValueError(
            f"{type(model).__name__} cannot honour its attn_implementation:{listing}\n"
            + (
                'Use "sdpa", or nystrom_ext.convert_(model), which converts what can be converted'
                if any(reason is None for reason in found.values())
                else "Load it without attn_implementation"
            )
        )
    swapped = [name for name, module in modules.items() if isinstance(module, tuple(SWAPS.values()))]
    if not running and not swapped:
        load = "" if implementation_of(model) in REGISTERED else 'load it with attn_implementation="nystrom" or '
        raise ValueError(
            f"no attention of {type(model).__name__} runs Nyström attention; {load}call nystrom_ext.convert_(model), "
            f"which says what it can convert"
        )
    return running + swapped


def _switch(config: Any, scope: Iterable[nn.Module]) -> None:
    stock = config._attn_implementation
    if stock == CONVERTED:
        return
    for module, other in _configs(scope):  # options of a conversion before the config was given this implementation
        if other is config and _uses_interface(module):
            vars(module).pop("nystrom_options", None)
    config._attn_implementation_internal = Converted(CONVERTED, stock)


def _owners(modules: dict[str, nn.Module]) -> dict[str, str | None]:
    """Name of each module -> name of the innermost pretrained model that it is or belongs to."""
    owners: dict[str, str | None] = {}
    for name, module in modules.items():  # parents come before their children
        inherited = owners.get(name.rpartition(".")[0]) if name else None
        owners[name] = name if isinstance(module, PreTrainedModel) else inherited
    return owners


def _configs(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, Any]]:
    for module in modules:
        config = vars(module).get("config")
        if hasattr(config, "_attn_implementation_internal"):
            yield module, config


def _uses_interface(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def _model_type(module: nn.Module) -> str:
    return getattr(getattr(module, "config", None), "model_type", "") or type(module).__name__


def _reason(module: nn.Module, owner: nn.Module | None) -> str | None:
    """Why an attention module is never converted, as far as the module shows it; calls are checked again."""
    for model_type in {_model_type(m) for m in (module, owner) if m is not None}:
        if model_type in REFUSED:
            return f"{model_type}: {REFUSED[model_type]}"
    causal = _is_causal(module, owner)
    if causal is None:
        return "does not say whether it is causal"
    if causal or getattr(module, "is_decoder", False):
        return f"in a causal decoder{_BIDIRECTIONAL if causal and _passes_is_causal(owner) else ''}"
    if bias := _bias(module):
        return f"{_model_type(module)}: {bias}"
    limits = {name: getattr(module, name, None) for name in ("sliding_window", "attn_logit_softcapping")}
    return next((f"{name}={limit}" for name, limit in limits.items() if limit is not None), None)


_BIDIRECTIONAL = "; if it is always called with is_causal=False, let its config say so: config.is_causal = False"


def _is_causal(module: nn.Module, owner: nn.Module | None) -> bool | None:
    """What the calls will say, or what the module does, or else what the mask of its model does."""
    config: Any = getattr(owner, "config", None)
    if _passes_is_causal(owner) and getattr(config, "is_causal", None) is not None:
        return config.is_causal
    if getattr(module, "is_causal", None) is not None or owner is None:
        return getattr(module, "is_causal", None)
    names = {name for code in _codes(type(owner)) for name in (*code.co_names, *code.co_varnames)}
    padding_only = names & {"create_bidirectional_mask", "extended_attention_mask"}
    causal = getattr(config, "is_decoder", False) or any("causal_mask" in name for name in names)
    return False if padding_only and not causal else None


def _passes_is_causal(owner: nn.Module | None) -> bool:
    """Whether the model hands ``config.is_causal``, or its own argument, down to its attention."""
    forward = None if owner is None else type(owner).forward
    while forward is not None:  # through the decorators, one of which does
        if "is_causal" in getattr(getattr(forward, "__code__", None), "co_consts", ()):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _codes(cls: type) -> Iterator[Any]:
    """Code of all methods that ``cls`` has besides those of every pretrained model."""
    for base in cls.__mro__:
        if base is PreTrainedModel:
            return
        for method in vars(base).values():
            if callable(method) and hasattr(inspect.unwrap(method), "__code__"):
                yield inspect.unwrap(method).__code__


# What attention adds to its scores or leaves out of them, by parts of the names in its code and of its attributes.
_BIASES = {
    **dict.fromkeys(("relative", "position_bias", "rel_pos"), "relative position bias"),
    **dict.fromkeys(("attention_bias", "attn_bias", "alibi"), "a bias"),
    "sinks": "attention sinks",
    "_indices": "sparse attention",
}


def _bias(module: nn.Module) -> str | None:
    """What the calls pass besides a mask, in words and by the name that gives it away."""
    kinds = {x for name, x in vars(module).items() if name in ("position_embeddings_type", "position_embedding_type")}
    flags = {name: x for name, x in vars(module.config).items() if name.startswith("has_") and "bias" in name}
    code = inspect.unwrap(type(module).forward).__code__
    names = [*code.co_varnames, *code.co_names, *vars(module), *module._modules, *module._parameters]
    if kinds or flags:  # of models that can do without
        names = [kind for kind in kinds if kind is not None] + [name for name, wanted in flags.items() if wanted]
    return next((f"{bias} ({name})" for name in names for word, bias in _BIASES.items() if word in name), None)
