"""Problems to compare kernels with the reference on: shapes, masks, input regimes, and the comparison itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nystrom_ext import nystrom_attention, nystrom_attention_varlen, reference

# Relative RMS error against the float64 reference on the same (already rounded) inputs: O, dQ, dK, dV.
TOLERANCES = {
    torch.float64: (1e-10, 1e-10, 1e-10, 1e-10),
    torch.float32: (3e-5, 3e-5, 3e-5, 3e-5),
    torch.bfloat16: (4e-3, 1.2e-2, 1.2e-2, 4e-3),
    torch.float16: (2e-3, 6e-3, 6e-3, 2e-3),
}
DTYPES = tuple(TOLERANCES)
IGNORED = {"holes": 0.3, "sparse": 0.9, "everything": 1.1}  # which part of the tokens


@dataclass
class Problem:
    """One call of the operator. masks: none, tail, holes, sparse, all (one sample without any key), everything. packed:
    through nystrom_attention_varlen, without the tokens that are ignored."""

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
    packed: bool = False

    @property
    def attention(self) -> Callable[..., Tensor]:
        return packed_attention if self.packed else nystrom_attention

    @property
    def keys(self) -> int:
        return self.L if self.S is None else self.S

    def tensors(self, dtype: torch.dtype, inputs: Callable[..., list[Tensor]] | None = None) -> list[Tensor]:
        """query, key, value and, with taps, conv_weight: leaves that require gradients."""
        torch.manual_seed(self.seed)
        S, e, kv = self.keys, self.e or self.d, self.kv_heads or self.H
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
        masks = tuple(padding_mask(self.mask, self.B, n) for n in (self.keys, self.L))
        return masks if self.keys != self.L else (masks[0], masks[0])


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, *, query_padding_mask: Tensor | None, **options: Any
) -> Tensor:
    """nystrom_attention of a padded batch by way of packed sequences; ignored queries get zeros."""
    (B, H, L, _), S = query.shape, key.shape[2]
    masks = ((query_padding_mask, L), (keys, S))
    valid_q, valid_k = (query.new_ones(B, n, dtype=torch.bool) if mask is None else ~mask for mask, n in masks)
    tokens = (x.transpose(1, 2)[valid] for x, valid in ((query, valid_q), (key, valid_k), (value, valid_k)))
    lengths_q, lengths_k = (valid.sum(1) for valid in (valid_q, valid_k))
    cu_q, cu_k = (torch.nn.functional.pad(lengths.cumsum(0), (1, 0)) for lengths in (lengths_q, lengths_k))
    longest = (L, S) if query.is_cuda else (None, None)
    out = nystrom_attention_varlen(*tokens, cu_q, cu_k if S != L else cu_k.int(), *longest, **options)
    places = valid_q.flatten().nonzero()[:, 0]
    padded = out.new_zeros(B * L, H, value.shape[3]).index_copy(0, places, out)
    return padded.unflatten(0, (B, L)).transpose(1, 2)


def padding_mask(kind: str, B: int, n: int, seed: int = 1) -> Tensor:
    """(B, n) bool, True = ignore."""
    generator = torch.Generator().manual_seed(seed)
    if kind in IGNORED:
        mask = torch.rand(B, n, generator=generator) < IGNORED[kind]
    else:
        lengths = torch.randint(1, max(n, 1) + 1, (B, 1), generator=generator)
        mask = torch.arange(n) >= lengths
    if kind == "all":
        mask[0] = True
    return mask


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in memory layouts that users have."""
    B, H, n, d = x.shape
    wide = x.new_full((B, H, n + 3, 2 * d), torch.nan)
    wide[:, :, 3:, ::2] = x
    shifted = x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape)
    return {
        "heads inside": x.transpose(1, 2).contiguous().transpose(1, 2),
        "sequence first": x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        "features outside": x.transpose(2, 3).contiguous().transpose(2, 3),
        "offset and gaps": wide[:, :, 3:, ::2],
        "misaligned": shifted.copy_(x),
    }


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """So that reading what nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    norm = expected.norm()
    return ((actual.double() - expected).norm() / (norm if norm > 0 else 1)).item()


def run(attention: Callable[..., Tensor], p: Problem, x: list[Tensor], grad: Tensor, **more: Any) -> list[Tensor]:
    """Output and gradients of everything in x that wants one."""
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
    wanted = [t for t in x if t.requires_grad]
    return [out.detach(), *(torch.autograd.grad(out, wanted, grad.to(out)) if wanted else ())]


def run_seeded(p: Problem, x: list[Tensor], grad: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """The operator's results, and what makes the reference drop the same entries."""
    more = {}
    if p.options.get("dropout_p"):
        torch.manual_seed(7)
        more["rng_state"] = torch.randint(2**63 - 1, (2,), device=x[0].device).cpu()  # as the op draws its seed
        torch.manual_seed(7)
    return run(p.attention, p, x, grad), more


def names(x: list[Tensor]) -> list[str]:
    """Of the results of `run`."""
    gradients = ("dquery", "dkey", "dvalue", "dconv")
    return ["out", *(name for name, t in zip(gradients, x, strict=False) if t.requires_grad)]


def bar(name: str, dtype: torch.dtype) -> float:
    return TOLERANCES[dtype][{"out": 0, "dquery": 1, "dkey": 2, "dvalue": 3, "dconv": 3}[name]]


def check(
    p: Problem, dtype: torch.dtype, inputs: Callable[..., list[Tensor]] | None = None, device: str = "cpu"
) -> None:
    """The operator on a device against the reference on the CPU in float64, forward and backward."""
    x = p.tensors(dtype, inputs)
    exact = [t.detach().double().requires_grad_() for t in x]
    grad = torch.randn(*x[0].shape[:3], x[2].shape[3]).to(dtype)
    actual, more = run_seeded(p, [t.detach().to(device).requires_grad_() for t in x], grad)
    expected = run(reference.nystrom_attention, p, exact, grad, **more)
    for name, a, e in zip(names(x), actual, expected, strict=True):
        assert a.dtype == dtype and a.shape == e.shape
        error = relative_rms(a.cpu(), e)
        assert error <= bar(name, dtype), (
            f"{name}: relative RMS error {error:.2e} > {bar(name, dtype):.0e} for {p} in {dtype}"
        )


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
