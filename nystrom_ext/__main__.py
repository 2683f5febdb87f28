"""``python -m nystrom_ext``: how the extension was built, and a self-test of a few seconds."""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

import torch
from torch import Tensor

from . import build_info, nystrom_attention, reference

# Largest relative RMS error of the result and of the gradients, against the reference in float64 on the same inputs.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 1.2e-2, torch.float16: 6e-3}
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"num_landmarks": 300},
    "landmarks": {"num_landmarks": 32},
    "window": {"num_landmarks": 32, "window": 16, "pinned": 1},
}


def main() -> int:
    """The exit status: 0, or 1 when a result is wrong."""
    torch.set_num_threads(1)  # the results are the same bits, and on a busy machine sooner there
    for name, value in build_info().items():
        print(f"{name}: {value}")
    devices = ["cpu", *(["cuda"] if build_info()["cuda"] and torch.cuda.is_available() else [])]
    wrong = 0
    for device, (name, options), (dtype, limit) in itertools.product(devices, OPTIONS.items(), TOLERANCES.items()):
        start = time.perf_counter()
        error = largest_error(device, dtype, options)
        seconds = time.perf_counter() - start
        wrong += not error <= limit
        verdict = "ok" if error <= limit else f"WRONG, the limit is {limit:.0e}"
        print(f"{device}, {name}, {str(dtype).removeprefix('torch.')}: error {error:.1e}, {verdict} ({seconds:.2f} s)")
    print("self-test failed; please report the output above" if wrong else "self-test passed")
    return 1 if wrong else 0


def largest_error(device: str, dtype: torch.dtype, options: dict[str, Any]) -> float:
    """Forward and backward, with padding in one of two samples."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(2, 2, 300, 16, generator=generator).to(dtype) for _ in range(4)]
    ignored = torch.arange(300) >= torch.tensor([[300], [170]])
    found = _run(nystrom_attention, [t.to(device) for t in x], ignored.to(device), options)
    expected = _run(reference.nystrom_attention, [t.double() for t in x], ignored, options)
    pairs = zip(found, expected, strict=True)
    return max(((a.cpu().double() - b).norm() / b.norm()).item() for a, b in pairs)


def _run(attention: Any, x: list[Tensor], ignored: Tensor, options: dict[str, Any]) -> list[Tensor]:
    inputs = [t.requires_grad_() for t in x[:3]]
    out = attention(*inputs, ignored, query_padding_mask=ignored, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, x[3])]


if __name__ == "__main__":
    sys.exit(main())
