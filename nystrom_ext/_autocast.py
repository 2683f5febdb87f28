"""`torch.autocast` for functions in Python, as the operator has it in C++: inputs are cast, what is computed is not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def cast_inputs(function: Function) -> Function:
    """Under autocast, casts the floating-point arguments, except float64 ones, and leaves autocast."""

    @functools.wraps(function)
    def call(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        kind = query.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(query, *args, **kwargs)
        dtype = torch.get_autocast_dtype(kind)

        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x

        with torch.autocast(kind, enabled=False):
            return function(*map(cast, (query, *args)), **{name: cast(x) for name, x in kwargs.items()})

    return call  # type: ignore[return-value]
