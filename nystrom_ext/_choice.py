"""Which modules a conversion means, and with which options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ._options import Options

# What convert_ sets as the attention implementation of Hugging Face configs.
CONVERTED = "nystrom-converted"

Pattern = str | type[nn.Module]
# What one layer gets: options that differ from those of the others, or None to leave it as it is.
LayerOptions = Mapping[str, Any] | None
OptionsFor = Mapping[Pattern, LayerOptions] | Callable[[nn.Module, str], LayerOptions]


def build(options: Mapping[str, Any]) -> Options:
    """Options that conversion can set. ValueError or TypeError for bad ones."""
    if "conv_kernel_size" in options:
        raise ValueError(
            f"convert_ keeps the state_dict keys, but conv_kernel_size={options['conv_kernel_size']} adds a parameter; "
            f"construct NystromMultiheadAttention(..., conv_kernel_size=...) instead"
        )
    return Options.of(options)


def own_options(modules: dict[str, nn.Module], name: str, options_for: OptionsFor | None) -> LayerOptions:
    """What ``options_for`` says of the module; {} where it says nothing."""
    if options_for is None:
        return {}
    if isinstance(options_for, Mapping):
        own = next((options for pattern, options in options_for.items() if matches(modules, name, pattern)), {})
    else:
        own = options_for(modules[name], name)
    if own is not None and not isinstance(own, Mapping):
        raise ValueError(
            f"options_for must give a dict of options, or None to leave the module as it is, got {own!r} for {name!r}; "
            f'for example {{"num_landmarks": 32}}'
        )
    return own


def check_used(modules: dict[str, nn.Module], found: Iterable[str], options_for: Mapping[Pattern, Any]) -> None:
    for pattern in options_for:
        if not any(matches(modules, name, pattern) for name in found):
            raise ValueError(
                f"options_for has {pattern!r}, which matches none of the attention modules {', '.join(found)}; correct "
                f"the pattern, or pass strict=False"
            )


def matches(modules: dict[str, nn.Module], name: str, patterns: Pattern | Sequence[Pattern]) -> bool:
    parts = name.split(".") if name else []
    around = [modules[".".join(parts[:i])] for i in range(len(parts) + 1)]  # the model ... the module itself
    for pattern in (patterns,) if isinstance(patterns, (str, type)) else patterns:
        if fnmatchcase(name, pattern) if isinstance(pattern, str) else any(isinstance(m, pattern) for m in around):
            return True
    return False
