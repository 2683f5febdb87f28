"""Hugging Face's Nyströmformer with this package's attention: any length, no effect of padding, independent samples."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

from ..functional import nystrom_attention, nystrom_attention_weights
from ..modules import Options
from .transformers import ignored_keys


class RepairedNystromformerSelfAttention(NystromformerSelfAttention):
    """`NystromformerSelfAttention` with the same parameters; :func:`nystrom_ext.convert_` makes one into the other.

    With ``coefficient="global"`` and the config's ``num_landmarks``, it computes what transformers computes where that
    is right: unpadded sequences of ``config.segment_means_seq_len`` tokens. At other lengths transformers fails or
    mixes the samples of a batch; with padding it fails or averages padding into the landmarks. As there, no dropout
    acts on the attention.
    """

    nystrom_options: Options

    def configure(self, options: Options) -> None:
        self.nystrom_options = options

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor | None, ...]:
        """hidden_states (B, n, E) -> (B, n, E) and, on request, the (B, H, n, n) matrix that acts on the values.

        That is None with ``need_weights="never"``. It is always self-attention, whatever ``self_attention`` says.
        attention_mask: (B, n) bool, True = keep, or (B, 1, 1 or n, n) bool or additive, the same in every row.
        """
        heads = (-1, self.attention_head_size)
        query, key, value = (
            projection(hidden_states).unflatten(-1, heads).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        ignored = None if attention_mask is None else _ignored(attention_mask)
        options: dict[str, Any] = {"query_padding_mask": ignored, **self.nystrom_options.attention}
        conv_weight = None if self.conv_kernel_size is None else self.conv.weight[:, 0, :, 0]
        context = nystrom_attention(query, key, value, ignored, conv_weight=conv_weight, **options)
        context = context.transpose(1, 2).flatten(2)
        if not output_attentions:
            return (context,)
        never = self.nystrom_options.need_weights == "never"
        return context, None if never else nystrom_attention_weights(query, key, ignored, **options)


def announce(options: Mapping[nn.Module, Options]) -> None:
    """Warn where converted modules will not compute what they were configured to compute. Changes nothing."""
    stock = [(m, own.num_landmarks) for m, own in options.items() if type(m) is NystromformerSelfAttention]
    for configured, length, landmarks in {(m.num_landmarks, m.seq_len, landmarks) for m, landmarks in stock}:
        if configured == length:
            warnings.warn(
                f"transformers computes exact attention in this Nystromformer, at every length, because its config has "
                f"num_landmarks = segment_means_seq_len = {length}; converted, it approximates beyond num_landmarks="
                f"{landmarks} tokens",
                stacklevel=4,
            )
        elif configured != landmarks:
            warnings.warn(
                f"this Nystromformer was configured with num_landmarks={configured}; converted, it uses num_landmarks="
                f"{landmarks}",
                stacklevel=4,
            )


def _ignored(mask: Tensor) -> Tensor:
    """-> (B, n) bool, True = ignore. The rows of transformers' 4-D padding mask are equal, so the first one tells."""
    row = mask[:, None, None] if mask.dim() == 2 and mask.dtype == torch.bool else mask[..., :1, :]
    if row.dim() != 4 or row.shape[1] != 1:
        raise ValueError(
            f"Nystromformer's attention needs a padding mask, (batch, tokens) bool or (batch, 1, 1 or tokens, tokens), "
            f"got {mask.dtype} {tuple(mask.shape)}; pass the model a 2-D attention_mask"
        )
    return ignored_keys(row)


SWAPS: dict[type[nn.Module], type[nn.Module]] = {NystromformerSelfAttention: RepairedNystromformerSelfAttention}
