"""Whether setup.py builds CUDA kernels, and how the compile check of tests/cuda reads what ptxas says of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
