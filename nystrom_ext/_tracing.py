"""What `torch.jit.script` and `torch.fx` find in our modules instead of a ``forward`` that they cannot read."""

from __future__ import annotations

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


def is_traced(module: nn.Module, x: Any) -> bool:
    """Whether `torch.fx` is tracing a model around ``module``, which then answers with :func:`leaf`."""
    return isinstance(x, Proxy) and getattr(x.tracer, "root", module) is not module


def leaf(module: nn.Module, x: Proxy, *args: Any, **kwargs: Any) -> Proxy:
    """The call of ``module`` as one node of the graph, as tracers treat the modules of `torch.nn`: ``forward`` chooses
    by the number of tokens, which a proxy does not have."""
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x, *args), kwargs)
