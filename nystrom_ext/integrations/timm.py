"""timm: Nyström attention in vision transformers, EVA, DINOv3 and NaFlexViT models.

    timm.create_model("vit_base_patch16_224", attn_layer=NystromTimmAttention)

:func:`nystrom_ext.convert_` makes existing models use it. Shapes: B batch, N tokens, C features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
    from timm.models.eva import EvaAttention
except ImportError as error:
    raise ImportError(f"nystrom_ext needs timm 1.0.16 or later ({error}); upgrade it") from error

from .._masks import IGNORE_THRESHOLD
from .._tracing import fx_leaf, refuse_script
from ..functional import nystrom_attention
from ..modules import Options
from .timm_others import reason

# The attribute that conversion leaves on a NaFlexVit for the way back.
_STOCK_MASK = "_stock_use_key_only_attn_mask"


def _check(options: Options) -> None:
    if options.self_attention is False:
        raise ValueError(
            "timm's attention is always self-attention, got self_attention=False; leave it out, or give it to other "
            "modules by options_for"
        )


class _Nystrom(nn.Module):
    """What our three classes share: options, the choice of the regime, the operator and what follows it."""

    nystrom_options = Options()
    __prepare_scriptable__ = refuse_script

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        _check(cls.nystrom_options)

    def configure(self, options: Options) -> None:
        _check(options)
        self.nystrom_options = options

    def _run(self: Any, stock: Callable[..., Tensor], x: Any, attn_mask: Any, is_causal: bool, rope: Any = None) -> Any:
        """``forward`` of each class, whose ``_project`` gives q (B, H, N, d), k and v; ``stock`` is that of timm's."""
        asked = {"rope": rope, "attn_mask": attn_mask, "is_causal": is_causal}  # early releases lack is_causal
        asked = {name: value for name, value in asked.items() if value is not None and value is not False}
        options, tokens = self.nystrom_options, x.shape[1]
        if tokens <= options.num_landmarks:
            return stock(x, **asked)
        if attn_mask is not None and masks_nothing(attn_mask):
            attn_mask = None
        ignored = None if attn_mask is None else padding(attn_mask, x.shape[0], tokens)
        if is_causal or (attn_mask is not None and ignored is None):
            if options.unsupported_mask == "exact":
                return stock(x, **asked)
            raise NotImplementedError(_advice(self, x, None if is_causal else attn_mask))
        q, k, v = self._project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (self._rotate(y, rope).type_as(v) for y in (q, k))
        out = nystrom_attention(
            q,
            k,
            v,
            ignored,
            query_padding_mask=ignored,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            enable_gqa=q.shape[1] != k.shape[1],
            **options.attention,
        )
        out = self.norm(out.transpose(1, 2).flatten(2))
        gate = getattr(self, "gate", None)  # early releases lack it
        return self.proj_drop(self.proj(out if gate is None else out * gate(x).sigmoid()))

    def _project(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        """One projection or three; `EvaAttention` keeps the bias of its one projection apart."""
        if self.qkv is None:
            heads = getattr(self, "num_kv_heads", self.num_heads)
            k, v = _split(self.k_proj(x), heads), _split(self.v_proj(x), heads)
            return _split(self.q_proj(x), self.num_heads), k, v
        if getattr(self, "q_bias", None) is None:
            qkv = self.qkv(x)
        else:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
            qkv = self.qkv(x) + bias if self.qkv_bias_separate else F.linear(x, self.qkv.weight, bias)
        return tuple(_split(y, self.num_heads) for y in qkv.chunk(3, -1))

    def _rotate(self: Any, x: Tensor, rope: Tensor) -> Tensor:
        """x (B, H, N, d) with rotary positions in all tokens but the class and register tokens in front."""
        first, rest = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        layout = {"half": True} if getattr(self, "rotate_half", False) else {}  # early releases lack it
        return torch.cat([first, apply_rot_embed_cat(rest, rope, **layout)], 2)


class NystromTimmAttention(Attention, _Nystrom):
    """`timm.layers.Attention`, same arguments and parameters. Up to ``num_landmarks`` tokens it is that very module.

    Options are set by :func:`nystrom_ext.convert_`, or for ``attn_layer`` by a subclass::

        class Attention128(NystromTimmAttention):
            nystrom_options = Options(num_landmarks=128)

    ``self_attention=False`` is refused, as queries and keys are the same tokens here; there are no weights to need.
    """

    @fx_leaf
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (B, N, C) -> (B, N, dim_out).

        Beyond num_landmarks tokens ``attn_mask`` can be padding, the same for every head and query by its very shape or
        strides: (B or 1, 1, 1, N), or expanded from that; bool with True = keep, or 0 = keep and at most -1e4 = ignore
        (else RuntimeError, on CUDA asynchronously). Padded tokens get zeros from the attention. Other masks and
        ``is_causal``: NotImplementedError, or exact attention with ``unsupported_mask="exact"``."""
        return self._run(super().forward, x, attn_mask, is_causal)


class NystromTimmAttentionRope(AttentionRope, _Nystrom):
    """`timm.layers.AttentionRope` likewise; queries and keys are rotated before the landmarks are taken."""

    @fx_leaf
    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As that of :class:`NystromTimmAttention`, with rotary embeddings (..., N - num_prefix_tokens, 2 d)."""
        return self._run(super().forward, x, attn_mask, is_causal, rope)


class NystromTimmEvaAttention(EvaAttention, _Nystrom):
    """`timm.models.eva.EvaAttention` likewise: EVA, EVA02, DINOv3 and others."""

    @fx_leaf
    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As that of :class:`NystromTimmAttentionRope`."""
        return self._run(super().forward, x, attn_mask, is_causal, rope)


SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    Attention: NystromTimmAttention,
    AttentionRope: NystromTimmAttentionRope,
    EvaAttention: NystromTimmEvaAttention,
}


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, N, H d) -> (B, H, N, d)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def masks_nothing(mask: Tensor) -> bool:
    """Whether an SDPA mask is known, without waiting for a device, to let every query see every key."""
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(mask.all()) if mask.dtype == torch.bool else not mask.any()


def padding(mask: Tensor, batch: int, tokens: int) -> Tensor | None:
    """The keys that an SDPA mask ignores, (B, N) bool, or None if it may differ between heads or queries.

    Its shape and strides decide; the entries of an additive mask are checked without waiting for a GPU."""
    mask = mask[(None,) * (4 - mask.dim())]
    constant = all(mask.shape[dim] == 1 or mask.stride(dim) == 0 for dim in (1, 2))
    if not constant or mask.shape[3] != tokens or mask.shape[2] not in (1, tokens) or mask.shape[0] not in (1, batch):
        return None
    mask = mask[:, 0, 0]
    if mask.dtype == torch.bool:
        return ~mask.expand(batch, tokens)
    torch._assert_async(
        ((mask <= IGNORE_THRESHOLD) | (mask == 0)).all(),
        "Nyström attention: an additive attn_mask must hold 0 (keep) or values <= -1e4 (ignore) beyond num_landmarks "
        "tokens, found others, which it cannot add to single scores; pass a bool mask or raise num_landmarks",
    )
    return (mask <= IGNORE_THRESHOLD).expand(batch, tokens)


def find(modules: dict[str, nn.Module]) -> dict[str, str | None]:
    """timm's other attention modules, the innermost ones, with the reason why they are never converted."""
    ours = {name for name, module in modules.items() if isinstance(module, tuple(SWAPS))}
    others = {name: why for name, module in modules.items() if name not in ours and (why := reason(type(module)))}
    around = {".".join(name.split(".")[:i]) for name in {*ours, *others} for i in range(len(name.split(".")))}
    return {name: why for name, why in others.items() if name not in around}


def convert(modules: dict[str, Any], options: dict[str, Options]) -> None:
    """Let NaFlexViT models, whose attention is converted, hand on their padding as what it is: one row for all queries
    (``use_key_only_attn_mask``, an option of theirs). Valid tokens attend to the same keys."""
    converted = {modules[name]: own for name, own in options.items() if isinstance(modules[name], tuple(SWAPS))}
    for own in converted.values():
        _check(own)
    for model in modules.values():
        if hasattr(model, "use_key_only_attn_mask") and any(module in converted for module in model.modules()):
            vars(model).setdefault(_STOCK_MASK, model.use_key_only_attn_mask)
            model.use_key_only_attn_mask = True


def revert(modules: Iterable[Any], scope: Iterable[nn.Module]) -> None:
    """Undo :func:`convert` where no converted module is left."""
    for model in modules:
        if _STOCK_MASK in vars(model) and not any("nystrom_options" in vars(m) for m in model.modules()):
            model.use_key_only_attn_mask = vars(model).pop(_STOCK_MASK)


def _advice(module: Any, x: Tensor, mask: Tensor | None) -> str:
    B, N, _ = x.shape
    what = "is_causal" if mask is None else f"an attn_mask of shape {tuple(mask.shape)}"
    return (
        f"{type(module).__name__}: {what} is not supported with {N} tokens > num_landmarks="
        f"{module.nystrom_options.num_landmarks}, only padding of shape ({B}, 1, 1, {N}) or expanded from that (as of "
        f"NaFlexVit with use_key_only_attn_mask=True, which convert_ sets if it gets the whole model); raise "
        f'num_landmarks or use unsupported_mask="exact"'
    )
