"""What is measured: shapes with their operation counts, and the tables made of them."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass, replace

import torch

from . import peers

PASSES = {"forward": False, "forward+backward": True}
TABLES = ("length", "dtype", "landmarks", "head_dim", "heads", "mask", "threads", "million")


@dataclass(frozen=True)
class Case:
    """Self-attention: q, k, v (batch, heads, n, d), m landmarks."""

    batch: int
    heads: int
    n: int
    d: int
    m: int
    dtype: str = "float32"
    device: str = "cpu"

    def inputs(self, requires_grad: bool = False) -> list[torch.Tensor]:
        """Random q, k, v."""
        shape, dtype = (self.batch, self.heads, self.n, self.d), getattr(torch, self.dtype)
        return [torch.randn(shape, device=self.device).to(dtype).requires_grad_(requires_grad) for _ in range(3)]

    def flops(self, backward: bool) -> int:
        """Matrix products of Nyström attention; with ``backward`` those of both passes."""
        passes, core = (28, 180) if backward else (8, 48)
        return self.batch * self.heads * (passes * self.n * self.m * self.d + core * self.m**3)

    def traffic(self, backward: bool) -> int:
        """Bytes read and written when every sweep over the tokens goes to memory: 7 tensors forward, 10 backward."""
        size = getattr(torch, self.dtype).itemsize
        return (17 if backward else 7) * self.batch * self.heads * self.n * self.d * size

    def workspace(self) -> int:
        """Documented bound of the memory beyond inputs, results and gradients."""
        chunk = 1024 if self.m <= 64 else -(-16 * self.m // 1024) * 1024
        splits = -(-self.n // chunk)
        size = 8 if self.dtype == "float64" else 4
        return size * self.batch * self.heads * self.m * (splits * (2 * self.d + 2) + 8 * self.d + 16 * self.m)


@dataclass(frozen=True)
class Entry:
    """One contestant in one case. ``row`` is its line in the table, ``column`` what varies."""

    table: str
    row: str
    column: str
    contestant: str
    case: Case
    threads: int | None = None

    def record(self, name: str) -> dict[str, object]:
        """Its part of a JSON record of pass ``name``."""
        return {**asdict(self), "case": asdict(self.case), "pass": name}


def tables(args: argparse.Namespace) -> dict[str, list[list[Entry]]]:
    """The chosen tables; each is a list of groups whose entries are measured in turn."""
    n = max((n for n in args.lengths if n <= 4096), default=min(args.lengths))  # where the other tables are measured
    base = Case(args.batch, args.heads, n, args.head_dim, args.num_landmarks, args.dtype, args.device)
    some = [name for name in ("nystrom_ext", "two SDPA", "exact SDPA") if name in args.contestants]

    def rows(table: str, names: list[str], columns: dict[str, Case]) -> list[list[Entry]]:
        return [[Entry(table, name, column, name, case) for name in names] for column, case in columns.items()]

    half = Entry("mask", "nystrom_ext, half of each sample padded", str(n), "nystrom_ext, padded", base)
    made = {
        "length": rows("length", args.contestants, {str(n): replace(base, n=n) for n in args.lengths}),
        "dtype": [
            group for n in sorted({512, 2048, 4096} & {*args.lengths}) for group in _dtypes(replace(base, n=n), some)
        ],
        "landmarks": rows(
            "landmarks", some, {f"m={m}": replace(base, m=m) for m in (16, 32, 64, 128, 256) if n > m and n % m == 0}
        ),
        "head_dim": rows("head_dim", some, {f"d={d}": replace(base, d=d) for d in (32, 64, 128)}),
        "heads": rows(
            "heads", some, {f"{b}x{h}": replace(base, batch=b, heads=h) for b, h in ((1, 1), (1, 8), (8, 8))}
        ),
        "mask": [[replace(half, row="nystrom_ext", contestant="nystrom_ext"), half]],
        "threads": [_threads(replace(base, heads=h)) for h in (1, 8)],
        "million": rows("million", ["nystrom_ext"], {"1,000,000": replace(base, batch=1, heads=1, n=1_000_000)}),
    }
    return {name: made[name] for name in args.tables}


def _dtypes(base: Case, names: list[str]) -> list[list[Entry]]:
    """One group per contestant, so that its ratio between types is of the same moments."""
    types = ("float32", "bfloat16", "float16", "float64")
    return [
        [Entry("dtype", f"{name}, {t}", str(base.n), name, replace(base, dtype=t)) for t in types] for name in names
    ]


def _threads(case: Case) -> list[Entry]:
    cores = os.cpu_count() or 1
    counts = sorted({*(2**i for i in range(cores.bit_length()) if 2**i <= cores), cores})
    return [
        Entry("threads", f"{t} threads" if t > 1 else "1 thread", f"H={case.heads}", "nystrom_ext", case, t)
        for t in counts
    ]


def left_out(entry: Entry, args: argparse.Namespace) -> str | None:
    """Why this entry is not worth its time, or None."""
    limit = {"exact": args.max_exact, "rival": args.max_rivals}.get(peers.KINDS[entry.contestant])
    return f"beyond {limit}" if limit and entry.case.n > limit else None
