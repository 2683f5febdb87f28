"""Models as their users hand them over, and what a sample batch tells that their modules do not."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ._attention import same_tensor


def check_model(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function} takes an nn.Module, got {type(model).__name__} {model!r:.80}; pass the model itself, as "
            f"AutoModel.from_pretrained(name) or pipeline.model give it"
        )


def call(model: nn.Module, batch: Any) -> Any:
    """``model`` on a dict of keyword arguments, a tuple or list of positional ones, or its only argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def self_attention_in(model: nn.Module, names: list[str], batch: Any) -> list[str]:
    """Those of the `nn.MultiheadAttention` named whose queries and keys are equal in every call that ``batch`` causes,
    but not always one tensor, which needs no telling."""
    equal: dict[str, list[bool]] = {name: [] for name in names}
    apart: set[str] = set()

    def watch(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
        query, key = given["query"], given["key"]
        if not same_tensor(query, key):
            apart.add(name)
            equal[name].append(torch.equal(query.nan_to_num(), key.nan_to_num()))  # padding may be NaN

    modules = dict(model.named_modules())
    names = [name for name in names if isinstance(modules[name], nn.MultiheadAttention)]
    if not names:
        return []
    hooks = [
        modules[name].register_forward_pre_hook(functools.partial(watch, name), with_kwargs=True) for name in names
    ]
    try:
        with torch.no_grad(), evaluating(model), torch.compiler.set_stance("force_eager"):
            call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in names if name in apart and all(equal[name])]
