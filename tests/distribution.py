"""``python -m tests.distribution FOLDER``: what the source distribution and the wheel in FOLDER hold, and link to."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Beside Python files; everything else in a wheel is a mistake.
SHIPPED = {
    "nystrom_ext/libnystrom.so", "nystrom_ext/_C.so", "nystrom_ext/_C.pyi", "nystrom_ext/py.typed",
    "nystrom_ext/include/nystrom_ext/nystrom.h", "nystrom_ext/share/cmake/nystrom_ext/nystrom_extConfig.cmake",
}  # fmt: skip
# torch's own libraries, which its package brings; the rest is the system's, on auditwheel's list.
TORCH = {"libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libtorch_python.so", "libc10.so", "libc10_cuda.so"}
CUDA = re.compile(r"libcudart\.so\.\d+")


def main(folder: Path) -> int:
    """The exit status: 1 when something is missing or too much."""
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    wrong = [*check_source(source), *check_wheel(wheel), *check_links(wheel)]
    for line in wrong:
        print("error:", line)
    print(f"{source.name} and {wheel.name}: {f'{len(wrong)} mistakes' if wrong else 'complete, and nothing else'}")
    return 1 if wrong else 0


def check_source(archive: Path) -> list[str]:
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    listing = subprocess.run(["git", "ls-files", "csrc", "nystrom_ext"], cwd=ROOT, capture_output=True, text=True)
    needed = {*listing.stdout.split(), "setup.py", "pyproject.toml", "LICENSE", "README.md"}
    wrong = [f"{archive.name} lacks {name}" for name in sorted(needed - names)]
    return wrong + [
        f"{archive.name} holds {name}" for name in sorted(names) if name.startswith(("tests", "benchmarks"))
    ]


def check_wheel(archive: Path) -> list[str]:
    with zipfile.ZipFile(archive) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
        (metadata,) = (file.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "nystrom_ext").rglob("*.py")}
    information = {name for name in names if re.fullmatch(r"nystrom_ext-[^/]*\.dist-info/.*", name)}
    wrong = [f"{archive.name} lacks {name}" for name in sorted((SHIPPED | modules) - names)]
    wrong += [f"{archive.name} holds {name}" for name in sorted(names - SHIPPED - modules - information)]
    if not any(name.endswith("LICENSE") for name in information):
        wrong.append(f"{archive.name} lacks the licence")
    if "License-Expression: MIT" not in metadata or "Requires-Dist: torch" not in metadata:
        wrong.append(f"{archive.name}: the metadata must name the licence and torch")
    return wrong


def check_links(archive: Path) -> list[str]:
    """No library but torch's and those that every Linux has, as auditwheel knows them; no path of this machine."""
    shown = subprocess.run([sys.executable, "-m", "auditwheel", "show", str(archive)], capture_output=True, text=True)
    if shown.returncode or "manylinux" not in shown.stdout:
        return [f"auditwheel show fails: {(shown.stderr or shown.stdout).strip()}"]
    wrong = []
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archive) as file:
        for name in ("nystrom_ext/libnystrom.so", "nystrom_ext/_C.so"):
            dynamic = subprocess.run(["readelf", "-d", file.extract(name, folder)], capture_output=True, text=True)
            needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic.stdout))
            system = {x for x in needed if re.match(r"lib(stdc\+\+|m|gcc_s|c|gomp|pthread|dl|rt)\.so\.|ld-linux", x)}
            foreign = {x for x in needed - system - TORCH if not CUDA.fullmatch(x)}
            wrong += [f"{name} needs {x}" for x in sorted(foreign)]
            paths = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.+)\]", dynamic.stdout)
            wrong += [f"{name} searches {path}" for path in paths if not path.startswith("$ORIGIN")]
    return wrong


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
