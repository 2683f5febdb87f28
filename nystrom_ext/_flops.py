"""The operators' floating-point operations, for `torch.utils.flop_counter` and what torch builds on it: what a compiled
program computes again instead of saving (``activation_memory_budget``).

As torch counts: two per multiplication of a matrix product or a convolution, nothing else. The products are those of
csrc/mathematics.md, in its names; ignored tokens count, as shapes do not know them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from ._schema import bind

_OPS = torch.ops.nystrom_ext


class _Call:
    """The sizes of one sample and head."""

    def __init__(self, L: int, S: int, d: int, e: int, options: dict[str, Any]) -> None:
        self.L, self.S, self.d, self.e = L, S, d, e
        self.m, self.iterations, self.pinned = (options[x] for x in ("num_landmarks", "pinv_iterations", "pinned"))
        self.window = min(options["window"], S - 1)
        self.taps = 0 if options["conv_weight"] is None else options["conv_weight"].shape[1]
        self.exact = min(L, S) <= self.m or S <= self.pinned

    @property
    def in_window(self) -> int:
        """Pairs of a query and a key within the window; the pinned keys are columns of their own."""
        if self.window <= 0:
            return 0
        w, n = self.window, self.S
        pinned = sum(min(j, w) + 1 + min(n - 1 - j, w) for j in range(self.pinned))
        return n * (2 * w + 1) - w * (w + 1) - pinned

    @property
    def columns(self) -> int:
        """Pairs of a query and a landmark or a pinned key."""
        return self.L * (self.m + self.pinned)

    @property
    def in_key_pass(self) -> int:
        return self.m * (self.S - self.pinned)

    @property
    def iteration(self) -> int:
        """X = A Z, X T1, X T2, Z T3, as often as it is iterated."""
        return self.iterations * 4 * self.m**3


def _forward(c: _Call) -> int:
    convolution = c.taps * c.L * c.e
    if c.exact:
        return c.L * c.S * (c.d + c.e) + convolution
    core = c.m**2 * (c.d + c.e) + c.iteration
    return (c.in_key_pass + c.columns + c.in_window) * (c.d + c.e) + core + convolution


def _backward(c: _Call, dq: bool, dk: bool, dv: bool, dconv: bool) -> int:
    """Of the gradients that are wanted. The probabilities, A and its iteration are computed again."""
    convolution = c.taps * c.L * c.e * (dv + dconv)
    if not (dq or dk or dv):
        return convolution
    dp = dq or dk  # dV alone needs no derivative of a softmax
    attention = c.d + c.e * (dp + dv) + c.d * (dq + dk)  # P, dP, dV, dQ, dK: as of softmax attention
    if c.exact:
        return c.L * c.S * attention + convolution
    query_pass = c.columns * (c.d + c.e * (dp + 1) + c.d * (dq + dk))  # P1, dP1, dW, dQ, dKt
    query_pass += c.in_window * (c.d + c.e * dp + c.d * dq)  # P1, dP1, dQ
    core = c.m**2 * (c.d + c.e) + c.iteration  # A, Z, dU
    if dp:  # dZ, dQt, dKt, and two products for each of the iteration's
        core += c.m**2 * (c.e + c.d * (dq + dk)) + 2 * c.iteration
    key_pass = c.in_key_pass * attention  # P3, dP3, dV, dQt, dK
    if dk or dv:  # P1, dP1, dV, dK
        key_pass += c.in_window * (c.d + c.e * (dk + dv) + c.d * dk)
    return query_pass + core + key_pass + convolution


def _register(op: Any, multiplications: Callable[[_Call, dict[str, Any]], int]) -> None:
    @register_flop_formula(op, get_raw=True)
    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        a = bind(op.default, args, kwargs)
        heads, d, e = a["query"].shape[1], a["query"].shape[-1], a["value"].shape[-1]
        return 2 * heads * sum(n * multiplications(_Call(L, S, d, e, a), a) for (L, S), n in _lengths(a).items())


def _lengths(a: dict[str, Any]) -> Counter[tuple[int, int]]:
    """How many samples have so many queries and keys."""
    if a.get("cu_seqlens_q") is None:
        batch, _, L, _ = a["query"].shape
        return Counter({(L, a["key"].shape[2]): batch})
    dimension = 0 if a["query"].dim() == 3 else 2  # of the tokens: (total, H, d), inside (1, H, total, d)
    sides = ((a["cu_seqlens_q"], a["query"]), (a["cu_seqlens_k"], a["key"]))
    return Counter(zip(*(_parts(offsets, x.shape[dimension]) for offsets, x in sides), strict=True))


def _parts(offsets: Tensor, total: int) -> list[int]:
    """The lengths of packed sequences; where only shapes are known, as if they were equal."""
    if isinstance(offsets, FakeTensor) or offsets.is_meta:
        n = len(offsets) - 1
        return [total * (i + 1) // n - total * i // n for i in range(n)]
    return offsets.diff().tolist()


for _op in (_OPS.attention, _OPS.attention_varlen, _OPS._attention_forward):
    _register(_op, lambda call, _: _forward(call))
_register(_OPS._attention_backward, lambda call, a: _backward(call, *a["output_mask"]))
