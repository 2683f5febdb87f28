"""One configuration against the float64 reference, and against itself with every tensor contiguous."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from nystrom_ext import reference
from tests.problems import bar, names, new_memory_is_nan, run, run_seeded

from .configurations import Configuration, configuration

EMULATED = os.environ.get("NYSTROM_SIMT")
# A single row may be this much worse than the RMS error allows on average: a wrong row among thousands shows.
WORST_ROW = 20
# Where the truth cancels (one key: its probability is 1 whatever the query), errors are relative to this part of what
# was added up; if all values of a head are the same, scores do not matter and rounding is all that is left.
CANCELLED, CONSTANT_VALUES = 0.03, 0.3


class Mismatch(AssertionError):
    """What is wrong with a configuration."""


def reproduction(seed: int, number: int, device: str) -> str:
    where = f" --device {device}" if device != "cpu" else ""
    emulator = f"NYSTROM_SIMT={EMULATED} " if EMULATED else ""
    return f"{emulator}python -m tests.fuzz --only {number} --seed {seed}{where}"


def fuzz(seed: int, number: int, device: str) -> str | None:
    """None, or what is wrong and how to see it again, in one line."""
    p = configuration(seed, number, small=EMULATED is not None)
    try:
        with new_memory_is_nan():
            compare(p, device)
    except Exception as error:  # a refusal by the operator is a finding as well
        what = str(error).splitlines()[0] if str(error) else "no message"
        return f"{reproduction(seed, number, device)}  # {type(error).__name__}: {what}; {p}"
    return None


def compare(p: Configuration, device: str) -> None:
    values = p.values()
    *x, grad = p.place(values)
    *there, grad_there = p.place([t.to(device) for t in values])
    actual, more = run_seeded(p, there, grad_there)
    contiguous = [t.detach().contiguous().requires_grad_(t.requires_grad) for t in there]
    plain, _ = run_seeded(p, contiguous, grad_there.contiguous())
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in x]
    expected = run(reference.nystrom_attention, p, exact, grad, **more)
    for name, a, b, e in zip(names(x), actual, plain, expected, strict=True):
        if not (a.dtype == p.dtype and a.shape == e.shape):
            raise Mismatch(f"{name} is {tuple(a.shape)} in {a.dtype}")
        if not torch.equal(a, b):
            raise Mismatch(f"{name} depends on the memory layout")
        a, ignored = a.cpu(), ignores(p, name)
        if ignored is not None and a.transpose(1, 2)[ignored].any():
            raise Mismatch(f"{name} is not zero where it must be")
        compare_values(p, name, a.double(), e, floor(p, name, x, grad))


def ignores(p: Configuration, name: str) -> Tensor | None:
    """(B, n) bool: tokens that get exact zeros, because they are ignored or have nothing to attend to."""
    if name == "dconv":
        return None
    keys, queries = p.masks()
    keys = torch.zeros(p.B, p.keys, dtype=torch.bool) if keys is None else keys
    queries = torch.zeros(p.B, p.L, dtype=torch.bool) if queries is None else queries
    own, other = (keys, queries) if name in ("dkey", "dvalue") else (queries, keys)
    return own | other.all(1, keepdim=True)


def floor(p: Configuration, name: str, x: list[Tensor], grad: Tensor) -> float:
    """The least RMS that an entry's error is measured by."""
    if name not in ("dquery", "dkey") or not p.L or not p.keys:
        return 0.0
    query, key, value, g = (t.detach().double().square().mean().sqrt().item() for t in (*x[:3], grad))
    layout = p.layout or {}
    one = {role: layout.get(role) in ("one token", "one number") for role in ("value", "grad")}
    queries = p.L * p.H / (p.kv_heads or p.H)
    # What is added up grows with the number of terms if they are equal, else with its root.
    features = x[2].shape[3] ** (1 if layout.get("value") == layout.get("grad") == "one number" else 0.5)
    scale = abs(p.options.get("scale", p.d**-0.5)) * value * g * features
    scale *= key if name == "dquery" else query * queries ** (1 if one["grad"] else 0.5) / p.keys
    return (CONSTANT_VALUES if one["value"] else CANCELLED) * scale


def compare_values(p: Configuration, name: str, actual: Tensor, expected: Tensor, least: float) -> None:
    if not expected.numel():
        return
    rms = max(expected.square().mean().sqrt().item(), least)
    difference, allowed = actual - expected, bar(name, p.dtype)
    if rms == 0:
        if difference.any():
            raise Mismatch(f"{name} is not zero, but {difference.abs().max():.1e}")
        return
    error = difference.square().mean().sqrt().item() / rms
    if not error <= allowed:
        raise Mismatch(f"{name}: relative RMS error {error:.1e} > {allowed:.0e}")
    if rms == least:  # of which no row is typical
        return
    rows = expected.square().mean(-1).sqrt().clamp(min=rms)
    worst = (difference.square().mean(-1).sqrt() / rows).max().item()
    if worst > WORST_ROW * allowed:
        raise Mismatch(f"{name}: relative error {worst:.1e} in the worst row")
