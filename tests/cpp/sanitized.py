"""Every CPU operator from Python with an instrumented libnystrom, whose path is the argument: CTest runs this with the
sanitizers' libraries preloaded. Values are the other tests' concern; a finding ends the process."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from torch import Tensor

torch.ops.load_library(sys.argv[1])
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# B, H, H_kv, L, S, d, e, taps, masked, options
CALLS: list[tuple[int, int, int, int, int, int, int, int, bool, dict[str, Any]]] = [
    (2, 2, 2, 70, 70, 8, 8, 0, False, {}),
    (2, 3, 3, 101, 101, 5, 17, 4, True, {"num_landmarks": 20}),
    (1, 2, 2, 40, 90, 16, 24, 0, True, {"num_landmarks": 8, "scale": 0.3, "pinv_iterations": 3}),
    (2, 2, 2, 30, 30, 8, 8, 3, True, {"num_landmarks": 64}),  # exact
    (1, 2, 2, 6, 90, 8, 8, 0, True, {"num_landmarks": 8, "dropout_p": 0.2}),  # exact, few queries
    (2, 4, 2, 70, 70, 8, 8, 5, True, {"num_landmarks": 8, "enable_gqa": True, "dropout_p": 0.2}),
    (2, 2, 2, 70, 70, 8, 8, 0, True, {"num_landmarks": 8, "coefficient": "global"}),
    (2, 2, 2, 120, 120, 12, 20, 0, True, {"num_landmarks": 8, "window": 7}),
    (2, 4, 1, 120, 120, 8, 8, 3, True, {"num_landmarks": 8, "window": 9, "pinned": 5, "enable_gqa": True}),
    (1, 2, 2, 120, 120, 8, 8, 0, False, {"num_landmarks": 8, "window": 500, "pinned": 2, "dropout_p": 0.2}),
    (1, 1, 1, 1200, 1200, 16, 16, 2, True, {"num_landmarks": 8, "window": 16}),  # several chunks
    (0, 2, 2, 70, 70, 8, 8, 0, False, {"num_landmarks": 8}),
    (2, 2, 2, 0, 70, 8, 8, 0, False, {"num_landmarks": 8}),
    (2, 2, 2, 70, 0, 8, 8, 0, False, {"num_landmarks": 8}),
]


def tensor(*shape: int, dtype: torch.dtype, strided: bool) -> Tensor:
    """Leaves that require gradients; strided: a transposed view without adjacent features."""
    x = torch.randn(*shape, dtype=torch.float64).to(dtype)
    return (x.mT.contiguous().mT if strided else x).requires_grad_()


def padding(B: int, n: int) -> Tensor:
    """Holes and one sample without any token."""
    mask = torch.rand(B, n) < 0.3
    mask[B - 1 :] = B > 1
    return mask


for threads, dtype, strided, call in itertools.product((1, 4), DTYPES, (False, True), CALLS):
    B, H, H_kv, L, S, d, e, taps, masked, options = call
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shapes = [(B, H, L, d), (B, H_kv, S, d), (B, H_kv, S, e), *([(H, taps)] if taps else [])]
    x = [tensor(*shape, dtype=dtype, strided=strided) for shape in shapes]
    keys = padding(B, S) if masked else None
    queries = keys if L == S else padding(B, L) if masked else None
    extra = {"query_padding_mask": queries, "conv_weight": x[3] if taps else None, **options}
    out = torch.ops.nystrom_ext.attention(*x[:3], keys, **extra)
    gradients = torch.autograd.grad(out, x, torch.randn_like(out))
    assert all(t.isfinite().all() for t in (out, *gradients)), call

    tokens = [t.detach().transpose(1, 2).flatten(0, 1).requires_grad_() for t in x[:3]]
    cu = [torch.tensor([0, len(t) // 3, len(t) // 3, len(t)]) for t in tokens[:2]]
    extra = {"conv_weight": x[3] if taps else None, **options}
    out = torch.ops.nystrom_ext.attention_varlen(*tokens, *cu, B * L, B * S, **extra)
    gradients = torch.autograd.grad(out, [*tokens, *x[3:]], torch.randn_like(out))
    assert all(t.isfinite().all() for t in (out, *gradients)), call
print(f"{4 * len(DTYPES) * 2 * len(CALLS)} calls on {torch.ops.nystrom_ext._cpu_capability()}")
