"""Warnings that are given once."""

from __future__ import annotations

import warnings

import torch
from torch.utils.weak import WeakIdKeyDictionary

# What each owner has been warned of. Kept here and not on the owner, whose copies and pickles need not know of it.
_given = WeakIdKeyDictionary()


def warn_once(owner: object, message: str, stacklevel: int = 2) -> None:
    """Warn with ``message`` the first time that ``owner``, such as a module, gives it.

    Not while compiling, where a warning would break the graph. ``stacklevel`` as for :func:`warnings.warn`, counted
    from the caller: 1 is the line that calls this function.
    """
    if torch.compiler.is_compiling():
        return
    given = _given.setdefault(owner, set())
    if message not in given:
        given.add(message)
        warnings.warn(message, stacklevel=stacklevel + 1)
