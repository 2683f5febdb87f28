"""What the backward pass costs by the gradients that are asked for: time, without the forward pass, and memory."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.finetune import memory as process
from nystrom_ext import nystrom_attention

from .cases import Case
from .measure import clock, summary
from .memory import return_freed_memory

NAMES = ("dQ", "dK", "dV", "dw")
TAPS = 33
EVERYTHING = "dQ dK dV"  # what the others are measured by
LENGTH = 4096


@dataclass
class Backward:
    """One call's backward pass for some gradients, again and again."""

    case: Case
    wanted: str
    taps: int
    seconds: list[float] = field(default_factory=list)

    def prepare(self) -> None:
        """Run the forward pass."""
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in self.case.inputs()]
        inputs += [torch.randn(self.case.heads, self.taps).to(inputs[0])] if self.taps else []
        wanted = self.wanted.split()
        x = [t.requires_grad_(name in wanted) for name, t in zip(NAMES, inputs, strict=False)]
        self.leaves = [t for t in x if t.requires_grad]
        self.out = nystrom_attention(*x[:3], conv_weight=x[3] if self.taps else None, num_landmarks=self.case.m)
        self.direction = torch.randn_like(self.out)

    def __call__(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.out, self.leaves, self.direction, retain_graph=True)


def wanted(taps: int) -> list[str]:
    """Everything but dw first, which the rest is compared to; then all other sets of gradients."""
    names = NAMES if taps else NAMES[:3]
    found = [" ".join(some) for r in range(1, 1 + len(names)) for some in itertools.combinations(names, r)]
    return sorted(found, key=lambda some: some != EVERYTHING)


def records(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The 7 sets of gradients without a convolution and the 15 with one, at the longest length up to 4096."""
    n = max((n for n in args.lengths if n <= LENGTH), default=min(args.lengths))
    case = Case(args.batch, args.heads, n, args.head_dim, args.num_landmarks, args.dtype, args.device)
    return [record for taps in (0, TAPS) for record in _records(case, taps, args)]


def _records(case: Case, taps: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    runners = [Backward(case, some, taps) for some in wanted(taps)]
    for runner in runners:
        runner.prepare()
    for turn in range(args.repeats):  # in turns, so that a slow moment of the machine meets them all
        first = turn % len(runners)
        for runner in runners[first:] + runners[:first]:
            runner()  # untimed: what the one before left in the caches
            runner.seconds.append(clock(runner, case.device))
    return [
        {"case": asdict(case), "taps": taps, "wanted": r.wanted, "bytes": memory(r, args), **summary(r.seconds)}
        for r in runners
    ]


def memory(runner: Backward, args: argparse.Namespace) -> int | None:
    """Peak memory of one pass, its results included, in a process of its own."""
    if args.no_memory:
        return None
    return process.peak(runner.case.device, prepared, runner.case, runner.wanted, runner.taps, torch.get_num_threads())


def prepared(case: Case, some: str, taps: int, threads: int) -> Callable[[], object]:
    """Runs in the child. A small problem loads the libraries, which are not memory of the operator."""
    return_freed_memory()
    torch.set_num_threads(threads)
    small, real = (Backward(c, some, taps) for c in (replace(case, n=2 * max(64, case.m)), case))
    small.prepare()
    small()
    real.prepare()
    return real
