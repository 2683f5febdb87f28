"""Hugging Face transformers: importing this module registers ``attn_implementation="nystrom"``.

    import nystrom_ext.integrations.transformers
    model = AutoModel.from_pretrained(name, attn_implementation="nystrom")

Up to ``num_landmarks`` tokens a model computes what it computes with "sdpa". Beyond, attention is approximated at a
cost linear in the length and does not depend on padding, whose positions get zeros from the attention. What landmarks
cannot honour is refused: causal attention, sliding windows, position biases, masks other than padding. :func:`register`
adds names with other options, :func:`check` tells whether a model really uses them, :func:`nystrom_ext.convert_`
chooses layer by layer. Shapes: B batch, H heads, L queries, S keys.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
except ImportError as error:
    raise ImportError(f"nystrom_ext needs transformers 5, found {transformers.__version__}; upgrade it") from error

from .._choice import CONVERTED
from ..functional import nystrom_attention
from ..modules import IGNORE_THRESHOLD, Options

#: Options of the registered names.
REGISTERED: dict[str, Options] = {}

# Parts of names that transformers interprets: kernels of the Hub, paged attention, and substring tests for its own.
RESERVED = ("/", ":", "|", "flash", "sdpa", "flex_attention", "eager")


class Converted(str):
    """The name that :func:`nystrom_ext.convert_` sets as a config's attention implementation.

    It runs Nyström attention in the modules that have ``nystrom_options``. In the others it runs what the name it
    replaced means if that is a registered one, exact where landmarks cannot serve, else "sdpa". It carries that name
    because configs do not save this attribute, whereas everything else on them goes to config.json.
    Unpickling it imports this module, so that a loaded model finds the name registered.
    """

    stock: str | None

    def __new__(cls, name: str, stock: str | None = None) -> Converted:
        self = super().__new__(cls, name)
        self.stock = stock
        return self


def register(name: str = "nystrom", *, num_landmarks: int = 64, **options: Any) -> None:
    """Make ``attn_implementation=name`` mean Nyström attention with these options.

    Args:
        num_landmarks, options: as for :class:`nystrom_ext.NystromMultiheadAttention`, except ``conv_kernel_size``.
            ``unsupported_mask="exact"`` runs calls that are causal, or have a sliding window or a mask other than
            padding, through "sdpa" instead of refusing them.

    Raises:
        ValueError: bad options, a name that transformers would misunderstand, or one in use for something else.
        TypeError: unknown options.
    """
    settings = Options.of({"num_landmarks": num_landmarks, **options})
    reserved = [part for part in RESERVED if part in name]
    if not name or reserved:
        raise ValueError(
            f"the name of an attention implementation must not be empty or contain {', '.join(map(repr, RESERVED))}, "
            f'which transformers gives a meaning, got {name!r}; use for example "nystrom-128"'
        )
    if REGISTERED.get(name, settings) != settings or (name not in REGISTERED and name in AttentionInterface()):
        raise ValueError(
            f"attn_implementation={name!r} is already registered, for {REGISTERED.get(name, 'something else')}; "
            f"models may be using it, choose another name"
        )
    REGISTERED[name] = settings
    _register(name, settings)


def check(model: nn.Module) -> list[str]:
    """Names of the attention modules in ``model`` that run Nyström attention.

    transformers accepts any registered name for any model, also where the attention never looks at it.

    Raises:
        ValueError: the model asks for Nyström attention where it cannot have it, or does not ask for it anywhere.
    """
    from . import pretrained  # which imports this module

    return pretrained.check(model)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    default_options: Options | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function behind the registered names, in the form transformers calls it.

    Args:
        query, key, value: (B, H, L, d), (B, H_kv, S, d), (B, H_kv, S, e).
        attention_mask: what :func:`padding_mask` returned, or the user's own (B or 1, 1, 1, S) mask, bool with
            True = keep or floating-point with 0 = keep and at most -1e4 = ignore.
        default_options: those of the registered name; None stands for :data:`CONVERTED`, where modules have their own.

    Returns:
        (B, L, H, e) and None: there are no weights, and ``output_attentions=True`` warns.
    """
    sdpa = functools.partial(sdpa_attention_forward, module, query, key, value)
    arguments = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    mask = attention_mask
    if mask is not None and mask.dim() == 2 and mask.dtype == torch.bool:
        mask = mask[:, None, None]
    options = options_of(module) if default_options is None else default_options
    if options is None:
        return sdpa(mask, **arguments)
    if kwargs.get("output_attentions") and not torch.compiler.is_compiling():  # a warning would break the graph
        _warn_no_weights()
    L, S = query.shape[2], key.shape[2]
    refusal = _refusal(module, query, key, mask, is_causal, kwargs)
    if refusal is not None:
        what, sdpa_can = refusal
        if sdpa_can and options.unsupported_mask == "exact":
            return sdpa(mask, **arguments)
        raise NotImplementedError(_advice(module, what, sdpa_can))
    if min(L, S) <= options.num_landmarks:
        return sdpa(mask, **arguments)
    itself = L == S and _is_self_attention(module)
    if (options.window or options.pinned) and not itself:
        if options.unsupported_mask == "exact":
            return sdpa(mask, **arguments)
        what = f"what may be cross-attention with window={options.window} and pinned={options.pinned}"
        raise NotImplementedError(_advice(module, what, True))

    ignored = None if mask is None else ignored_keys(mask).expand(len(key), S)
    out = nystrom_attention(
        query,
        key,
        value,
        ignored,
        query_padding_mask=ignored if itself else None,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
        **options.attention,
    )
    return out.transpose(1, 2).contiguous(), None


def implementation_of(module: Any) -> str | None:
    """The name of its attention that the config of ``module`` has now; None without one."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def options_of(module: Any) -> Options | None:
    """With what options the attention of ``module`` is Nyström attention, by the name its config has now."""
    name = implementation_of(module)
    if name != CONVERTED:
        return REGISTERED.get(name or "")
    if "nystrom_options" in vars(module):
        return module.nystrom_options
    left_alone = REGISTERED.get(getattr(name, "stock", None) or "")
    return left_alone and replace(left_alone, unsupported_mask="exact")


def padding_mask(
    *,
    kv_length: int,
    attention_mask: Tensor | None = None,
    mask_function: Any = causal_mask_function,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of bidirectional attention stays (B, S) bool, True = keep; of any other kind it is that of "sdpa"."""
    if mask_function is bidirectional_mask_function:
        return None if attention_mask is None else attention_mask[:, -kv_length:]
    return sdpa_mask(kv_length=kv_length, attention_mask=attention_mask, mask_function=mask_function, **kwargs)


def _register(name: str, default_options: Options | None) -> None:
    AttentionInterface.register(name, functools.partial(attention, default_options=default_options))
    AttentionMaskInterface.register(name, padding_mask)  # without it transformers would drop the padding mask


def _refusal(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None, kwargs: dict[str, Any]
) -> tuple[str, bool] | None:
    """What the call asks for that landmarks cannot honour, and whether "sdpa" can."""
    for name, argument in kwargs.items():
        if argument is not None and (name in ("sliding_window", "softcap", "s_aux") or "bias" in name):
            value = f"tensor of shape {tuple(argument.shape)}" if isinstance(argument, Tensor) else repr(argument)
            return f"{name}={value}", name in ("sliding_window", "position_bias")
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if causal is None:
        return "causal attention (which transformers assumes, as neither the call nor the module sets is_causal)", True
    if query.shape[2] > 1 and causal:
        return "causal attention", True
    if query.shape[2] > 1 and getattr(module, "is_decoder", False):  # query landmarks average past and future tokens
        return "cross-attention of a causal decoder", True
    if mask is not None and (mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.shape[3] != key.shape[2]):
        B, S = len(key), key.shape[2]
        allowed = f"only padding masks, ({B}, {S}) bool or ({B}, 1, 1, {S})"
        return f"a {str(mask.dtype).removeprefix('torch.')} mask of shape {tuple(mask.shape)} ({allowed})", True
    return None


def _advice(module: nn.Module, what: str, sdpa_can: bool) -> str:
    ways = 'attn_implementation="sdpa" for this model'
    if sdpa_can:
        ways += (
            ', nystrom_ext.convert_(model), which leaves such layers on "sdpa", or '
            'register(..., unsupported_mask="exact"), which does so call by call'
        )
    return f"Nyström attention in {type(module).__name__}: {what} is not supported; use {ways}"


def ignored_keys(mask: Tensor) -> Tensor:
    """(B, 1, 1, S) bool, True = keep, or additive -> (B, S) bool, True = ignore. Does not wait for a GPU."""
    mask = mask[:, 0, 0]
    if mask.dtype == torch.bool:
        return ~mask
    torch._assert_async(
        ((mask <= IGNORE_THRESHOLD) | (mask == 0)).all(),
        "Nyström attention: an additive mask must hold 0 (keep) or values <= -1e4 (ignore), found others, which it "
        "cannot add to single scores; pass a bool mask",
    )
    return mask <= IGNORE_THRESHOLD


def _is_self_attention(module: nn.Module) -> bool:
    """Whether queries and keys are the same tokens, so that the padding of one is that of the other.

    In doubt False: padded queries then take part in the landmarks, whereas a wrong True would delete valid queries.
    """
    cls = type(module)
    encoder = getattr(module, "is_decoder", None) is False and "Cross" not in cls.__name__
    return encoder or not _may_attend_elsewhere(cls)


@torch.compiler.assume_constant_result
def _may_attend_elsewhere(cls: Any) -> bool:
    """Constant in compiled graphs, so that the compiler need not look inside."""
    return _takes_other_sequences(cls)


@functools.cache  # apart from the function above because the compiler looks through caches, with a warning
def _takes_other_sequences(cls: Any) -> bool:
    """Whether ``forward`` may take a second sequence besides ``hidden_states``, judging by its signature."""
    names = {name for name in inspect.signature(cls.forward).parameters if not name.startswith("past_")}
    words = ("states", "query", "key", "value", "encoder", "context", "memory", "latents")
    other = any(word in name for name in names - {"hidden_states"} for word in words)
    return other or "hidden_states" not in names or "Cross" in cls.__name__


@functools.cache
def _warn_no_weights() -> None:
    warnings.warn("Nyström attention returns no weights: output_attentions=True gives None", stacklevel=3)


register()
_register(CONVERTED, None)
