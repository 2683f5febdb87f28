"""``python -m tests.cuda.check``: everything about the CUDA kernels that this machine can run; `make check-cuda`.

Compiling within budgets needs nvcc alone; the rest needs a GPU and a build for it, and is named where it is not run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from nystrom_ext import build_info

ROOT = Path(__file__).parents[2]
LENGTHS = [str(2**i) for i in range(9, 18)]  # 512 .. 131072
SPEED = "--device cuda --dtype bfloat16 --batch 8 --heads 12 --max-exact 131072 --no-memory".split()
STEPS = {  # name: (needs a GPU, arguments of python -m)
    "compile": (False, ["tests.cuda.compile"]),
    "tests": (True, ["pytest", "-q", "tests/cuda"]),
    "sanitizers": (True, ["tests.cuda.sanitize"]),
    "speed": (
        True,
        ["benchmarks.speed", *SPEED, "--lengths", *LENGTHS]
        + ["--contestants", "nystrom_ext", "eager", "two SDPA", "exact SDPA"],
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 when a step fails, or needs a GPU that --require-gpu insists on."""
    parser = argparse.ArgumentParser(prog="python -m tests.cuda.check", description=__doc__)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="default: all")
    parser.add_argument("--require-gpu", action="store_true", help="fail where there is no GPU")
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    if gpu and build_info()["cuda"] is None:
        print(
            f"check-cuda: there is a GPU, but nystrom_ext was built without CUDA: {build_info()}; rebuild it with "
            "FORCE_CUDA=1, which says what is missing"
        )
        return 1
    failed, left_out = [], []
    for name in args.steps:
        needs_gpu, arguments = STEPS[name]
        if needs_gpu and not gpu:
            left_out.append(name)
            continue
        print(f"== {name}: python -m {' '.join(arguments)}", flush=True)
        start = time.perf_counter()
        status = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT).returncode
        print(f"== {name}: {'failed' if status else 'passed'} in {time.perf_counter() - start:.0f} s", flush=True)
        failed += [name] if status else []
    if left_out:
        print(f"not run, since torch {torch.__version__} finds no GPU: {', '.join(left_out)}")
    if failed:
        print(f"check-cuda: failed: {', '.join(failed)}")
    return 1 if failed or (left_out and args.require_gpu) else 0


if __name__ == "__main__":
    sys.exit(main())
