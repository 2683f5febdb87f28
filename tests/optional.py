"""Imports of optional packages that need help."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

_signatures: list[torch.library.Library] = []  # they vanish with their library


def import_timm() -> Any:
    """timm needs torchvision, whose wheels are built for CUDA: beside a torch without CUDA their operators do not load,
    and the import ends at the first one missing. Nothing here calls them, their signatures are enough."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _signatures.append(library)
    except ImportError:
        pass
    return pytest.importorskip("timm", reason="timm is tested by `make test-timm`, outside the main environment")
