"""What is measured: shapes with their operation counts, and the tables made of them."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass, replace

import torch

from . import peers

# Slides as TransMIL and its forks cut them: heads, head dim; tokens, a square and a class token.
MIL_HEADS = ((8, 64), (4, 128))
MIL_LENGTHS = (4097, 16385, 50177)
MIL_LANDMARKS = 256
ONE_LONG = "65,536 + 31 x 64"  # a sequence among short ones
MODULES = ("nn.MultiheadAttention", "NystromMultiheadAttention", 'with need_weights="never"')  # as they are called
PASSES = {"forward": False, "forward+backward": True}
TABLES = ("length", "dtype", "landmarks", "head_dim", "heads", "mask", "packed", "modules", "threads", "mil", "million")


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

    def landmark_buffers(self, backward: bool) -> int:
        """Bytes of Qt, Kt, U, W; with ``backward`` their gradients too."""
        size = 8 if self.dtype == "float64" else 4
        return (2 if backward else 1) * size * self.batch * self.heads * self.m * 4 * self.d

    def workspace(self) -> int:
        """Documented bound of the memory beyond inputs, results and gradients."""
        chunk = -(-8 * self.m // 1024) * 1024
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

    slides = [name for name in ("nystrom_ext", "two SDPA", "lucidrains") if name in args.contestants]

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
        "packed": [packed(base)],
        "modules": [[Entry("modules", name, str(n), name, replace(base, d=32), 1) for name in MODULES]],
        "threads": [
            *(_threads(replace(base, heads=h), f"H={h}") for h in (1, 8)),
            _threads(replace(base, heads=1, m=MIL_LANDMARKS), f"H=1, m={MIL_LANDMARKS}"),
            _threads(replace(base, batch=1, heads=8, n=65536 + 31 * 64), ONE_LONG, "nystrom_ext, one long"),
        ],
        "mil": rows("mil", slides, {mil_column(h, n): mil(base, h, d, n) for h, d in MIL_HEADS for n in MIL_LENGTHS}),
        "million": rows("million", ["nystrom_ext"], {"1,000,000": replace(base, batch=1, heads=1, n=1_000_000)}),
    }
    return {name: made[name] for name in args.tables}


def _dtypes(base: Case, names: list[str]) -> list[list[Entry]]:
    """One group per contestant, so that its ratio between types is of the same moments."""
    types = ("float32", "bfloat16", "float16", "float64")
    return [
        [Entry("dtype", f"{name}, {t}", str(base.n), name, replace(base, dtype=t)) for t in types] for name in names
    ]


def mil(base: Case, heads: int, d: int, n: int) -> Case:
    """One slide."""
    return replace(base, batch=1, heads=heads, n=n, d=d, m=MIL_LANDMARKS)


def mil_column(heads: int, n: int) -> str:
    """Its name in the table."""
    return f"{heads}x{dict(MIL_HEADS)[heads]}, {n:,}"


def packed(base: Case) -> list[Entry]:
    """32 sequences of 32 to 2048 tokens, packed and as a padded batch."""
    case = replace(base, batch=32, n=2048)
    names = {"packed": "nystrom_ext, packed", "padded, with a mask": "nystrom_ext, ragged"}
    return [Entry("packed", row, "32 of 32 to 2048", name, case) for row, name in names.items()]


def _threads(case: Case, column: str, name: str = "nystrom_ext") -> list[Entry]:
    cores = os.cpu_count() or 1
    counts = sorted({*(2**i for i in range(cores.bit_length()) if 2**i <= cores), cores})
    return [Entry("threads", f"{t} threads" if t > 1 else "1 thread", column, name, case, t) for t in counts]


def left_out(entry: Entry, args: argparse.Namespace) -> str | None:
    """Why this entry is not worth its time, or None."""
    limit = {"exact": args.max_exact, "rival": args.max_rivals}.get(peers.KINDS[entry.contestant])
    return f"beyond {limit}" if limit and entry.case.n > limit else None
