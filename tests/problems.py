"""Problems to compare kernels with the reference on: shapes, masks, input regimes, and the comparison itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nystrom_ext import nystrom_attention, reference

# Relative RMS error against the float64 reference on the same (already rounded) inputs: O, dQ, dK, dV.
TOLERANCES = {
    torch.float64: (1e-10, 1e-10, 1e-10, 1e-10),
    torch.float32: (3e-5, 3e-5, 3e-5, 3e-5),
    torch.bfloat16: (4e-3, 1.2e-2, 1.2e-2, 4e-3),
    torch.float16: (2e-3, 6e-3, 6e-3, 2e-3),
}
DTYPES = tuple(TOLERANCES)


@dataclass
class Problem:
    """One call of the operator. masks: none, tail, holes, all (one sample without any key)."""

    B: int = 2
    H: int = 2
    L: int = 40
    S: int | None = None
    d: int = 8
    e: int | None = None
    m: int = 8
    taps: int = 0
    mask: str = "none"
    kv_heads: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def tensors(self, dtype: torch.dtype, inputs: Callable[..., list[Tensor]] | None = None) -> list[Tensor]:
        """query, key, value and, with taps, conv_weight: leaves that require gradients."""
        torch.manual_seed(self.seed)
        S, e, kv = self.S or self.L, self.e or self.d, self.kv_heads or self.H
        if inputs is not None:
            x = inputs(self.L, self.d, self.m)
        else:
            shapes = (self.B, self.H, self.L, self.d), (self.B, kv, S, self.d), (self.B, kv, S, e)
            x = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        if self.taps:
            x.append(torch.randn(self.H, self.taps, dtype=torch.float64))
        return [t.to(dtype).requires_grad_() for t in x]

    def masks(self) -> tuple[Tensor | None, Tensor | None]:
        """key and query padding masks; one and the same where L = S."""
        if self.mask == "none":
            return None, None
        S = self.S or self.L
        masks = tuple(padding_mask(self.mask, self.B, n) for n in (S, self.L))
        return masks if S != self.L else (masks[0], masks[0])


def padding_mask(kind: str, B: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "holes":
        mask = torch.rand(B, n, generator=generator) < 0.3
    else:
        lengths = torch.randint(1, n + 1, (B, 1), generator=generator)
        mask = torch.arange(n) >= lengths
    if kind == "all":
        mask[0] = True
    return mask


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    norm = expected.norm()
    return ((actual.double() - expected).norm() / (norm if norm > 0 else 1)).item()


def run(attention: Callable[..., Tensor], p: Problem, x: list[Tensor], grad: Tensor, **more: Any) -> list[Tensor]:
    """Output and gradients of everything in x."""
    keys, queries = (None if mask is None else mask.to(x[0].device) for mask in p.masks())
    out = attention(
        *x[:3],
        keys,
        query_padding_mask=queries,
        conv_weight=x[3] if p.taps else None,
        num_landmarks=p.m,
        enable_gqa=p.kv_heads is not None,
        **p.options,
        **more,
    )
    return [out.detach(), *torch.autograd.grad(out, x, grad.to(out))]


def check(
    p: Problem, dtype: torch.dtype, inputs: Callable[..., list[Tensor]] | None = None, device: str = "cpu"
) -> None:
    """The operator on a device against the reference on the CPU in float64, forward and backward."""
    x = p.tensors(dtype, inputs)
    exact = [t.detach().double().requires_grad_() for t in x]
    grad = torch.randn(*x[0].shape[:3], x[2].shape[3]).to(dtype)
    more: dict[str, Any] = {}
    if p.options.get("dropout_p"):
        torch.manual_seed(7)
        more["rng_state"] = torch.randint(2**63 - 1, (2,), device=device).cpu()  # the op draws its seed in the same way
        torch.manual_seed(7)
    actual = run(nystrom_attention, p, [t.detach().to(device).requires_grad_() for t in x], grad)
    expected = run(reference.nystrom_attention, p, exact, grad, **more)
    bars = (*TOLERANCES[dtype], TOLERANCES[dtype][3])
    for name, a, e, bar in zip(("out", "dquery", "dkey", "dvalue", "dconv"), actual, expected, bars, strict=False):
        assert a.dtype == dtype and a.shape == e.shape
        error = relative_rms(a.cpu(), e)
        assert error <= bar, f"{name}: relative RMS error {error:.2e} > {bar:.0e} for {p} in {dtype}"


# Input regimes (n, d, m) -> [query, key, value], each (1, 1, n, d) in float64.


def _noise(n: int, d: int) -> Tensor:
    return torch.randn(1, 1, n, d, dtype=torch.float64)


def _autoregressive(n: int, d: int, correlation: float) -> Tensor:
    x = _noise(n, d)
    for i in range(1, n):
        x[..., i, :] = correlation * x[..., i - 1, :] + (1 - correlation**2) ** 0.5 * x[..., i, :]
    return x


def smooth(n: int, d: int, m: int) -> list[Tensor]:
    """Slowly varying tokens, correlated over about a segment."""
    q, k, v = (2 * _autoregressive(n, d, 1 - m / n) for _ in range(3))
    return [q, 0.7 * (q + k), v]


def hard(n: int, d: int, m: int) -> list[Tensor]:
    """Landmarks that nearly repeat: the spectrum of A runs from 1 to 1e-4."""
    q, k, v = (1.5 * _autoregressive(n, d, 1 - m / (6 * n)) for _ in range(3))
    return [q, 0.8 * q + 0.6 * k, v]


def ring(n: int, d: int, m: int) -> list[Tensor]:
    """Points on a circle: A is a Gaussian kernel whose spectrum decays through the filter's cut-off."""
    angle = 2 * torch.pi * torch.arange(n, dtype=torch.float64) / n
    x = torch.zeros(1, 1, n, d, dtype=torch.float64)
    x[..., 0], x[..., 1] = 20 * angle.cos(), 20 * angle.sin()
    return [x + 0.05 * _noise(n, d), x + 0.05 * _noise(n, d), _noise(n, d)]


def peaked(n: int, d: int, m: int) -> list[Tensor]:
    """One cluster per segment, far apart: A is nearly the identity."""
    centres = 4 * torch.randn(m, d, dtype=torch.float64).repeat_interleave(-(-n // m), 0)[:n]
    return [centres + 0.3 * _noise(n, d), centres + 0.3 * _noise(n, d), _noise(n, d)]


def normal(n: int, d: int, m: int) -> list[Tensor]:
    return [_noise(n, d) for _ in range(3)]


REGIMES = {f.__name__: f for f in (normal, smooth, hard, ring, peaked)}
