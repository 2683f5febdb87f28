"""Modules of ours in graphs of torch.fx."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.fx import Proxy


def fx_leaf(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a module a leaf of `torch.fx` graphs, as torch.fx makes those of `torch.nn` itself, by their name: what
    ``forward`` does depends on the length, which tracing does not know."""

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        tracer: Any = next((x.tracer for x in (*args, *kwargs.values()) if isinstance(x, Proxy)), None)
        path = "" if tracer is None else tracer.path_of_module(self)
        if tracer is None or not path:  # a root cannot be a leaf: torch.fx says what it cannot trace
            return forward(self, *args, **kwargs)
        return tracer.create_proxy("call_module", path, args, kwargs)

    return call
