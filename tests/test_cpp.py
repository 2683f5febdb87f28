"""The C++ API from a program without Python: csrc/nystrom.h and libnystrom.so."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from torch.utils import cpp_extension

import nystrom_ext

PROGRAM = r"""
#include <ATen/ops/allclose.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <dlfcn.h>

#include <cstdio>

#include "nystrom.h"

int main() {
  const auto x = at::randn({2, 3, 50, 8}).requires_grad_();
  nystrom_ext::AttentionOptions options;
  options.num_landmarks = 50;  // exact attention
  const auto out = nystrom_ext::attention(x, x, x, std::nullopt, options);
  const bool exact = at::allclose(out, at::scaled_dot_product_attention(x, x, x), 1e-4, 1e-5);
  out.backward(at::ones_like(out));
  options.num_landmarks = 8;
  const auto approximate = nystrom_ext::attention(x, x, x, std::nullopt, options);
  try {
    options.num_landmarks = 0;
    nystrom_ext::attention(x, x, x, std::nullopt, options);
  } catch (const c10::Error& error) {
    std::printf("%s\n", error.what_without_backtrace());
  }
  const bool python = dlsym(RTLD_DEFAULT, "Py_Initialize") != nullptr;
  std::printf("exact %d gradient %d approximate %d python %d\n", exact, x.grad().defined(),
              !at::allclose(out, approximate), python);
}
"""


def test_cpp_program(tmp_path: Path) -> None:
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(PROGRAM)
    package, headers = Path(nystrom_ext.__file__).parent, Path(__file__).parents[1] / "csrc"
    folders = [str(package), *cpp_extension.library_paths()]
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", str(source), "-o", str(program), f"-I{headers}"]
    command += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    command += [flag for folder in folders for flag in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    command += ["-l:libnystrom.so", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    message, summary = result.stdout.strip().splitlines()
    assert message.startswith("nystrom_attention: num_landmarks must be at least 1, got 0")
    assert summary == "exact 1 gradient 1 approximate 1 python 0"
