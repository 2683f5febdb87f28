"""Compiles CUDA kernels for the emulator: g++, the headers of the CUDA toolkit, and no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
CXX = os.environ.get("CXX", "g++")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# mode: flags for the emulator, for kernels, for linking.
MODES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "plain": ([], [], []),
    "ucontext": (["-DSIMT_UCONTEXT"], [], []),
    "race": (["-DSIMT_RACE"], ["-DSIMT_RACE", "-fsanitize=thread"], []),
    "asan": (SANITIZE, SANITIZE, SANITIZE),
}
OPTIONS = ["-std=c++17", "-O2", "-g", "-fPIC"]


def cuda_headers() -> Path | None:
    """The toolkit's include folder."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parents[1] if nvcc else None, "/usr/local/cuda"]
    folders = [Path(home) / "include" for home in homes if home]
    return next((folder for folder in folders if (folder / "vector_types.h").exists()), None)


def run(*command: str | Path) -> None:
    """Runs a compiler; what it says goes into the exception."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def sanitizer_environment() -> dict[str, str]:
    """For a process that loads a library of mode "asan". Without libstdc++ a C++ exception would end it."""
    names = ("libasan.so", "libstdc++.so.6")
    found = [
        subprocess.run([CXX, f"-print-file-name={n}"], capture_output=True, text=True).stdout.strip() for n in names
    ]
    return {**os.environ, "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}


def compile_objects(sources: Iterable[Path], flags: Sequence[str], folder: Path) -> list[Path]:
    """An object file in the folder for each source."""
    objects = []
    for source in sources:
        objects.append(folder / f"{source.stem}.o")
        include = ["-I", str(FOLDER), "-isystem", str(cuda_headers())]
        run(CXX, *OPTIONS, *flags, *include, "-x", "c++", "-c", source, "-o", objects[-1])
    return objects


def build(mode: str, kernels: Iterable[Path], folder: Path) -> tuple[Path, Path]:
    """A program and a shared library of the kernels' sources, one of which has `main`, and the emulator."""
    for_emulator, for_kernels, for_linking = MODES[mode]
    folder.mkdir(parents=True, exist_ok=True)
    objects = compile_objects(sorted(FOLDER.glob("*.cpp")), for_emulator, folder)
    objects += compile_objects(kernels, for_kernels, folder)
    program, library = folder / "program", folder / "library.so"
    run(CXX, *objects, *for_linking, "-o", program)
    run(CXX, "-shared", "-Wl,-Bsymbolic", *objects, *for_linking, "-o", library)
    return program, library
