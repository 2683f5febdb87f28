"""Arguments of an operator by the names in its schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch._ops import OpOverload


def bind(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument, those left out at their defaults, as torch passes them to what intercepts an operator."""
    arguments = op._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments}
    names = [argument.name for argument in arguments]
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
