"""Nobody is timed who computes something else: every Nyström contestant is compared with the reference first."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nystrom_ext import nystrom_attention, reference

from . import peers
from .cases import Case

SMALL = Case(batch=2, heads=2, n=128, d=16, m=16, dtype="float64")
# Largest difference, relative to the largest value, of the result and of the gradients.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}


class Gate:
    """Remembers its verdicts: the same contestant in the same type is checked once."""

    def __init__(self) -> None:
        self.errors: dict[str, dict[str, float]] = {}
        self.verdicts: dict[tuple[str, str], str | None] = {}

    def refusal(self, name: str, case: Case) -> str | None:
        """Why this contestant may not be timed, or None."""
        for dtype in dict.fromkeys(("float64", case.dtype)) if case.dtype == "float32" else (case.dtype,):
            if (name, dtype) not in self.verdicts:
                self.verdicts[name, dtype] = self._check(name, replace(SMALL, dtype=dtype, device=case.device))
            if verdict := self.verdicts[name, dtype]:
                return verdict
        return None

    def _check(self, name: str, case: Case) -> str | None:
        try:
            contestant = peers.build(name, case)
            if peers.KINDS[name] == "rival":
                return _runs(contestant, case)
            error = difference(contestant, name, case)
        except ImportError as problem:
            missing = isinstance(problem, ModuleNotFoundError) and name in peers.PACKAGES
            return f"not installed: {problem.name}" if missing else f"does not run: {one_line(problem)}"
        except Exception as problem:  # foreign code may fail in any way
            return f"does not run: {one_line(problem)}"
        self.errors.setdefault(name, {})[case.dtype] = error
        limit = TOLERANCE[case.dtype]
        return None if error <= limit else f"refused: differs from the reference by {error:.1e}, limit {limit:.0e}"


def _runs(contestant: peers.Contestant, case: Case) -> str | None:
    """Another method has nothing to be compared with but the shape of its result."""
    inputs = case.inputs()
    out, expected = contestant.run(*contestant.layout(*inputs)), contestant.merge(inputs[0])
    right = out.shape == expected.shape and bool(out.isfinite().all())
    return None if right else f"refused: result {tuple(out.shape)}, finite numbers {tuple(expected.shape)} expected"


def difference(contestant: peers.Contestant, name: str, case: Case) -> float:
    """Largest relative difference of the result and of the gradients of q, k and v."""
    torch.manual_seed(0)
    inputs = case.inputs(requires_grad=True)
    exact_inputs = [x.detach().cpu().double().requires_grad_() for x in inputs]
    out = contestant.run(*contestant.layout(*inputs))
    expected = contestant.merge(_reference(name, case, contestant.coefficient, exact_inputs))
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad(out, inputs, direction.to(out))
    expected_gradients = torch.autograd.grad(expected, exact_inputs, direction)
    pairs = zip((out, *gradients), (expected, *expected_gradients), strict=True)
    with torch.no_grad():
        return max(float((a.cpu() - b).abs().max() / b.abs().max()) for a, b in pairs)


def _reference(name: str, case: Case, coefficient: str, inputs: list[Tensor]) -> Tensor:
    kind, mask = peers.KINDS[name], None
    if kind == "padded":
        mask = (torch.arange(case.n) >= case.n // 2).expand(case.batch, -1)
    if kind == "ragged":
        mask = peers.ignored(case).cpu()
    if kind == "one long":
        pieces = zip(*(x[:1].split(peers.one_long(case), 2) for x in inputs), strict=True)
        return torch.cat([reference.nystrom_attention(*piece, num_landmarks=case.m) for piece in pieces], 2)
    landmarks = case.n if kind in ("exact", "stock") else case.m  # as many landmarks as tokens is exact attention
    options = peers.WINDOW if kind == "windowed" else {}
    return reference.nystrom_attention(
        *inputs, mask, query_padding_mask=mask, num_landmarks=landmarks, coefficient=coefficient, **options
    )


def one_line(problem: BaseException) -> str:
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 100 else text[:97] + "..."


def same_bits(device: str) -> bool:
    """Whether thread count and batch mates leave every bit of our result alone."""
    case = Case(batch=3, heads=2, n=2500, d=64, m=64, device=device)
    threads, outs = torch.get_num_threads(), []
    inputs = case.inputs()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outs.append(nystrom_attention(*inputs, num_landmarks=case.m))
    torch.set_num_threads(threads)
    alone = nystrom_attention(*(x[1:2] for x in inputs), num_landmarks=case.m)
    return all(torch.equal(out, outs[0]) for out in outs) and torch.equal(alone, outs[0][1:2])
