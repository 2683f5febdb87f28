"""The machine: what it is, and what it can do at most, measured in the same run as everything else."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from nystrom_ext import build_info

from .measure import clock
from .peers import PACKAGES

RUNS = 7
ROUNDS = 1_000_000
COPIED = 2**27  # bytes, beyond the caches


def keep_memory() -> None:
    """From now on memory that a run frees is kept for the next one, whoever's it is; where malloc is glibc's.

    Otherwise large blocks come fresh from the system every time, and what that takes is the system's matter: on a
    virtual machine from nothing to half of a call, by the moment. A method of many blocks gains more by this than one
    of few.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


def facts(device: str) -> dict[str, object]:
    """Processor, memory, software."""
    versions = {name: _version(name) for name in ("torch", *PACKAGES.values())}
    found: dict[str, object] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": versions,
        "build": build_info(),
    }
    if torch.device(device).type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


def slug(found: dict[str, object]) -> str:
    """A file name for results of this machine."""
    build = found["build"]
    assert isinstance(build, dict)
    processor = (found["processor"], build["cpu_capability"], f"{found['threads']}-threads")
    parts = (found["accelerator"],) if "accelerator" in found else processor
    return re.sub(r"[^a-z0-9]+", "-", " ".join(str(part) for part in parts).lower()).strip("-")


def peaks(device: str, dtype: str) -> dict[str, object]:
    """GFLOP/s and GB/s. The peak is a loop of FMAs where a C compiler is found, else the best matrix product."""
    products = matmul_rate(device, dtype)
    loop = fma_rate() if torch.device(device).type == "cpu" else None
    half = torch.empty(COPIED // 4, device=device), torch.ones(COPIED // 4, device=device)
    copy = min(clock(lambda: half[0].copy_(half[1]), device) for _ in range(RUNS))
    return {
        "gflops": loop or products,
        "method": "loop of independent float32 FMAs on all threads" if loop else f"best matrix product, {dtype}",
        "matmul_gflops": products,
        "copy_gb_per_s": 2 * COPIED / copy / 1e9,
    }


def better(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The higher of two measurements: a busy moment must not lower the bar."""
    return {key: max(value, other[key]) if isinstance(value, float) else value for key, value in one.items()}


def matmul_rate(device: str, dtype: str) -> float:
    """GFLOP/s of the best square torch.mm."""
    rates = []
    for n in (256, 512, 1024, 2048) if torch.device(device).type == "cpu" else (2048, 4096, 8192):
        a, b, c = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(3))
        best = min(clock(lambda a=a, b=b, c=c: torch.mm(a, b, out=c), device) for _ in range(RUNS))
        rates.append(2 * n**3 / best / 1e9)
    return max(rates)


def fma_rate() -> float | None:
    """GFLOP/s of peak.c on all of torch's threads, or None without a compiler."""
    with tempfile.TemporaryDirectory() as folder:
        library, source = Path(folder, "peak.so"), Path(__file__).with_name("peak.c")
        command = [os.environ.get("CC", "cc"), *"-O3 -march=native -shared -fPIC -o".split(), str(library), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            loaded = ctypes.CDLL(str(library))  # its calls release the GIL
        except (OSError, subprocess.SubprocessError):
            return None
        loaded.chains.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_float]
        flops = ROUNDS * loaded.flops_per_round()

        def together() -> None:
            workers = [
                threading.Thread(target=loaded.chains, args=(ROUNDS, 0.999, 1e-3))
                for _ in range(torch.get_num_threads())
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

        return torch.get_num_threads() * flops / min(clock(together, "cpu") for _ in range(10 * RUNS)) / 1e9


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
