"""`preset`: where the operator computes what another implementation computes. `attention`: the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._warnings import warn_once
from ..functional import nystrom_attention
from . import formulas


@dataclass(frozen=True)
class Implementation:
    """One released implementation.

    ``cut`` says how it cuts n tokens into m segments: "equal" needs n % m == 0, "late" makes the last n % m segments
    one token longer, "last" gives the last one the remainder, "pad" puts zeros on the left up to a multiple of m.
    """

    formula: Callable[..., tuple[Tensor, Tensor]]
    cut: str
    coefficient: str
    takes_mask: bool = True
    num_landmarks: int = 64

    def options(self) -> dict[str, Any]:
        """The implementation's own options with their defaults: the keyword-only parameters of its formula."""
        return dict(self.formula.__kwdefaults__ or {})


IMPLEMENTATIONS = {
    "official": Implementation(formulas.official, "equal", "global"),
    "official_exact": Implementation(formulas.official_exact, "equal", "per_head"),
    "t2t": Implementation(formulas.t2t, "late", "per_head", takes_mask=False),
    "huggingface": Implementation(formulas.huggingface, "equal", "global"),
    "lucidrains": Implementation(formulas.lucidrains, "pad", "global", num_landmarks=256),
    "xformers": Implementation(formulas.xformers, "late", "per_head"),
    "flashnystrom": Implementation(formulas.flashnystrom, "last", "per_head", takes_mask=False),
}
ALIASES = {"hf": "huggingface"}

_LEAKS = (
    "xformers' NystromAttention with causal=True is not causal beyond num_landmarks tokens: results depend on later "
    "queries and keys, and of the values on the first num_landmarks alone; raise num_landmarks to the length for exact "
    "causal attention"
)


def preset(
    name: str,
    *,
    num_landmarks: int | None = None,
    pinv_iterations: int = 6,
    length: int | None = None,
    key_length: int | None = None,
    masked: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """The options under which `nystrom_attention` computes what ``name`` computes; without ``scale``, which only t2t
    has, those of `NystromMultiheadAttention` too.

    They hold without padding and, for n tokens and m landmarks,

    ==================================  ===========================================================================
    official, official_exact,           n % m == 0, n > m; or any n if the configured ``seq_len`` is m (exact)
    huggingface
    lucidrains                          n % m == 0, n > m (:func:`attention` also fuses n % m != 0)
    t2t                                 n % m in (0, 1, m - 1), n > m
    xformers                            L and S % m in (0, 1, m - 1), L > m; or any L with S <= m (exact)
    flashnystrom                        n % m in (0, 1), n > m, ``kappa_star=0``
    ==================================  ===========================================================================

    with convolution or without. Elsewhere only :func:`attention` reproduces the implementation.

    Args:
        name: official, official_exact (its per-matrix constant), t2t, huggingface or hf, lucidrains, xformers,
            flashnystrom.
        num_landmarks: m; default 64, lucidrains 256.
        length, key_length: L and S (default: L), to have the table checked; without them it is up to the caller.
        masked: whether there is padding.
        options: the implementation's own options, see :func:`attention`.

    Returns:
        Keyword arguments for `nystrom_attention`: num_landmarks, pinv_iterations, coefficient and, for t2t, scale.

    Raises:
        ValueError: an unknown name or option, or facts under which the two differ; the message says why.
    """
    which = _implementation(name)
    m = which.num_landmarks if num_landmarks is None else num_landmarks
    options = _options(name, which, options)
    S = length if key_length is None else key_length
    if length is not None and S is not None:
        _check_lengths(name, which, length, S, m, options)
    reason = _difference(which, length, S, m, masked, options)
    if reason is not None:
        raise ValueError(f"{name} {reason}, so that nystrom_attention does not reproduce it; use compat.attention")
    return _settings(which, S, m, pinv_iterations, options)


def attention(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    num_landmarks: int | None = None,
    pinv_iterations: int = 6,
    conv_weight: Tensor | None = None,
    fused: bool = True,
    **options: Any,
) -> Tensor:
    """What the implementation ``name`` computes between its input and output projections, whatever the shape and mask.

    Where the two coincide (:func:`preset`), and for lucidrains without a mask also where n % m != 0, the operator
    computes it; elsewhere PyTorch operators do. Dropout is left to the caller.

    Args:
        name: as for :func:`preset`.
        query: (B, H, L, d) after the projection; floating point, 16-bit types are computed in float32.
        key, value: (B, H, S, d) and (B, H, S, e), S = L except for xformers without mask and convolution.
        mask: (B, S) bool or integer, **True = keep** as in these implementations, the opposite of
            ``key_padding_mask``. Or what the implementation itself takes: official multiplies by a floating-point
            (B, S), 1 = keep; huggingface adds (B, 1, 1, S) to the scores; xformers adds (B, S), exactly -inf = ignore,
            and gives NaN to samples without any key. t2t and flashnystrom take none.
        num_landmarks: default 64, lucidrains 256.
        conv_weight: (H, taps) or (H, 1, taps, 1), taps odd: added depthwise convolution of the values. Padding leaks
            through it in huggingface and xformers.
        fused: False always computes with PyTorch operators, which can be differentiated twice.
        options: the implementation's own: ``seq_len`` (official, official_exact, huggingface), the *configured* length,
            default L, exact attention if it equals m; ``scale`` (t2t); ``eps`` (lucidrains); ``causal``,
            ``use_razavi_pinverse``, ``pinverse_original_init``, ``landmark_pooling`` (xformers); ``kappa_star``
            (flashnystrom). Where S > num_landmarks, ``causal`` lets the future through and drops the
            values after the first num_landmarks; it warns of that once.

    Returns:
        (B, H, L, e). Left out are what surrounds it, such as the ``+ v`` of t2t.

    Raises:
        ValueError: unknown names and options; inputs with which the implementation itself fails, gives NaN or, as
            official and huggingface for L != seq_len, mixes the samples of a batch.
    """
    which = _implementation(name)
    m = which.num_landmarks if num_landmarks is None else num_landmarks
    options = _options(name, which, options)
    _check_tensors(name, which, query, key, value, mask)
    _check_lengths(name, which, query.shape[-2], key.shape[-2], m, options)
    if options.get("causal") and not _is_exact(which, key.shape[-2], m, options):
        warn_once(attention, _LEAKS)
    conv_weight = None if conv_weight is None else _taps(name, conv_weight, query, key)
    padding = -query.shape[-2] % m if which.cut == "pad" else 0
    if padding:
        query, key, value = (F.pad(x, (0, 0, padding, 0)) for x in (query, key, value))
        mask = None if mask is None else F.pad(mask, (padding, 0))
    L, S = query.shape[-2], key.shape[-2]
    if fused and _difference(which, L, S, m, mask is not None, options) is None:
        settings = _settings(which, S, m, pinv_iterations, options)
        out = nystrom_attention(query, key, value, conv_weight=conv_weight, **settings)
    else:
        out = _in_pytorch(which, query, key, value, mask, m, pinv_iterations, conv_weight, options)
    return out[..., padding:, :]


def _in_pytorch(
    which: Implementation,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    m: int,
    iterations: int,
    conv_weight: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    dtype = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
    with torch.autocast(query.device.type, enabled=False):  # the iteration does not survive 16 bits
        q, k, v = (x.to(dtype) for x in (query, key, value))
        if mask is not None:
            mask = mask.to(dtype) if mask.is_floating_point() else mask.bool()
        out, values = which.formula(q, k, v, mask, m, iterations, **options)
        if conv_weight is not None:
            H, taps = conv_weight.shape
            out = out + F.conv2d(values, conv_weight.to(dtype)[:, None, :, None], padding=(taps // 2, 0), groups=H)
    device = query.device.type
    autocast = torch.is_autocast_enabled(device) and query.dtype != torch.float64  # as for the operator
    return out.to(torch.get_autocast_dtype(device) if autocast else query.dtype)


def _implementation(name: str) -> Implementation:
    name = ALIASES.get(name, name)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r}; known are {_listed([*IMPLEMENTATIONS, *ALIASES])}")
    return IMPLEMENTATIONS[name]


def _options(name: str, which: Implementation, given: dict[str, Any]) -> dict[str, Any]:
    known = which.options()
    for option in given:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}; it has {_listed(known)}")
    return {**known, **given}


def _is_exact(which: Implementation, S: int, m: int, options: dict[str, Any]) -> bool:
    """Whether the implementation computes exact softmax attention."""
    if which.cut == "equal":
        return m == (options["seq_len"] or S)
    return which.formula is formulas.xformers and m >= S


def _difference(
    which: Implementation, L: int | None, S: int | None, m: int, masked: bool, options: dict[str, Any]
) -> str | None:
    """Why the operator does not compute what ``which`` computes, or None where it does."""
    if masked:
        return "treats padding in its own way"
    for name in ("causal", "landmark_pooling", "kappa_star"):
        if options.get(name):
            return f"is given {name}, which the operator does not have"
    if not options.get("use_razavi_pinverse", True):
        return "is given use_razavi_pinverse=False, which the operator does not have"
    if L is None or S is None or _is_exact(which, S, m, options):
        return None
    if min(L, S) <= m:
        return f"approximates {min(L, S)} <= num_landmarks={m} tokens, where the operator is exact"
    # The operator's bounds are floor(j n / m): with one token over, its last segment is the longer one; with m - 1
    # tokens over, its first segment is the shorter one.
    same = {"equal": (0,), "pad": (0,), "last": (0, 1), "late": (0, 1, m - 1)}[which.cut]
    for n in (L, S):
        if n % m not in same:
            return f"cuts {n} tokens into other segments with num_landmarks={m}"
    return None


def _settings(which: Implementation, S: int | None, m: int, iterations: int, options: dict[str, Any]) -> dict[str, Any]:
    coefficient = "global" if options.get("pinverse_original_init") else which.coefficient
    if S is not None and _is_exact(which, S, m, options):
        m = max(m, S)  # the operator is exact from S landmarks on
    settings = {"num_landmarks": m, "pinv_iterations": iterations, "coefficient": coefficient}
    return settings if options.get("scale") is None else {**settings, "scale": options["scale"]}


def _check_lengths(name: str, which: Implementation, L: int, S: int, m: int, options: dict[str, Any]) -> None:
    """ValueError for lengths with which the implementation itself fails or computes nonsense."""
    if m < 1:
        raise ValueError(f"num_landmarks must be at least 1, got {m}")
    if L != S and (which.formula is not formulas.xformers or options["causal"]):
        causal = " with causal=True" if options.get("causal") else ""
        raise ValueError(f"{name}{causal} is self-attention, got {L} queries and {S} keys")
    if _is_exact(which, S, m, options):
        return
    if which.cut == "equal":
        seq_len = options["seq_len"] or S
        if seq_len != S:
            raise ValueError(
                f"{name} configured for seq_len={seq_len} fails or mixes the samples of a batch when given {S} tokens; "
                f"pad or cut them to seq_len, or pass seq_len={S}"
            )
        if S % m:
            raise ValueError(f"{name} needs a multiple of num_landmarks={m} tokens, got {S}; pad the sequence")
    if which.cut in ("late", "last") and min(L, S) < m:
        raise ValueError(f"{name} has no tokens for some of its {m} segments with {min(L, S)}; lower num_landmarks")


def _check_tensors(
    name: str, which: Implementation, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> None:
    shapes = [tuple(x.shape) for x in (query, key, value)]
    fits = all(len(s) == 4 for s in shapes) and shapes[0][:2] == shapes[1][:2] == shapes[2][:2]
    if not fits or shapes[0][3] != shapes[1][3] or shapes[1][2] != shapes[2][2]:
        raise ValueError(f"expected query (B, H, L, d), key (B, H, S, d), value (B, H, S, e), got {shapes}")
    if mask is None:
        return
    if not which.takes_mask:
        raise ValueError(f"{name} takes no mask")
    B, L, S = len(query), query.shape[-2], key.shape[-2]
    if L != S:
        raise ValueError(f"{name} takes a mask only for as many keys as queries, got {S} and {L}")
    additive = which.formula is formulas.huggingface and mask.is_floating_point()
    expected = (B, 1, 1, S) if additive else (B, S)
    if mask.shape != expected:
        raise ValueError(f"{name} takes a {mask.dtype} mask of shape {expected}, got {tuple(mask.shape)}")
    if which.formula is formulas.lucidrains and mask.is_floating_point():
        raise ValueError(f"{name} takes a bool mask, True = keep, got {mask.dtype}")


def _taps(name: str, weight: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The convolution's weight as (H, taps)."""
    H = query.shape[1]
    if weight.dim() == 4 and weight.shape[1] == weight.shape[3] == 1:
        weight = weight[:, 0, :, 0]
    if weight.dim() != 2 or weight.shape[0] != H or weight.shape[1] % 2 == 0:
        raise ValueError(f"conv_weight must be ({H}, taps) or ({H}, 1, taps, 1), taps odd, got {tuple(weight.shape)}")
    if query.shape[-2] != key.shape[-2]:
        raise ValueError(f"{name}'s convolution needs L = S, got {query.shape[-2]} and {key.shape[-2]}")
    return weight


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
