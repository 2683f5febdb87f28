"""``python -m tests.cuda.compile [sm_90 ...]``: every CUDA kernel, every architecture, within budgets; needs no GPU.

Prints what each kernel takes. Exit status 1 and a line per violation when a kernel spills registers (in float64 more
than DOUBLE_SPILLS bytes), takes more than REGISTERS of them, or when an architecture takes more than SECONDS.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
REGISTERS = 255  # per thread
DOUBLE_SPILLS = 384  # bytes: tiles are cut for 32-bit sums, and nobody trains in float64
SECONDS = 600  # of CPU time per architecture: five minutes on two cores, whatever else runs there

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
PROPERTIES = re.compile(r"Function properties for (\S+)")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass
class Function:
    """What ptxas says of a kernel, or of a device function that was not inlined."""

    name: str
    architecture: str
    registers: int = 0
    shared: int = 0  # bytes, static
    stack: int = 0  # bytes
    spills: int = 0  # bytes, stored and loaded

    def violations(self) -> list[str]:
        found = []
        allowed = DOUBLE_SPILLS if "double" in self.name else 0
        if self.spills > allowed:
            found.append(
                f"{self.name} for {self.architecture} spills registers: {self.spills} bytes, allowed {allowed}"
            )
        if self.registers > REGISTERS:
            found.append(f"{self.name} for {self.architecture} takes {self.registers} registers, allowed {REGISTERS}")
        return found


def compiler_time() -> float:
    """CPU seconds of the processes that have ended."""
    return sum(os.times()[2:4])


def parse(log: str, architecture: str) -> list[Function]:
    """The functions in what ptxas -v wrote for one architecture; names as the compiler mangled them."""
    functions: dict[str, Function] = {}
    kernel = current = Function("", architecture)
    for line in log.splitlines():
        if found := ENTRY.search(line):
            kernel = functions.setdefault(found[1], Function(found[1], architecture))
        elif found := PROPERTIES.search(line):
            current = functions.setdefault(found[1], Function(found[1], architecture))
        elif found := STACK.search(line):
            current.stack, current.spills = int(found[1]), int(found[2]) + int(found[3])
        elif found := USED.search(line):
            kernel.registers = int(found[1])
            kernel.shared = int(shared[1]) if (shared := SHARED.search(line)) else 0
    return list(functions.values())


def short(name: str) -> str:
    """A demangled name without the return type, the project's namespaces and the parameters."""
    name = re.sub(r"^void |nystrom_ext::|cuda::|\(anonymous namespace\)::", "", name)
    name = name.replace("__nv_bfloat16", "bf16").replace("__half", "half").replace("> >", ">>")
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:i]
    return name


def demangle(functions: list[Function]) -> None:
    names = "\n".join(function.name for function in functions)
    demangled = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout
    for function, name in zip(functions, demangled.splitlines(), strict=True):
        function.name = short(name)


def compile_one(nvcc: str, source: Path, architecture: str) -> list[Function]:
    """Device code alone, with the flags of the build. Prints warnings; an error ends the program."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-cubin", "-O3", "-std=c++17", *COMMON_NVCC_FLAGS, "-Xptxas=-v", f"-arch={architecture}"]
        done = subprocess.run([*command, "-o", f"{folder}/out.cubin", str(source)], capture_output=True, text=True)
    remarks = [line for line in done.stderr.splitlines() if not (line.startswith("ptxas info") or STACK.search(line))]
    if done.returncode:
        print(*remarks, sep="\n")
        raise SystemExit(f"violation: {source.relative_to(SOURCES)} does not compile for {architecture}")
    if remarks:
        print(*remarks, sep="\n")
    return parse(done.stderr, architecture)


def table(functions: Iterable[Function], architectures: list[str]) -> list[str]:
    """One line per function: registers by architecture, then the largest static shared memory and stack frame."""
    rows: dict[str, dict[str, Function]] = {}
    for function in functions:
        rows.setdefault(function.name, {})[function.architecture] = function
    width = max(map(len, rows), default=0)
    lines = [f"{'registers':{width}}" + "".join(f"{a:>8}" for a in architectures) + "  shared   stack"]
    for name, row in sorted(rows.items()):
        registers = "".join(f"{row[a].registers if a in row else '':>8}" for a in architectures)
        largest = (max(getattr(f, key) for f in row.values()) for key in ("shared", "stack"))
        lines.append(f"{name:{width}}{registers}" + "".join(f"{value:8}" for value in largest))
    return lines


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.cuda.compile", description=__doc__)
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, help=f"default: {' '.join(ARCHITECTURES)}")
    wanted = parser.parse_args(argv).architectures
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    if nvcc is None:
        print("not run: the CUDA kernels were not compiled, there is no nvcc on PATH or in CUDA_HOME")
        return 0
    sources = sorted(SOURCES.rglob("*.cu"))
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    architectures = [name for name in wanted if name in known]
    functions, violations = [], [] if sources else [f"there is no .cu file in {SOURCES}"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for architecture in architectures:
            before = compiler_time()
            for found in pool.map(compile_one, repeat(nvcc), sources, repeat(architecture)):
                functions += found
            seconds = compiler_time() - before
            print(f"{architecture}: {len(sources)} files in {seconds:.0f} s of CPU time", flush=True)
            if seconds > SECONDS:
                violations.append(f"{architecture} takes {seconds:.0f} s of CPU time to compile, allowed {SECONDS}")
    demangle(functions)
    print(*table(functions, architectures), sep="\n")
    violations += [line for function in functions for line in function.violations()]
    for line in dict.fromkeys(violations):  # several files may hold the same kernel
        print("violation:", line)
    if unknown := [name for name in wanted if name not in known]:
        print(f"not run: this nvcc does not know {' '.join(unknown)}")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
