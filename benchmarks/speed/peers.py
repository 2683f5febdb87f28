"""The contestants: nystrom_ext, Nyström attention composed from torch's operators, other packages, other methods.

Each is compared as attention alone, on q, k, v that are already projected. Packages that offer only a layer run it with
the projections replaced: a projection returns the tensor it is given, in the memory layout that the layer's own
projection would produce, and the output projection is the identity. Convolutions are off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nystrom_ext import NystromMultiheadAttention, nystrom_attention, nystrom_attention_varlen

if TYPE_CHECKING:
    from .cases import Case


# What the README recommends for models that were never trained with landmarks.
WINDOW = {"window": 16, "pinned": 1}


@dataclass
class Contestant:
    """``run(*layout(q, k, v))`` is the result, laid out as ``merge`` lays out (B, H, n, d). Only ``run`` is timed."""

    run: Callable[..., Tensor]
    layout: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]] = lambda q, k, v: (q, k, v)
    merge: Callable[[Tensor], Tensor] = lambda out: out
    coefficient: str = "per_head"


def segment_means(x: Tensor, m: int) -> Tensor:
    """(B, H, n, d) -> (B, H, m, d); n must be a multiple of m, as in the released implementations."""
    return x.unflatten(2, (m, -1)).mean(3)


def pseudo_inverse(a: Tensor, iterations: int = 6) -> Tensor:
    """Newton-Schulz, with the constant of each head (arXiv 2102.03902, equation 14)."""
    z = a.mT / a.sum(-2).amax(-1)[..., None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        x = a @ z
        z = 0.25 * z @ (13 * eye - x @ (15 * eye - x @ (7 * eye - x)))
    return z


def ours(case: Case) -> Contestant:
    return Contestant(lambda q, k, v: nystrom_attention(q, k, v, num_landmarks=case.m))


def ours_windowed(case: Case) -> Contestant:
    return Contestant(lambda q, k, v: nystrom_attention(q, k, v, num_landmarks=case.m, **WINDOW))


def ours_padded(case: Case) -> Contestant:
    """The second half of every sample is padding."""
    ignore = (torch.arange(case.n, device=case.device) >= case.n // 2).expand(case.batch, -1)
    return Contestant(
        lambda q, k, v: nystrom_attention(q, k, v, ignore, query_padding_mask=ignore, num_landmarks=case.m)
    )


def lengths(case: Case) -> list[int]:
    """Of a batch whose samples are shorter than n, but for the first: 32 to n tokens, which fill about 35 % of it."""
    drawn = torch.rand(case.batch - 1, generator=torch.Generator().manual_seed(0)).square()
    return [case.n, *(32 + (drawn * (case.n - 32)).long()).tolist()]


def ignored(case: Case) -> Tensor:
    """(B, n) bool: the places that `lengths` leaves."""
    return torch.arange(case.n, device=case.device) >= torch.tensor(lengths(case), device=case.device)[:, None]


def ours_ragged(case: Case) -> Contestant:
    """A padded batch with a mask, the heads of a token side by side, as modules have it."""
    mask = ignored(case)
    return Contestant(
        lambda q, k, v: nystrom_attention(q, k, v, mask, query_padding_mask=mask, num_landmarks=case.m),
        lambda *x: tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in x),
    )


def ours_packed(case: Case) -> Contestant:
    """The tokens of the same batch without the padding."""
    tokens = ~ignored(case)
    return Contestant(
        _packed(lengths(case), case),
        lambda *x: tuple(t.transpose(1, 2)[tokens] for t in x),
        lambda out: out.transpose(1, 2)[tokens],
    )


def one_long(case: Case) -> list[int]:
    """Lengths of 31 short sequences behind a long one, together n."""
    short = min(64, case.n // 64)
    return [case.n - 31 * short, *[short] * 31]


def ours_one_long(case: Case) -> Contestant:
    return Contestant(
        _packed(one_long(case), case),
        lambda *x: tuple(t[0].transpose(0, 1).contiguous() for t in x),
        lambda out: out[0].transpose(0, 1),
    )


def _packed(of: list[int], case: Case) -> Callable[..., Tensor]:
    cu, longest = torch.tensor([0, *of], device=case.device).cumsum(0), max(of)
    return lambda q, k, v: nystrom_attention_varlen(q, k, v, cu, cu, longest, longest, num_landmarks=case.m)


def eager(case: Case) -> Contestant:
    """The paper's formula: three explicit softmax matrices."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        qt, kt = segment_means(q, case.m), segment_means(k, case.m)
        p1, a, p3 = (q @ kt.mT).softmax(-1), (qt @ kt.mT).softmax(-1), (qt @ k.mT).softmax(-1)
        return (p1 @ pseudo_inverse(a)) @ (p3 @ v)

    return Contestant(attention)


def two_sdpa(case: Case) -> Contestant:
    """What a careful user writes today: both passes as scaled_dot_product_attention, the core as batched products."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if case.n % case.m:  # zeros in front, as the package has them: other means, the same work
            q, k, v = (F.pad(x, (0, 0, -case.n % case.m, 0)) for x in (q, k, v))
        qt, kt = segment_means(q, case.m), segment_means(k, case.m)
        u = F.scaled_dot_product_attention(qt, k, v)
        a = (q.shape[-1] ** -0.5 * qt @ kt.mT).softmax(-1)
        return F.scaled_dot_product_attention(q, kt, pseudo_inverse(a) @ u)[:, :, -case.n :]

    return Contestant(attention)


def two_sdpa_compiled(case: Case) -> Contestant:
    torch._dynamo.reset()  # every shape gets code of its own: the fastest that torch.compile can do
    return Contestant(torch.compile(two_sdpa(case).run, dynamic=False, fullgraph=True))


def exact(case: Case) -> Contestant:
    """torch's choice of kernel; on a GPU FlashAttention, which 16-bit inputs need."""
    if case.device == "cpu" or getattr(torch, case.dtype).itemsize > 2:
        return Contestant(F.scaled_dot_product_attention)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    return Contestant(attention)


class Given(nn.Module):
    """Stands for a projection whose result is known: the input of the layer, or ``tensor``."""

    tensor: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.tensor is None else self.tensor


def merged(x: Tensor) -> Tensor:
    """(B, H, n, d) -> (B, n, H d), contiguous, as a linear layer leaves it."""
    return x.transpose(1, 2).flatten(2)


def _finish(module: nn.Module, case: Case) -> nn.Module:
    return module.to(case.device, getattr(torch, case.dtype)).requires_grad_(False)


def _of_layer(layer: nn.Module, names: tuple[str, str, str], case: Case, coefficient: str = "per_head") -> Contestant:
    """A layer with three projections of these names; its learned parameters get no gradient."""
    projections = [Given() for _ in names]
    for name, projection in zip(names, projections, strict=True):
        setattr(layer, name, projection)
    layer = _finish(layer, case)

    def run(*qkv: Tensor) -> Tensor:
        for projection, tensor in zip(projections, qkv, strict=True):
            projection.tensor = tensor
        out = layer(qkv[0])
        return out[0] if isinstance(out, tuple) else out

    return Contestant(
        run,
        lambda q, k, v: (merged(q), merged(k), merged(v)),
        merged,
        coefficient,
    )


def lucidrains(case: Case) -> Contestant:
    from nystrom_attention import NystromAttention

    layer = NystromAttention(case.heads * case.d, case.d, case.heads, num_landmarks=case.m, residual=False)
    layer.to_qkv, layer.to_out = Given(), Given()
    return Contestant(
        _finish(layer, case),
        lambda q, k, v: (torch.cat([merged(q), merged(k), merged(v)], -1),),
        merged,
        "global",
    )


def huggingface(case: Case) -> Contestant:
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = NystromformerConfig(
        hidden_size=case.heads * case.d,
        num_attention_heads=case.heads,
        num_landmarks=case.m,
        segment_means_seq_len=case.n,
        attention_probs_dropout_prob=0.0,
    )
    layer = NystromformerSelfAttention(config)
    layer.conv_kernel_size = None
    return _of_layer(layer, ("query", "key", "value"), case, "global")


def _module(case: Case, module: nn.Module) -> Contestant:
    """The default call, which asks for weights, with projections that change nothing and cost what they cost."""
    eye = torch.eye(case.heads * case.d)
    module.load_state_dict({"in_proj_weight": eye.repeat(3, 1), "out_proj.weight": eye}, strict=False)
    module = _finish(module, case)
    return Contestant(lambda *x: module(*x)[0], lambda *x: tuple(map(merged, x)), merged)


def stock_module(case: Case) -> Contestant:
    return _module(case, nn.MultiheadAttention(case.heads * case.d, case.heads, batch_first=True))


def our_module(case: Case, **options: str) -> Contestant:
    width, landmarks = case.heads * case.d, case.m
    return _module(
        case,
        NystromMultiheadAttention(width, case.heads, batch_first=True, num_landmarks=landmarks, **options),
    )


def linformer(case: Case) -> Contestant:
    """Keys and values projected to m rows."""
    from linformer import LinformerSelfAttention

    layer = LinformerSelfAttention(case.heads * case.d, case.n, k=case.m, heads=case.heads)
    layer.to_out = Given()
    return _of_layer(layer, ("to_q", "to_k", "to_v"), case)


def performer(case: Case) -> Contestant:
    """The package's default number of random features, d log d."""
    from performer_pytorch import FastAttention

    return Contestant(_finish(FastAttention(case.d), case))


def reformer(case: Case) -> Contestant:
    """The package's defaults, 8 hashes and buckets of 64; its queries are its keys."""
    from reformer_pytorch import LSHAttention

    attention = _finish(LSHAttention(), case)
    return Contestant(
        lambda qk, v: attention(qk, v)[0],
        lambda q, k, v: (q.flatten(0, 1), v.flatten(0, 1)),
        lambda out: out.flatten(0, 1),
    )


# name: kind, builder. A builder raises ImportError where its package is missing.
BUILDERS: dict[str, tuple[str, Callable[[Case], Contestant]]] = {
    "nystrom_ext": ("ours", ours),
    "with window": ("windowed", ours_windowed),
    "eager": ("composition", eager),
    "two SDPA": ("composition", two_sdpa),
    "two SDPA compiled": ("composition", two_sdpa_compiled),
    "lucidrains": ("package", lucidrains),
    "Hugging Face": ("package", huggingface),
    "exact SDPA": ("exact", exact),
    "Linformer": ("rival", linformer),
    "Performer": ("rival", performer),
    "Reformer": ("rival", reformer),
    "nn.MultiheadAttention": ("stock", stock_module),
    "NystromMultiheadAttention": ("module", our_module),
    'with need_weights="never"': ("module", partial(our_module, need_weights="never")),
    "nystrom_ext, padded": ("padded", ours_padded),
    "nystrom_ext, ragged": ("ragged", ours_ragged),
    "nystrom_ext, packed": ("ragged", ours_packed),
    "nystrom_ext, one long": ("one long", ours_one_long),
}
KINDS = {name: kind for name, (kind, _) in BUILDERS.items()}
NAMES = tuple(name for name, kind in KINDS.items() if kind not in ("stock", "module", "padded", "ragged", "one long"))
PACKAGES = {
    "lucidrains": "nystrom-attention",
    "Hugging Face": "transformers",
    "Linformer": "linformer",
    "Performer": "performer-pytorch",
    "Reformer": "reformer-pytorch",
}


def build(name: str, case: Case) -> Contestant:
    """The contestant, ready for inputs of this case."""
    return BUILDERS[name][1](case)
