"""Hugging Face transformers: importing this module registers ``attn_implementation="nystrom"``.

    import nystrom_ext.integrations.transformers
    model = AutoModel.from_pretrained(name, attn_implementation="nystrom")

Up to ``num_landmarks`` tokens a model computes what it computes with "sdpa". Beyond, attention is approximated at a
cost linear in the length and does not depend on padding, whose positions get zeros from the attention. Packed batches,
as `DataCollatorWithFlattening` makes them, are attended to sequence by sequence; models that keep ``position_ids`` to
their embeddings (ModernBERT, DistilBERT, ESM) need its ``return_flash_attn_kwargs=True`` for that, as they do with
FlashAttention. What landmarks cannot honour is refused: causal attention, sliding windows, and beyond ``num_landmarks``
tokens position biases and masks other than padding. :func:`register` adds names with other options, :func:`check` tells
whether a model really uses them, :func:`nystrom_ext.convert_` chooses layer by layer.
Shapes: B batch, H heads, L queries, S keys.
"""

from __future__ import annotations

import functools
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
from .._masks import IGNORE_THRESHOLD
from ..functional import nystrom_attention
from ..modules import Options
from ._call import Call

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
            padding, through "sdpa" instead of refusing them. ``self_attention=None`` decides by the module's class.
            There are no weights, which ``need_weights="never"`` says and ``output_attentions=True`` is refused for.

    Raises:
        ValueError: bad options, a name that transformers would misunderstand, or one in use for something else.
        TypeError: unknown options.
    """
    settings = Options.of({"num_landmarks": num_landmarks, **options})
    if settings.unpad:
        raise ValueError(
            "unpad=True drops padded tokens before the projections of nn.MultiheadAttention, which Hugging Face models "
            "compute themselves; give them packed sequences, as DataCollatorWithFlattening makes them"
        )
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
    set_options(name, settings)


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
        (B, L, H, e) and None: there are no weights.

    Raises:
        NotImplementedError: what landmarks cannot honour, and ``output_attentions=True`` unless
            ``need_weights="never"``: from a None, transformers would make an empty tuple.
        ValueError: ``self_attention=True`` with L != S.
    """
    call = Call(module, query, key, attention_mask, is_causal, kwargs)
    options = options_of(module) if default_options is None else default_options
    if options is not None and options.need_weights != "never":
        _refuse_weights(module, kwargs)
    if options is None or call.is_exact(options):
        arguments = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        return sdpa_attention_forward(module, query, key, value, call.exact_mask(), **arguments)
    itself = call.same_tokens(options)
    settings = options.attention | {"scale": scaling, "dropout_p": dropout}
    settings["enable_gqa"] = query.shape[1] != key.shape[1]
    if call.packed is not None:
        return call.packed.attend(query, key, value, itself=bool(itself), **settings), None
    if itself is None and call.mask is not None:
        call.warn_of_padded_queries()
    ignored = None if call.mask is None else ignored_keys(call.mask).expand(key.shape[0], key.shape[2])
    settings |= {"query_padding_mask": ignored if itself else None, "self_attention": False}  # the masks say it
    out = nystrom_attention(query, key, value, ignored, **settings)
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


def set_options(name: str, default_options: Options | None) -> None:
    """:func:`register` without its precautions."""
    if default_options is not None:
        REGISTERED[name] = default_options
    AttentionInterface.register(name, functools.partial(attention, default_options=default_options))
    AttentionMaskInterface.register(name, padding_mask)  # without it transformers would drop the padding mask


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


def _refuse_weights(module: nn.Module, arguments: dict[str, Any]) -> None:
    config = getattr(module, "config", None)
    if arguments.get("output_attentions") or getattr(config, "output_attentions", False):
        raise NotImplementedError(
            f"Nyström attention in {type(module).__name__}: output_attentions=True asks for weights, and there are none"
            f'; use attn_implementation="eager" for this model, or need_weights="never" to get an empty tuple'
        )


register()
set_options(CONVERTED, None)
