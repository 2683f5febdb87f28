"""Registrations with parts of torch that few programs use and that take long to import: `torch.distributed.tensor` half
as long as torch itself, `torch.utils.flop_counter` as long as Triton where there is one.

They are made when somebody else imports the part, be it before or after this package.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch


class _Registrar(MetaPathFinder):
    """Finds nothing itself: it has the part found by the others and imports ours when the part is complete."""

    def __init__(self, part: str, ours: str) -> None:
        self.part, self.ours = part, ours

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.part:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            complete = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                complete(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self.register()

            loader.exec_module = exec_module
        return spec

    def register(self) -> None:
        """A warning, as an error would be that of the program's own import."""
        try:
            importlib.import_module(self.ours)
        except Exception as error:
            warnings.warn(
                f"nystrom_ext: its operators are unknown to {self.part} of torch {torch.__version__}, whose interface "
                f"has changed ({type(error).__name__}: {error}); all else works",
                stacklevel=2,
            )


def register(part: str, ours: str) -> None:
    """Import our module ``ours`` as soon as ``part`` of torch has been imported, which may be now."""
    registrar = _Registrar(part, ours)
    if part in sys.modules:
        registrar.register()
    else:
        sys.meta_path.insert(0, registrar)
