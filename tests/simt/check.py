"""The operator's tests on the CUDA kernels' source in the emulator: as it is, in random order, for races, for bounds.

PYTHONPATH=tests python -m simt.check      # a mode, or several, to choose: plain, race, asan
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from simt import build
from simt.kernels import ROOT, build_backend

EVERYTHING = ["tests/test_operator.py", "tests/test_invariance.py"]
BORDERS = ["tests/test_operator.py", "-k", "borders"]
PACKED = ["tests/test_varlen.py", "-k", "packed or cross or convolution or views or few or neighbours"]
FUZZ = ["tests/fuzz", "-k", "configurations"]
EXTREMES = ["tests/test_extremes.py", "-k", "float64 or bfloat16"]  # one dtype of either engine
# mode, seed of the schedule, tests
RUNS = [
    ("plain", 0, EVERYTHING),
    ("plain", 1, BORDERS),
    ("plain", 2, BORDERS),
    ("plain", 1, PACKED),
    ("plain", 3, FUZZ),
    ("plain", 4, EXTREMES),
    ("race", 3, BORDERS),
    ("asan", 0, BORDERS),
]


def run(mode: str, seed: int, tests: list[str]) -> bool:
    library = build_backend(mode, ROOT / "build" / "simt" / mode)
    environment = build.sanitizer_environment() if mode == "asan" else dict(os.environ)
    environment |= {"NYSTROM_SIMT": str(library), "NYSTROM_SIMT_SEED": str(seed), "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    print(f"== emulated CUDA kernels: {mode}, seed {seed}: {' '.join(tests)}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment)
    print(f"== {time.monotonic() - start:.0f} s", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    if build.cuda_headers() is None:
        sys.exit("simt: needs the headers of the CUDA toolkit; put nvcc on PATH or set CUDA_HOME")
    modes = sys.argv[1:] or list(build.MODES)
    results = [run(*r) for r in RUNS if r[0] in modes]
    sys.exit(not all(results))
