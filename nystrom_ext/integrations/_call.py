"""What one call of the Hugging Face attention function asks for, and whether landmarks can honour it."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._warnings import warn_once
from ..modules import Options
from . import _packed

# Arguments that reach the attention of a model that runs "sdpa", though they say nothing about the attention.
HARMLESS = {
    **dict.fromkeys((*_packed.OFFSETS, "position_ids"), "read elsewhere: they say where packed sequences begin"),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"), "the result"),
    **dict.fromkeys(("cache", "past_key_values", "past_key_value", "use_cache", "cache_position"), "keys hold it"),
    **dict.fromkeys(("encoder_hidden_states", "position_embeddings"), "queries and keys are computed from them"),
    **dict.fromkeys(("token_type_ids", "interpolate_pos_encoding"), "embeddings, which models without them ignore"),
    **dict.fromkeys(("num_items_in_batch", "logits_to_keep", "labels"), "the head and the loss"),
    "deterministic": "how FlashAttention's backward may add",
}

_SAY_SO = "register(..., self_attention=True) or convert_(..., self_attention=True)"


class Refusal(NamedTuple):
    """What is asked for; whether "sdpa" can do it; whether it counts as a mask, which is honoured up to m tokens."""

    what: str
    sdpa: bool = True
    mask: bool = False


class Call:
    """Queries (B, H, L, d) and keys (B, H_kv, S, d), the 4-D mask, causality, and the other keyword arguments."""

    def __init__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        is_causal: bool | None,
        arguments: dict[str, Any],
    ) -> None:
        if mask is not None and mask.dim() == 2 and mask.dtype == torch.bool:
            mask = mask[:, None, None]
        causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
        if causal is None and mask is not None:
            causal = False  # "sdpa" takes a mask for all there is to know
        self.module, self.query, self.key, self.mask = module, query, key, mask
        self.causal, self.arguments = causal, arguments
        self.packed, self.odd_positions = _packed.find(query, key, mask, causal, arguments)

    def exact_mask(self) -> Tensor | None:
        """The mask that makes "sdpa" right."""
        if self.packed is None:
            return self.mask
        return self.packed.mask(self.query, self.key, self.mask, causal=self.causal is not False)

    def is_exact(self, options: Options) -> bool:
        """Whether "sdpa" is to serve it. NotImplementedError where neither it nor landmarks are."""
        L, S = self.query.shape[2], self.key.shape[2]
        # An exported graph runs at any length: there the operator decides, which is exact up to num_landmarks as well.
        short = not torch.compiler.is_exporting() and min(L, S) <= options.num_landmarks
        refused = self._refusal(options)
        if refused is None:
            return short and self.packed is None
        if (refused.sdpa and options.unsupported_mask == "exact") or (refused.mask and short):
            return True
        ways = (
            'attn_implementation="sdpa" for this model, nystrom_ext.convert_(model), which leaves such layers on '
            '"sdpa", or register(..., unsupported_mask="exact"), which does so call by call'
            if refused.sdpa
            else 'attn_implementation="eager" for this model, or leave it out, as "sdpa" would ignore it'
        )
        what = f"Nyström attention in {type(self.module).__name__}: {refused.what}"
        raise NotImplementedError(f"{what} is not supported; use {ways}")

    def same_tokens(self, options: Options) -> bool | None:
        """Whether queries and keys are the same tokens, so that the padding of one is that of the other.

        None in doubt: padded queries then take part in the landmarks, whereas a wrong True would delete valid queries.
        """
        L, S = self.query.shape[2], self.key.shape[2]
        if options.self_attention and L != S:
            raise ValueError(
                f"Nyström attention in {type(self.module).__name__}: self_attention=True needs as many queries as "
                f"keys, got {L} and {S}; leave the option out, or this layer"
            )
        if options.self_attention is not None or L != S:
            return bool(options.self_attention)
        cls = type(self.module)
        if "Cross" in cls.__name__:
            return False
        own = getattr(self.module, "is_decoder", None) is False or not _may_attend_elsewhere(cls)
        return True if own else None

    def warn_of_padded_queries(self) -> None:
        warn_once(
            self.module,
            f"{type(self.module).__name__} may attend to other tokens than its own, so padded queries take part in its "
            f"landmarks; where they are the same tokens, {_SAY_SO} leaves them out; self_attention=False says they are "
            f"not",
        )

    def _refusal(self, options: Options) -> Refusal | None:
        """The first thing that it asks for in vain."""
        L, S = self.query.shape[2], self.key.shape[2]
        for name, argument in self.arguments.items():
            if not (isinstance(argument, Tensor) or argument):
                continue
            value = f"tensor of shape {tuple(argument.shape)}" if isinstance(argument, Tensor) else repr(argument)
            if name in ("sliding_window", "position_bias"):
                return Refusal(f"{name}={value}", mask=name == "position_bias")
            if name not in HARMLESS and not (name == "seq_idx" and self.packed):
                return Refusal(f"{name}={value}", sdpa=False)
        if self.causal is None:
            why = "which transformers assumes, as neither the call nor the module sets is_causal"
            return Refusal(f"causal attention ({why})")
        if L > 1 and self.causal:
            return Refusal("causal attention")
        if L > 1 and getattr(self.module, "is_decoder", False):  # query landmarks average past and future tokens
            return Refusal("cross-attention of a causal decoder")
        mask = self.mask
        if mask is not None and (mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.shape[3] != S):
            B = self.key.shape[0]
            if mask.dim() == 4 and mask.shape[1:3] == (1, 1):
                raise ValueError(
                    f"Nyström attention in {type(self.module).__name__}: the attention_mask has {mask.shape[3]} "
                    f"entries for {S} tokens; pass one for each"
                )
            allowed = f"only padding masks, ({B}, {S}) bool or ({B}, 1, 1, {S})"
            dtype = str(mask.dtype).removeprefix("torch.")
            what = f"a {dtype} mask of shape {tuple(mask.shape)} ({allowed})"
            return Refusal(what, mask=mask.dim() == 4 and mask.shape[3] == S)
        if self.odd_positions is not None:
            return Refusal(self.odd_positions)
        return self._refusal_of_a_window(options)

    def _refusal_of_a_window(self, options: Options) -> Refusal | None:
        itself, packed = self.same_tokens(options), self.packed
        longest = (self.query.shape[2], self.key.shape[2]) if packed is None else (packed.longest_q, packed.longest_k)
        if itself or min(longest) <= options.num_landmarks or not (options.window or options.pinned):
            return None
        doubt = f" (where queries and keys are the same tokens, {_SAY_SO} says so)" if itself is None else ""
        window = f"window={options.window} and pinned={options.pinned}"
        return Refusal(f"what may be cross-attention with {window}{doubt}")


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
    return other or "hidden_states" not in names
