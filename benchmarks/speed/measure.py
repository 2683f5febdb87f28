"""Times. The entries of a group take turns, so that a slow moment of the machine meets them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import peers
from .cases import Entry
from .gate import one_line

QUICK = 0.1  # seconds of a run that a slower neighbour can disturb
FEWEST = 2  # runs of an entry that is too slow for its budget
ASLEEP = 20_000_000  # cycles of a GPU, about 10 ms: longer than Python takes to queue the kernels of a pass


@dataclass
class Runner:
    """An entry with its inputs; one call is one pass."""

    entry: Entry
    backward: bool
    seconds: list[float] = field(default_factory=list)
    problem: str | None = None

    def prepare(self) -> None:
        """Build the contestant and its inputs."""
        contestant, inputs = peers.build(self.entry.contestant, self.entry.case), self.entry.case.inputs()
        self.run, self.direction = contestant.run, contestant.merge(torch.randn_like(inputs[0]))
        self.leaves = [x.detach().requires_grad_(self.backward) for x in contestant.layout(*inputs)]

    def __call__(self) -> tuple[Tensor, ...]:
        if not self.backward:
            with torch.no_grad():
                return (self.run(*self.leaves),)
        out = self.run(*self.leaves)
        return out, *torch.autograd.grad(out, self.leaves, self.direction)

    def turn(self) -> None:
        if self.entry.threads:
            torch.set_num_threads(self.entry.threads)
        if self.entry.threads or self.seconds[-1:] < [QUICK]:
            self()  # untimed: the change of threads, or the pages and caches that the one before left behind
        self.seconds.append(clock(self, self.entry.case.device))


def clock(run: Callable[[], object], device: str) -> float:
    """Seconds of one run; on a GPU those of its kernels, which are queued while it sleeps."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(ASLEEP)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def race(entries: list[Entry], backward: bool, repeats: int, budget: float) -> list[dict[str, object]]:
    """Measurements, or the problem, of each entry. An entry leaves when it has used ``budget`` seconds."""
    threads = torch.get_num_threads()
    runners = [Runner(entry, backward) for entry in entries]
    for runner in runners:
        try:
            runner.prepare()
            runner()  # compiles, fills caches
        except Exception as problem:  # out of memory, a length that the peer refuses, no compiler
            runner.problem = f"does not run: {one_line(problem)}"
    for turn in range(repeats):
        first = turn % len(runners)  # nobody always follows the same neighbour's mess
        for runner in runners[first:] + runners[:first]:
            if not runner.problem and (sum(runner.seconds) < budget or len(runner.seconds) < FEWEST):
                runner.turn()
    torch.set_num_threads(threads)
    return [{"status": r.problem} if r.problem else summary(r.seconds) for r in runners]


def summary(seconds: list[float]) -> dict[str, object]:
    """Median, quartiles, minimum in seconds and the number of runs."""
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    names = ("lower_quartile", "median", "upper_quartile")
    return {**dict(zip(names, quartiles, strict=True)), "minimum": min(seconds), "runs": len(seconds)}
