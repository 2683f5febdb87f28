"""Builds two shared objects: libnystrom.so, the operators without Python symbols, and _C, a small pybind11 module.

The CPU kernels are one source compiled once per instruction set; the library chooses at run time. CUDA kernels are
built where nvcc and a CUDA build of torch are found: FORCE_CUDA=1 makes an error of their absence, BUILD_NO_CUDA=1
leaves the kernels out, TORCH_CUDA_ARCH_LIST names the architectures.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
VERSION = runpy.run_path(str(ROOT / "nystrom_ext" / "_version.py"))["__version__"]
CXX = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
NVCC = ["-O3", "-Xcompiler=-fvisibility=hidden"]
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # where neither the variable nor a GPU says which

# capability: vector bytes, flags
CAPABILITIES = {"default": (16, [])}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    CAPABILITIES["avx2"] = (32, avx2)
    CAPABILITIES["avx512"] = (64, [*avx2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"])


def switched_on(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def why_no_cuda() -> str | None:
    """The reason to build without CUDA, or None."""
    if switched_on("BUILD_NO_CUDA"):
        return f"BUILD_NO_CUDA={os.environ['BUILD_NO_CUDA']}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if shutil.which("nvcc", path=f"{cpp_extension.CUDA_HOME}/bin") is None:
        return f"there is no nvcc on PATH or in CUDA_HOME={cpp_extension.CUDA_HOME}"
    return None


def ask_nvcc(*options: str) -> str:
    command = [f"{cpp_extension.CUDA_HOME}/bin/nvcc", *options]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def correct_cuda_home() -> None:
    """torch takes the folder above that of the nvcc on PATH, which may be a script or a link: nvcc knows better."""
    if not Path(cpp_extension.CUDA_HOME, "include/cuda_runtime.h").exists():
        if top := re.search(r"^#\$ TOP=(.+)$", ask_nvcc("--dryrun", "-x", "cu", os.devnull), re.MULTILINE):
            cpp_extension.CUDA_HOME = os.path.realpath(top[1])


def cuda_targets() -> str:
    """What nvcc compiles for, as in sm_90 compute_90; the latter is PTX for later GPUs."""
    correct_cuda_home()
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and torch.cuda.device_count() == 0:
        known = ask_nvcc("--list-gpu-arch").split()
        chosen = [name for name in ARCHITECTURES if "compute_" + name.replace(".", "") in known]
        os.environ["TORCH_CUDA_ARCH_LIST"] = " ".join(chosen) + "+PTX"
    targets = {flag.rpartition("code=")[2] for flag in cpp_extension._get_cuda_arch_flags()}
    return " ".join(sorted(targets, key=lambda name: (name.startswith("compute"), int(re.sub(r"\D", "", name)))))


NO_CUDA = why_no_cuda()
if NO_CUDA and switched_on("FORCE_CUDA"):
    raise SystemExit(
        f"nystrom_ext: FORCE_CUDA={os.environ['FORCE_CUDA']} needs nvcc and a CUDA build of torch, but {NO_CUDA}; "
        "change that, or unset FORCE_CUDA to build for the CPU alone"
    )
CUDA = None if NO_CUDA else cuda_targets()


class Build(BuildExtension):
    """Compiles the kernels per instruction set with the plain compiler, before BuildExtension swaps in ninja."""

    def build_extensions(self) -> None:
        cuda = f"{torch.version.cuda} for {CUDA}" if CUDA else f"not built, {NO_CUDA}"
        print(f"nystrom_ext {VERSION}: CPU kernels for {', '.join(CAPABILITIES)}; CUDA: {cuda}")
        self.force = True  # what is linked depends on the torch found and on variables; ninja knows what to recompile
        library = self.extensions[0]
        for name, (vector_bytes, flags) in CAPABILITIES.items():
            library.extra_objects += self.compiler.compile(
                ["csrc/cpu/kernels.cpp"],
                output_dir=f"{self.build_temp}/{name}",
                macros=[("NYSTROM_CAPABILITY", f"kernels_{name}"), ("NYSTROM_VECTOR_BYTES", str(vector_bytes))],
                extra_postargs=["-std=c++17", *CXX, *flags],
                depends=library.depends,
            )
        super().build_extensions()

    def run(self) -> None:
        """Puts the C++ API's header beside the library, where nystrom_extConfig.cmake expects it."""
        super().run()
        package = Path(self.get_ext_fullpath("nystrom_ext.libnystrom")).parent
        self.mkpath(str(package / "include" / "nystrom_ext"))
        self.copy_file("csrc/nystrom.h", str(package / "include" / "nystrom_ext" / "nystrom.h"))


def files(*patterns: str) -> list[str]:
    found = (path for pattern in patterns for path in (ROOT / "csrc").glob(pattern))
    left_out = {"kernels.cpp"} if CUDA else {"kernels.cpp", "cuda.cpp"}
    return sorted(str(path.relative_to(ROOT)) for path in found if path.name not in left_out)


setup(
    ext_modules=[
        (CUDAExtension if CUDA else CppExtension)(
            "nystrom_ext.libnystrom",
            files("ops/*.cpp", "cpu/*.cpp", *(["cuda/*.cpp", "cuda/instances/*.cu"] if CUDA else [])),
            depends=files("**/*.h", "**/*.cuh"),
            extra_compile_args={"cxx": CXX, "nvcc": NVCC},
            extra_link_args=["-fopenmp", "-Wl,-z,defs"],
            py_limited_api=True,
        ),
        CppExtension(
            "nystrom_ext._C",
            files("python/*.cpp"),
            define_macros=[("NYSTROM_VERSION", VERSION), *([("NYSTROM_CUDA", CUDA)] if CUDA else [])],
            extra_compile_args=CXX,
        ),
    ],
    cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=True)},
)
