"""The options that every form of Nyström attention shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of :class:`NystromMultiheadAttention` that add no parameters. ValueError for a bad value."""

    num_landmarks: int = 64
    pinv_iterations: int = 6
    coefficient: str = "per_head"
    unsupported_mask: str = "error"
    window: int = 0
    pinned: int = 0

    @property
    def attention(self) -> dict[str, Any]:
        """Those that :func:`nystrom_ext.nystrom_attention` takes."""
        return {name: value for name, value in vars(self).items() if name != "unsupported_mask"}

    def __post_init__(self) -> None:
        check_count("num_landmarks", self.num_landmarks, 1, "the paper uses 64")
        check_count("pinv_iterations", self.pinv_iterations, 0, "the paper uses 6")
        check_count("window", self.window, 0, "0 is no window")
        check_count("pinned", self.pinned, 0, "0 pins no tokens")
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


def check_count(name: str, value: Any, least: int, advice: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}; {advice}")
