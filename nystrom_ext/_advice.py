"""What to do about attention that conversion does not know."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import nn

_IN_FORWARD = (
    "call nystrom_ext.nystrom_attention(q, k, v) in its forward, where that is softmax(q k^T) v without position "
    "biases, causal masks or other use of the scores"
)
_BIASED = "may add position biases to its scores, which landmarks cannot honour; leave it exact"
_NYSTROM = (
    "is Nyström attention itself; nystrom_ext.compat.attention(name, q, k, v, mask) in its forward computes what known "
    "implementations compute"
)


def unknown_attention(modules: Mapping[str, nn.Module], known: Collection[str] = ()) -> str:
    """The classes in ``modules``, qualified name -> module, that are called attention, and what to do about each.

    A class appears once, with the first of its names; around other attention, only the inner modules count. ``known``
    are names of attention that has been dealt with. "" where there is nothing to tell.
    """
    named = [name for name, module in modules.items() if name not in known and _is_called_attention(type(module))]
    parents = {name[: dot.start()] for name in {*named, *known} for dot in re.finditer(r"\.", name)}
    parents |= {""} if {*named, *known} - {""} else set()
    classes: dict[type[nn.Module], list[str]] = {}
    for name in named:
        if name not in parents:
            classes.setdefault(type(modules[name]), []).append(name)
    rows = []
    for cls, (first, *more) in classes.items():
        where = (first or "(the model itself)") + (f" and {len(more)} more" if more else "")
        rows.append(f"\n  {where}: {cls.__module__}.{cls.__qualname__}: {_advice(cls)}")
    return f"convert_ does not know these classes:{''.join(rows)}" if rows else ""


def _is_called_attention(cls: type[nn.Module]) -> bool:
    ours = cls.__module__.partition(".")[0] == __package__
    return not ours and bool(re.search("attention|attn", cls.__name__, re.IGNORECASE))


def _advice(cls: type[nn.Module]) -> str:
    if "nystrom" in cls.__name__.replace("ö", "o").lower():
        return _NYSTROM
    code = getattr(cls.forward, "__code__", None)
    names = () if code is None else (*code.co_names, *code.co_varnames)
    return (
        _BIASED
        if any(re.search("rel_?pos|relative|pos\\w*_bias|alibi|(^|_)i?rpe", name) for name in names)
        else _IN_FORWARD
    )
