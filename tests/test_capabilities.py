"""Every instruction set that this processor has, and what the choice reports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nystrom_ext

HAS = {"default": True, "avx2": torch.cpu._is_avx2_supported(), "avx512": torch.cpu._is_avx512_supported()}
CAPABILITIES = [name for name, has in HAS.items() if has]

SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import nystrom_ext
from test_operator import PROBLEMS, REGIMES
from problems import Problem, check
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for problem in PROBLEMS.values():
        check(problem, dtype)
    for regime in REGIMES.values():
        check(Problem(B=1, H=1, L=300, m=32, d=48), dtype, regime)
print(nystrom_ext.build_info()["cpu_capability"])
"""


def run(capability: str, script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NYSTROM_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_problem_on_every_instruction_set(capability: str) -> None:
    result = run(capability, SCRIPT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == capability


def test_unknown_capability_is_refused() -> None:
    result = run("sse9", "import nystrom_ext; nystrom_ext.build_info()")
    assert result.returncode == 1
    assert "NYSTROM_CPU_CAPABILITY=sse9: this build or processor does not have it" in result.stderr


def test_build_info() -> None:
    info = nystrom_ext.build_info()
    assert info["version"] == nystrom_ext.__version__
    assert info["cpu_capability"] in CAPABILITIES
    assert str(info["torch"]).split(".")[:2] == torch.__version__.split(".")[:2]


def test_library_has_no_python_symbols() -> None:
    library = Path(nystrom_ext.__file__).with_name("libnystrom.so")
    command = ["nm", "-D", "--undefined-only", library]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in symbols if name.startswith(("Py", "_Py"))]


def test_kernels_share_no_inline_functions_across_instruction_sets(tmp_path: Path) -> None:
    """The linker merges weak symbols: one compiled for AVX-512 could then run on a processor without it."""
    source, target = Path(__file__).parents[1] / "csrc/cpu/kernels.cpp", tmp_path / "kernels.o"
    flags = ["-std=c++17", "-O3", "-fPIC", "-Wno-psabi", "-DNYSTROM_CAPABILITY=kernels_test"]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, "-c", source, "-o", target], check=True, capture_output=True)
    symbols = subprocess.run(["nm", target], capture_output=True, text=True, check=True).stdout.splitlines()
    assert any("kernels_test" in line for line in symbols)
    assert not [line for line in symbols if line.split()[-2] in ("W", "V", "u")]
