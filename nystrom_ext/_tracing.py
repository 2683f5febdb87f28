"""What `torch.jit.script` and `torch.fx` find in our modules instead of a ``forward`` that they cannot read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn
from torch.fx import Proxy


def refuse_script(module: nn.Module) -> NoReturn:
    """As a class's ``__prepare_scriptable__`` it runs first, also where `torch.jit.script` is given a model around it:
    the compiler's own error is about a line of our source."""
    name = type(module).__name__
    raise NotImplementedError(
        f"torch.jit.script does not support {name}; use torch.export.export or torch.compile, or script the stock "
        f"model, after nystrom_ext.revert_(model) if it was converted"
    )


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
