"""Which attention modules of Hugging Face models can run Nyström attention, and how conversion switches them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .._choice import CONVERTED
from ..modules import Options
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
    for name, module in modules.items():
        owner = owners[name]
        if _uses_interface(module):
            found[name] = _reason(module, None if owner is None else modules[owner])
        elif owner is not None and "Attention" in type(module).__name__ and not isinstance(module, tuple(SWAPS)):
            model_type = _model_type(modules[owner])
            reason = REFUSED.get(model_type, "its attention does not go through transformers' AttentionInterface")
            without.setdefault(owner, f"{model_type}: {reason}")
    served = {owners[name] for name in found} | {owners[n] for n, m in modules.items() if isinstance(m, tuple(SWAPS))}
    return found | {name: reason for name, reason in without.items() if name not in served}


def convert(modules: dict[str, Any], options: dict[str, Options]) -> None:
    """Let those of the modules named in ``options`` that :func:`find` lists run Nyström attention, and no others."""
    announce({modules[name]: own for name, own in options.items()})  # first: a warning may be turned into an error
    owners = _owners(modules)
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
    if getattr(module, "is_causal", None) is None:
        return "does not say whether it is causal"
    if module.is_causal or getattr(module, "is_decoder", False):
        return "in a causal decoder"
    if any("relative" in name for name in (*vars(module), *module._modules, *module._parameters)):
        return f"{_model_type(module)}: relative position bias"
    limits = {name: getattr(module, name, None) for name in ("sliding_window", "attn_logit_softcapping")}
    return next((f"{name}={limit}" for name, limit in limits.items() if limit is not None), None)
