"""Loads the operator library, which registers ``torch.ops.nystrom_ext.*``."""

from __future__ import annotations

from pathlib import Path

import torch

from . import _on_import
from ._version import __version__

# Where CMake finds the package `nystrom_ext` for C++ programs; torch.utils.cmake_prefix_path is needed beside it.
cmake_prefix_path = str(Path(__file__).parent / "share" / "cmake")


def _load() -> None:
    library = Path(__file__).with_name("libnystrom.so")
    if not library.exists():
        raise ImportError(
            f"nystrom_ext: {library} is missing, so the package was not built; run "
            "`pip install --no-build-isolation .` in the repository, in an environment that has torch"
        )
    advice = "rebuild it with `pip install --no-build-isolation --force-reinstall .` in the repository"
    try:
        from . import _C

        built = str(_C.build_info()["torch"])
        if _minor(built) == _minor(torch.__version__):
            torch.ops.load_library(str(library))
    except (ImportError, OSError) as error:
        raise ImportError(
            f"nystrom_ext: {library} does not load into torch {torch.__version__}, probably because it was built for "
            f"another one; {advice} ({error})"
        ) from error
    if _minor(built) != _minor(torch.__version__):  # it might load all the same, and crash in the first call
        raise ImportError(
            f"nystrom_ext was built for torch {built}, this is torch {torch.__version__}, and torch's C++ interface "
            f"changes with each minor version; {advice}"
        )


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


_load()
_on_import.register("torch.utils.flop_counter", "nystrom_ext._flops")
_on_import.register("torch.distributed.tensor", "nystrom_ext._dtensor")


def build_info() -> dict[str, object]:
    """Versions the extension was built with, CUDA architectures (None: CPU only), and the CPU capability in use."""
    from . import _C

    info = _C.build_info()
    return {**info, "version": __version__, "cpu_capability": torch.ops.nystrom_ext._cpu_capability()}
