"""``python -m benchmarks.speed``: milliseconds of attention, forward and forward+backward, side by side in one run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from nystrom_ext import build_info

from .peers import Attention, peers


def seconds(attention: Attention, inputs: list[torch.Tensor], backward: bool) -> float:
    start = time.perf_counter()
    if backward:
        out = attention(*inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    else:
        with torch.no_grad():
            attention(*inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(args: argparse.Namespace, n: int, backward: bool) -> dict[str, float]:
    """Median seconds by contestant; the contestants take turns, so that a slow moment of the machine meets them all."""
    shape = (args.batch, args.heads, n, args.head_dim)
    dtype = getattr(torch, args.dtype)
    inputs = [torch.randn(shape, dtype=dtype, device=args.device).requires_grad_(backward) for _ in range(3)]
    table = peers(args.num_landmarks, args.compile)
    if n > args.max_exact:
        del table["exact SDPA"]
    times: dict[str, list[float]] = {name: [] for name in table}
    for attention in table.values():  # warm up
        seconds(attention, inputs, backward)
    for _ in range(args.repeats):
        for name, attention in table.items():
            times[name].append(seconds(attention, inputs, backward))
    return {name: statistics.median(t) for name, t in times.items()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--num-landmarks", type=int, default=64, help="must divide the lengths, for the peers' sake")
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--max-exact", type=int, default=8192, help="longest sequence for exact attention")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile of the composition")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    if bad := [n for n in args.lengths if n % args.num_landmarks or n <= args.num_landmarks]:
        parser.error(f"--lengths must be larger multiples of --num-landmarks {args.num_landmarks}, got {bad}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    info = build_info()
    title = (
        f"B={args.batch} H={args.heads} d={args.head_dim} m={args.num_landmarks} {args.dtype}, {platform.machine()} "
        f"{info['cpu_capability']}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    results = []
    console = Console()
    for backward in (False, True):
        name = "forward+backward" if backward else "forward"
        table = Table(title=f"{name}, median ms (times nystrom_ext's) - {title}")
        for column in ("n", *peers(args.num_landmarks, args.compile)):
            table.add_column(column, justify="right")
        for n in args.lengths:
            times = measure(args, n, backward)
            ours = times["nystrom_ext"]
            cells = [
                f"{t * 1e3:.2f} ({t / ours:.1f}x)" if k != "nystrom_ext" else f"{t * 1e3:.2f}" for k, t in times.items()
            ]
            table.add_row(str(n), *cells)
            results.append({"pass": name, "n": n, "ms": {k: t * 1e3 for k, t in times.items()}})
        console.print(table)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        partial = args.output.with_suffix(".tmp")
        partial.write_text(
            json.dumps({"config": config, "machine": title, "build": info, "results": results}, indent=1)
        )
        os.replace(partial, args.output)
        print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
