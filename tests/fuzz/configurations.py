"""Configurations of the operator by number: shapes around every border, masks, memory layouts, options."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tests.problems import DTYPES, Problem, layouts, padding_mask

LANDMARKS = (1, 2, 8, 8, 32, 32, 64, 64, 100, 128, 256)
HEAD_DIMS = (1, 3, 8, 16, 32, 40, 64, 80, 96, 128, 192)
TAPS = (0, 0, 0, 0, 1, 2, 3, 32, 33, 65)
NEAR = (0, 0, 0, 1, 5, 16, 70)
PINNED = (0, 0, 0, 1, 4, 70)
MASKS = (*3 * ("none", "holes", "tail"), "sparse", "all", "everything")
ROLES = ("query", "key", "value", "conv_weight", "grad")
# as users have them, then what only views make: a size of one with a stride of its own, and strides of 0
CONTIGUOUS, JOINED = "contiguous", "heads inside"
LAYOUTS = (CONTIGUOUS, JOINED, CONTIGUOUS, JOINED, "sequence first", "features outside", "offset and gaps")
LAYOUTS += ("misaligned", "odd strides", "one sample", "one head", "one token", "one number")
EXPANDED = {"one sample": (0,), "one head": (1,), "one token": (2,), "one number": (0, 1, 2, 3)}
# Elements that the reference touches, about 0.3 ns each: it is dense, and Philox in PyTorch is long.
WORK, MUCH_WORK, WORK_IN_EMULATOR = 4e8, 4e9, 3e7
LONGEST_IN_EMULATOR = 300


@dataclass
class Configuration(Problem):
    """A problem with the dtype, what wants a gradient, and where everything lies."""

    dtype: torch.dtype = torch.float32
    query_mask: str = "same"
    mask_layout: str = CONTIGUOUS
    layout: dict[str, str] | None = None
    wanted: tuple[str, ...] = ROLES[:4]
    magnitude: float = 1.0

    def masks(self) -> tuple[Tensor | None, Tensor | None]:
        keys = self._mask(self.mask, self.keys, self.seed)
        if self.query_mask in ("same", "equal"):
            return keys, keys.clone() if self.query_mask == "equal" and keys is not None else keys
        return keys, self._mask(self.query_mask, self.L, self.seed + 1)

    def _mask(self, kind: str, n: int, seed: int) -> Tensor | None:
        if kind == "none":
            return None
        mask = padding_mask(kind, self.B, n, seed)
        if self.mask_layout == "gaps":
            return torch.stack([mask, ~mask], 2).flatten(1)[:, ::2]
        return mask[-1:].expand(self.B, n) if self.mask_layout == "one sample" else mask

    def values(self) -> list[Tensor]:
        """query, key, value, conv_weight if any, and the output's gradient; contiguous, without gradients."""
        x = [t.detach() for t in self.tensors(self.dtype)]
        x = [self.magnitude * x[0], self.magnitude * x[1], *x[2:]]
        return [*x, torch.randn(self.B, self.H, self.L, x[2].shape[3], dtype=torch.float64).to(self.dtype)]

    def place(self, x: list[Tensor]) -> list[Tensor]:
        """`values`, wherever they are, in their memory layouts and with their wishes for gradients."""
        roles = ROLES if self.taps else (*ROLES[:3], ROLES[4])
        placed = [self._place(t, role) for t, role in zip(x, roles, strict=True)]
        return [t.requires_grad_(role in self.wanted) for t, role in zip(placed, roles, strict=True)]

    def _place(self, x: Tensor, role: str) -> Tensor:
        name = (self.layout or {}).get(role, CONTIGUOUS)
        if x.dim() < 4:
            return self._place(x[None, None], role)[0, 0].detach()
        if name == "odd strides":
            return x.as_strided(x.shape, [977 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)])
        for dim in EXPANDED.get(name, ()):
            x = x.narrow(dim, 0, min(1, x.shape[dim])).expand_as(x)
        return x.clone() if name == CONTIGUOUS else layouts(x).get(name, x)

    def __str__(self) -> str:
        """What differs from the defaults, in words."""
        parts = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "layout":
                value = {role: name for role, name in (value or {}).items() if name != CONTIGUOUS}
            if value not in (None, {}) and (f.name in "BHLSdem" or value != f.default):
                parts.append(f"{f.name}={value}")
        return " ".join(parts)


def work(p: Configuration) -> float:
    """About how many elements the reference touches, forward and backward."""
    L, S, m, d, e = p.L, p.keys, p.m, p.d, p.e or p.d
    window, pinned = p.options.get("window", 0), min(p.options.get("pinned", 0), S)
    columns, segments = S, 0
    if min(L, S) > m:
        columns, segments = m, m * (d * (L + S) + S * (d + e) / 16 + m * m)
        columns += L + pinned if window or pinned else 0
    dense = L * columns * (40 + (d + e) / 4 + (300 if p.options.get("dropout_p") else 0))
    return p.B * p.H * (dense + 4 * segments + 8 * p.taps * L * e + 40 * (L + S) * (d + e))


def draw(rng: random.Random, length: Any) -> Configuration:
    """Anything; what does not go together is left out rather than refused."""
    m, H, e = rng.choice(LANDMARKS), rng.randint(1, 9), rng.choice(HEAD_DIMS)
    lengths = {"any": rng.randint(1, 65), "m": m + rng.randint(-1, 1), "some": rng.randint(66, 300)}
    lengths |= {"tile": rng.randint(127, 129), "thousand": rng.randint(1000, 1100), "chunks": 4097, "none": 0}
    L, S = (lengths[kind] for kind in length)
    p = Configuration(B=rng.randint(1, 4), H=H, L=L, S=S, d=rng.choice((e, rng.choice(HEAD_DIMS))), e=e, m=m)
    p.dtype, p.seed, p.magnitude = rng.choice(DTYPES), rng.getrandbits(32), rng.choice((0.3, 1.0, 1.0, 2.0))
    p.mask, p.mask_layout = rng.choice(MASKS), rng.choice((CONTIGUOUS, CONTIGUOUS, "gaps", "one sample"))
    p.query_mask = rng.choice(("same", "same", "equal", *MASKS) if L == S else MASKS)
    one = rng.choice((None, None, *LAYOUTS[:2]))  # all alike, as in most programs
    p.layout = {role: one or rng.choice(LAYOUTS) for role in ROLES}
    p.wanted = ROLES[:4] if rng.random() < 0.6 else tuple(role for role in ROLES[:4] if rng.random() < 0.5)
    if rng.random() < 0.3:
        p.kv_heads = rng.choice([n for n in range(1, H + 1) if H % n == 0])
    if L == S:
        p.taps = rng.choice(TAPS)
        near = rng.choice((*NEAR, m, max(L - 1, 0))), rng.choice((*PINNED, max(L - 1, 0), L))
        if any(near):
            p.options |= {"window": near[0], "pinned": near[1]}
            p.query_mask = rng.choice(("same", "equal"))
    if rng.random() < 0.2:  # what is not padding on the right has no packed form
        p.packed, p.mask_layout = True, CONTIGUOUS
        p.mask, p.query_mask = (rng.choice(("none", "tail", "all", "everything")) for _ in range(2))
        if L == S and (p.taps or p.options):
            p.query_mask = "equal"
    p.options |= {"coefficient": "global"} if rng.random() < 0.2 else {}
    p.options |= {"dropout_p": rng.choice((0.1, 0.5, 0.5, 1.0))} if rng.random() < 0.2 else {}
    p.options |= {"scale": rng.choice((0.0, -0.7, 0.2))} if rng.random() < 0.1 else {}
    if rng.random() < 0.1:
        p.options |= {"pinv_iterations": rng.choice((0, 1, 7))}
        # Z then still depends on c, a maximum, which equal columns of A would share: rounding chooses the gradient
        p.layout |= {role: CONTIGUOUS for role in ("query", "key") if p.layout[role] in EXPANDED}
    return p


def configuration(seed: int, number: int, small: bool = False) -> Configuration:
    """A pure function of its arguments; small: for the emulator."""
    rng = random.Random(f"{seed} {number}")
    kinds = ["any", "m", "some", "tile", "thousand", "chunks", "none"]
    most = WORK_IN_EMULATOR if small else MUCH_WORK if rng.random() < 0.02 else WORK
    weights = (5, 3, 5, 4, 0 if small else 4, 0 if small else 1, 0.4)
    length = rng.choices(kinds, weights, k=1) * 2 if rng.random() < 0.6 else rng.choices(kinds, weights, k=2)
    while True:  # the lengths are drawn once, so that long ones are as frequent as they should be
        p = draw(rng, length)
        if work(p) <= most and not (small and max(p.L, p.keys) > LONGEST_IN_EMULATOR):
            return p
