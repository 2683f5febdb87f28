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


class Names:
    """The qualified names of a model's modules. A module that appears several times has several."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self._of: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            self._of.setdefault(id(module), []).append(name)

    def match(self, name: str, patterns: Pattern | Sequence[Pattern]) -> bool:
        """Whether a pattern matches any of the names of the module called ``name``."""
        return any(self._matches(other, p) for other in self._of[id(self.modules[name])] for p in listed(patterns))

    def _matches(self, name: str, pattern: Pattern) -> bool:
        if isinstance(pattern, str):
            return fnmatchcase(name, pattern)
        parts = name.split(".") if name else []
        around = [self.modules[".".join(parts[:i])] for i in range(len(parts) + 1)]  # the model ... the module itself
        return any(isinstance(module, pattern) for module in around)


def listed(patterns: Pattern | Sequence[Pattern]) -> Sequence[Pattern]:
    return (patterns,) if isinstance(patterns, (str, type)) else patterns


def own_options(names: Names, name: str, options_for: OptionsFor | None) -> LayerOptions:
    """What ``options_for`` says of the module; {} where it says nothing."""
    if options_for is None:
        return {}
    if isinstance(options_for, Mapping):
        own = next((options for pattern, options in options_for.items() if names.match(name, pattern)), {})
    else:
        own = options_for(names.modules[name], name)
    if own is not None and not isinstance(own, Mapping):
        raise ValueError(
            f"options_for must give a dict of options, or None to leave the module as it is, got {own!r} for {name!r}; "
            f'for example {{"num_landmarks": 32}}'
        )
    return own


def check_used(names: Names, found: Iterable[str], what: str, patterns: Iterable[Pattern]) -> None:
    """ValueError for a pattern that means no attention, as a typing error does."""
    found = list(found)
    for pattern in patterns:
        if found and not any(names.match(name, pattern) for name in found):
            raise ValueError(
                f"{what} has {pattern!r}, which matches none of the attention modules {', '.join(found)}; correct "
                f"the pattern, or pass strict=False"
            )
