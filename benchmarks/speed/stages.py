"""Where our time goes on a CPU: the stages of the operator, by their names in torch.profiler."""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import asdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .cases import Case, Entry
from .measure import Runner, summary

# Floating-point operations per token, landmark and feature: 2 products forward, 5 backward, in either pass.
PASSES = {"key_pass": 4, "query_pass": 4, "query_pass_backward": 10, "key_pass_backward": 10}
DIRECTIONS = {"forward": ("key_pass", "query_pass"), "backward": ("query_pass_backward", "key_pass_backward")}
PREFIX = "nystrom_ext::"
NAMES = (
    "landmarks", "key_pass", "core", "query_pass",
    "query_pass_backward", "core_backward", "key_pass_backward", "landmarks_backward",
)  # fmt: skip
ENOUGH = 4096  # tokens


def records(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each length from 4096 tokens on; none on a GPU, whose stages are kernels."""
    lengths = [n for n in args.lengths if ENOUGH <= n <= 16 * ENOUGH]
    if torch.device(args.device).type != "cpu":
        return []
    return [
        record(Case(args.batch, args.heads, n, args.head_dim, args.num_landmarks, args.dtype), args) for n in lengths
    ]


def record(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each stage."""
    runner = Runner(Entry("stages", "nystrom_ext", str(case.n), "nystrom_ext", case), backward=True)
    runner.prepare()
    runner()
    seconds: dict[str, list[float]] = defaultdict(list)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(args.repeats):
            runner()
    for event in profiler.events():
        if event.name.removeprefix(PREFIX) in NAMES:
            seconds[event.name.removeprefix(PREFIX)].append(event.time_range.elapsed_us() / 1e6)
    return {"case": asdict(case), "stages": {name: summary(seconds[name]) for name in NAMES}}


def rate(record: dict[str, Any], names: tuple[str, ...]) -> float:
    """GFLOP/s of some passes together, in the best of the runs, as the machine's peak is."""
    case = Case(**record["case"])
    products = case.batch * case.heads * case.n * case.m * case.d * sum(PASSES[name] for name in names)
    return products / sum(record["stages"][name]["minimum"] for name in names) / 1e9
