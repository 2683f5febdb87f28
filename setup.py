"""Builds two shared objects: libnystrom.so, the operators without Python symbols, and _C, a small pybind11 module.

The CPU kernels are one source compiled once per instruction set; the library chooses at run time.
"""

from __future__ import annotations

import platform
import runpy
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
VERSION = runpy.run_path(str(ROOT / "nystrom_ext" / "_version.py"))["__version__"]
CXX = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]

# capability: vector bytes, flags
CAPABILITIES = {"default": (16, [])}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    CAPABILITIES["avx2"] = (32, avx2)
    CAPABILITIES["avx512"] = (64, [*avx2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"])


class Build(BuildExtension):
    """Compiles the kernels per instruction set with the plain compiler, before BuildExtension swaps in ninja."""

    def build_extensions(self) -> None:
        print(f"nystrom_ext {VERSION}: CPU kernels for {', '.join(CAPABILITIES)}; CUDA: not built")
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


def sources(*folders: str) -> list[str]:
    found = (path for folder in folders for path in (ROOT / "csrc" / folder).glob("*.cpp"))
    return sorted(str(path.relative_to(ROOT)) for path in found if path.name != "kernels.cpp")


HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))

setup(
    ext_modules=[
        CppExtension(
            "nystrom_ext.libnystrom",
            sources("ops", "cpu"),
            depends=HEADERS,
            extra_compile_args=CXX,
            extra_link_args=["-fopenmp", "-Wl,-z,defs"],
            py_limited_api=True,
        ),
        CppExtension(
            "nystrom_ext._C",
            sources("python"),
            define_macros=[("NYSTROM_VERSION", VERSION)],
            extra_compile_args=CXX,
        ),
    ],
    cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=True)},
)
