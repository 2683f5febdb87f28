"""The operators' floating-point operations, for `torch.utils.flop_counter` and what torch builds on it: what a compiled
program computes again instead of saving (``activation_memory_budget``).

As torch counts: two per multiplication of a matrix product or a convolution, nothing else. The products are those of
csrc/mathematics.md, in its names; ignored tokens count, as shapes do not know them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ._schema import bind

_OPS = torch.ops.nystrom_ext


class _Call:
    """The sizes of a call, from the shapes and options that the operator was given, by name."""

    def __init__(self, a: dict[str, Any]) -> None:
        self.batch, self.heads, self.L, self.d = a["query"]
        self.S, self.e = a["value"][2:]
        self.m, self.iterations, self.pinned = a["num_landmarks"], a["pinv_iterations"], a["pinned"]
        self.window = min(a["window"], self.S - 1)
        self.taps = a["conv_weight"][1] if a["conv_weight"] else 0
        self.exact = min(self.L, self.S) <= self.m or self.S <= self.pinned

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


def _register(op: Any, multiplications: Callable[[dict[str, Any]], int]) -> None:
    @register_flop_formula(op)
    def formula(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        a = bind(op.default, args, kwargs)
        batch, heads = a["query"][:2]
        return 2 * batch * heads * multiplications(a)


_register(_OPS.attention, lambda a: _forward(_Call(a)))
_register(_OPS._attention_forward, lambda a: _forward(_Call(a)))
_register(_OPS._attention_backward, lambda a: _backward(_Call(a), *a.get("output_mask", (True,) * 4)))
