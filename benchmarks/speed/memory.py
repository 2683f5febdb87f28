"""Peak memory beyond inputs, result and gradients, each number from a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.finetune import memory as process

from . import peers
from .cases import PASSES, Case, Entry, left_out, packed
from .gate import Gate
from .measure import Runner


def entries(args: argparse.Namespace) -> list[tuple[Entry, str]]:
    """Every second length from the longest down; the compiled composition is left out, its process would compile."""
    base = Case(args.batch, args.heads, 0, args.head_dim, args.num_landmarks, args.dtype, args.device)
    names = [name for name in args.contestants if name != "two SDPA compiled"]
    lengths = sorted(args.lengths)[::-2][::-1]
    packed_entries = [replace(packed(base)[0], table="memory")] if "packed" in args.tables else []
    return [
        (Entry("memory", name, str(n), name, replace(base, n=n)), pass_name)
        for n in lengths
        for name in names
        for pass_name in PASSES
        if PASSES[pass_name] or name == "nystrom_ext"  # forward has a bar of ours alone
    ] + [(entry, pass_name) for entry in packed_entries for pass_name in PASSES]


def record(entry: Entry, name: str, gate: Gate, args: argparse.Namespace) -> dict[str, Any]:
    """The JSON record: ``bytes``, or why there are none."""
    row = entry.record(name)
    if why := left_out(entry, args) or gate.refusal(entry.contestant, entry.case):
        return {**row, "status": why}
    risen = process.peak(args.device, prepare, entry, PASSES[name], torch.get_num_threads())
    if risen is None:
        return {**row, "status": "not measured"}
    return {**row, "bytes": max(0, risen - results_size(entry, PASSES[name]))}


def prepare(entry: Entry, backward: bool, threads: int) -> Callable[[], object]:
    """Runs in the child. A small problem loads the libraries, which are not memory of the operator."""
    return_freed_memory()
    torch.set_num_threads(threads)
    n = 2 * max(64, entry.case.m)
    small, real = (Runner(replace(entry, case=c), backward) for c in (replace(entry.case, n=n), entry.case))
    small.prepare()
    small()
    real.prepare()
    return real


def return_freed_memory() -> None:
    """Else glibc keeps blocks up to 32 MiB, resident, and what is reused would not be counted."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 2**17)  # M_MMAP_THRESHOLD


def results_size(entry: Entry, backward: bool) -> int:
    """Bytes of the result and the gradients."""
    case = entry.case
    tokens = sum(peers.lengths(case)) if entry.contestant == "nystrom_ext, packed" else case.batch * case.n
    one = tokens * case.heads * case.d * getattr(torch, case.dtype).itemsize
    return one * (1 + (2 if entry.contestant == "Reformer" else 3) * backward)
