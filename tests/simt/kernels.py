"""Builds the CUDA backend with its kernels in the emulator: a library that sends the operator's CPU tensors there.

PYTHONPATH=tests python -m simt.kernels plain      # or race, asan, ucontext; prints the library's path
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from simt import build
from torch.utils import cpp_extension

ROOT = build.FOLDER.parents[1]
KERNELS = ROOT / "csrc" / "cuda"
PACKAGE = ROOT / "nystrom_ext"
JOBS = 2


def newest(*folders: Path) -> float:
    """When a header below the folders last changed."""
    return max(p.stat().st_mtime for folder in folders for p in folder.rglob("*.*h"))


def build_backend(mode: str, folder: Path) -> Path:
    """The library, up to date; objects that are newer than every header and their source are kept."""
    for_emulator, for_kernels, for_linking = build.MODES[mode]
    folder.mkdir(parents=True, exist_ok=True)
    headers = newest(ROOT / "csrc", build.FOLDER)
    include = ["-I", str(build.FOLDER), "-isystem", str(build.cuda_headers())]
    torch_flags = [f"-isystem{p}" for p in cpp_extension.include_paths()]
    jobs = [(source, for_emulator, []) for source in sorted(build.FOLDER.glob("*.cpp"))]
    jobs += [(source, for_kernels, []) for source in sorted(KERNELS.glob("instances/*.cu"))]
    jobs += [(KERNELS / "dispatch.cpp", [], [])]
    jobs += [(build.FOLDER / "backend" / "backend.cpp", [], ["-std=c++20", "-Wno-extra", *torch_flags])]

    def compiled(job: tuple[Path, list[str], list[str]]) -> Path:
        source, flags, more = job
        object_file = folder / f"{source.stem}.o"
        if not object_file.exists() or object_file.stat().st_mtime < max(headers, source.stat().st_mtime):
            options = [*build.OPTIONS, "-fvisibility=hidden", *flags, *more, *include]
            build.run(build.CXX, *options, "-x", "c++", "-c", source, "-o", object_file)
        return object_file

    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compiled, jobs))
    library = folder / "library.so"
    libraries = [f"-L{p}" for p in cpp_extension.library_paths()] + [f"-L{PACKAGE}", f"-Wl,-rpath,{PACKAGE}"]
    linked = ["-ltorch_cpu", "-lc10", "-l:libnystrom.so"]
    build.run(build.CXX, "-shared", "-Wl,-Bsymbolic", *objects, *for_linking, *libraries, *linked, "-o", library)
    return library


if __name__ == "__main__":
    mode = sys.argv[1] if len(sys.argv) > 1 else "plain"
    if mode not in build.MODES:
        sys.exit(f"simt: the mode must be one of {', '.join(build.MODES)}, got {mode!r}")
    torch.set_num_threads(1)
    print(build_backend(mode, ROOT / "build" / "simt" / mode))
