"""``python -m tests.cuda.sanitize``: compute-sanitizer's tools over the operator on small problems of every kind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch

from tests.problems import DTYPES, Problem, run

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PROBLEMS = (
    Problem(B=2, H=2, L=150, m=16, d=32, taps=5, mask="holes"),
    Problem(B=1, H=2, L=333, m=64, d=64, e=64),
    Problem(B=1, H=1, L=1300, S=1100, m=64, d=64, mask="tail"),
    Problem(B=1, H=1, L=300, m=100, d=40, e=24),
    Problem(B=1, H=1, L=300, m=128, d=128, taps=33),
    Problem(B=2, H=4, kv_heads=2, L=100, m=16, options={"coefficient": "global"}),
    Problem(B=3, H=1, L=60, m=8, mask="all", options={"dropout_p": 0.3}),
    Problem(B=1, H=2, L=7, S=150, m=8, mask="holes"),
    Problem(B=1, H=2, L=150, S=7, m=8, mask="tail"),
    Problem(B=4, H=2, L=1300, m=64, d=64, mask="tail", packed=True),
    Problem(B=4, H=4, kv_heads=2, L=300, m=16, taps=5, mask="all", packed=True, options={"window": 9, "pinned": 2}),
)


def exercise() -> None:
    """Forward and backward of every problem in every dtype; what the tools watch."""
    for p in PROBLEMS:
        for dtype in DTYPES:
            x = [t.detach().cuda().requires_grad_() for t in p.tensors(dtype)]
            run(p.attention, p, x, torch.randn(*x[0].shape[:3], x[2].shape[3]))
            torch.cuda.synchronize()


def main() -> int:
    """Returns the exit status."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"
    )
    if sanitizer is None:
        print("not run: compute-sanitizer is neither on PATH nor in CUDA_HOME")
        return 0
    failed = []
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else a buffer's end is not an allocation's
    for tool in TOOLS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "tests.cuda.sanitize"]
        print(f"compute-sanitizer, {tool}", flush=True)
        if subprocess.run([*command, "--exercise"], env=environment).returncode:
            failed.append(tool)
    if failed:
        print(f"violation: compute-sanitizer complains: {' '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(exercise() if sys.argv[1:] == ["--exercise"] else main())
