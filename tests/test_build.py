"""Building and loading: CUDA or not, what ptxas says of the kernels, a library that does not fit, the self-test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nystrom_ext
from nystrom_ext import __main__ as program
from tests.cuda.compile import Function, parse, short, table

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5stackPfi' for 'sm_90'
ptxas info    : Function properties for _Z5stackPfi
    256 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 31 registers, used 1 barriers, 256 bytes cumulative stack size, 132 bytes smem
ptxas info    : Compile time = 13.386 ms
ptxas info    : Function properties for _Z6helperPfi
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function '_Z6spillsPfi' for 'sm_90'
ptxas info    : Function properties for _Z6spillsPfi
    408 bytes stack frame, 752 bytes spill stores, 764 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 408 bytes cumulative stack size
"""


def test_force_cuda_that_cannot_be_followed() -> None:
    environment = {**os.environ, "FORCE_CUDA": "1", "BUILD_NO_CUDA": "1"}
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "nystrom_ext: FORCE_CUDA=1 needs nvcc and a CUDA build of torch, but BUILD_NO_CUDA=1; change that, or unset "
        "FORCE_CUDA to build for the CPU alone"
    )


def test_what_ptxas_says() -> None:
    functions = parse(LOG, "sm_90")
    assert functions == [
        Function("_Z5stackPfi", "sm_90", registers=31, shared=132, stack=256),
        Function("_Z6helperPfi", "sm_90", spills=12),
        Function("_Z6spillsPfi", "sm_90", registers=64, stack=408, spills=1516),
    ]
    assert [function.violations() for function in functions] == [
        [],
        ["_Z6helperPfi for sm_90 spills registers: 12 bytes, allowed 0"],
        ["_Z6spillsPfi for sm_90 spills registers: 1516 bytes, allowed 0"],
    ]
    lines = table([*functions, Function("_Z5stackPfi", "sm_80", registers=30)], ["sm_80", "sm_90"])
    assert lines[1].split() == ["_Z5stackPfi", "30", "31", "132", "256"]


def test_short_names() -> None:
    name = "void nystrom_ext::cuda::pass<nystrom_ext::cuda::Engine<__half, (int)64> >(nystrom_ext::Forward, int)"
    assert short(name) == "pass<Engine<half, (int)64>>"
    assert short("nystrom_ext::cuda::(anonymous namespace)::plan(int const*)") == "plan"


PACKAGE = Path(nystrom_ext.__file__).parent


def load(folder: Path, first: str = "") -> str:
    """What importing the package from ``folder`` prints after the statements ``first``."""
    command = [sys.executable, "-c", f"{first}\nimport nystrom_ext\nprint('loaded', nystrom_ext.__file__)"]
    ran = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True
    )
    return (ran.stdout + ran.stderr).strip()


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "nystrom_ext", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_package_loads_without_its_source_tree(copied: Path) -> None:
    assert load(copied).startswith(f"loaded {copied}")


def test_another_torch_is_refused(copied: Path) -> None:
    """By the minor version, with which torch's C++ interface changes; a patch release is fine."""
    release = torch.__version__.split("+")[0].split(".")
    minor = ".".join([release[0], str(int(release[1]) + 1), "0"])
    message = load(copied, f"import torch; torch.__version__ = '{minor}+cpu'")
    assert f"ImportError: nystrom_ext was built for torch {'.'.join(release)}, this is torch {minor}+cpu" in message
    assert "--no-build-isolation" in message
    patch = ".".join([*release[:2], str(int(release[2]) + 1)])
    assert load(copied, f"import torch; torch.__version__ = '{patch}'").startswith("loaded")


def test_missing_and_damaged_libraries_are_named(copied: Path) -> None:
    library = copied / "nystrom_ext" / "libnystrom.so"
    library.write_bytes(b"no library")
    assert f"ImportError: nystrom_ext: {library} does not load into torch" in load(copied)
    library.unlink()
    assert f"ImportError: nystrom_ext: {library} is missing, so the package was not built; run" in load(copied)


def test_self_test(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert program.main() == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("version: ") and shown[-1] == "self-test passed"
    assert sum(line.startswith("cpu, ") for line in shown) == 12
    monkeypatch.setattr(
        program, "nystrom_attention", lambda *x, **more: 1.1 * nystrom_ext.nystrom_attention(*x, **more)
    )
    assert program.main() == 1
    assert sum("WRONG" in line for line in capsys.readouterr().out.splitlines()) == 12
