"""Warnings that are given once, at the line of the user's that caused them."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

_given: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()

# Frames that say nothing: ours, and those by which nn.Module comes to a forward.
_OURS = tuple(str(path) for path in (Path(__file__).parent, Path(torch.__file__).parent / "nn"))


def warn_once(owner: object, message: str) -> None:
    """One warning per owner and message; none while compiling, where it would break the graph. What was given belongs
    to the object and not to its attributes, so that a copy or a pickle of it warns anew."""
    if torch.compiler.is_compiling():
        return
    given = _given.setdefault(owner, set())
    if message in given:
        return
    level, frame = 1, sys._getframe()
    while frame.f_code.co_filename.startswith(_OURS) and frame.f_back:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
    given.add(message)  # last: where a warning is an error, the next call raises it again
