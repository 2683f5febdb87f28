"""The options that every form of Nyström attention shares."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

# Options that decide how a module or an integration calls the operator, which does not know them.
CALLERS = ("unsupported_mask", "self_attention", "need_weights", "unpad")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of :class:`NystromMultiheadAttention` that add no parameters. ValueError for a bad value."""

    num_landmarks: int = 64
    pinv_iterations: int = 6
    coefficient: str = "per_head"
    unsupported_mask: str = "error"
    window: int = 0
    pinned: int = 0
    self_attention: bool | None = None
    need_weights: str = "on_request"
    unpad: bool = False  # of nn.MultiheadAttention alone: the others' projections are not in our hands

    @property
    def attention(self) -> dict[str, Any]:
        """Those that :func:`nystrom_ext.nystrom_attention` takes as they are."""
        return {name: value for name, value in vars(self).items() if name not in CALLERS}

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Options:
        """TypeError for a name that is none of them."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise TypeError(f"there is no option {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
        return cls(**options)

    def __post_init__(self) -> None:
        for name, least, advice in (
            ("num_landmarks", 1, "the paper uses 64"),
            ("pinv_iterations", 0, "the paper uses 6"),
            ("window", 0, "0 is no window"),
            ("pinned", 0, "0 pins no tokens"),
        ):
            object.__setattr__(self, name, count(name, getattr(self, name), least, advice))
        if self.coefficient not in ("per_head", "global"):
            raise ValueError(
                f'coefficient must be "per_head" or "global", got {self.coefficient!r}; "per_head" keeps the samples '
                f'of a batch independent, "global" is what the paper\'s code does'
            )
        if self.unsupported_mask not in ("error", "exact"):
            raise ValueError(
                f'unsupported_mask must be "error" or "exact", got {self.unsupported_mask!r}; "error" raises, "exact" '
                f"computes exact attention for calls with attn_mask"
            )
        if not (self.self_attention is None or isinstance(self.self_attention, bool)):
            raise ValueError(
                f"self_attention must be None, True or False, got {self.self_attention!r}; True says that queries and "
                f"keys are the same tokens, None finds it out where one tensor is passed as both"
            )
        if not isinstance(self.unpad, bool):
            raise ValueError(f"unpad must be True or False, got {self.unpad!r}; True drops padded tokens")
        if self.need_weights not in ("on_request", "never"):
            raise ValueError(
                f'need_weights must be "on_request" or "never", got {self.need_weights!r}; "never" returns None '
                f"instead of the weights, whatever the caller asks for"
            )


def count(name: str, value: Any, least: int, advice: str) -> int:
    """``value`` as an int, NumPy's integers too. ValueError unless it is a number of at least ``least``."""
    try:
        number = None if isinstance(value, (bool, Tensor)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}; {advice}")
    return number
