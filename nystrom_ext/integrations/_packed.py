"""Packed batches of Hugging Face models: several sequences one after another in one row, without padding.

They are recognised as in transformers' FlashAttention path, in this order: a padding mask that masks something means a
padded batch; ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k`` together mean a packed one; so
do ``position_ids`` that restart, in a batch of one. Where that path would mix the sequences, this raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from ..varlen import nystrom_attention_varlen

#: The arguments that together say where sequences begin.
OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

#: What is wrong with positions that this cannot tell from those of a packed batch.
ODD = "position_ids that neither rise throughout nor restart at their first value"
_UNREAD = (
    "Nyström attention: position_ids must rise from token to token in a batch of several rows and in compiled models, "
    "where restarts are not looked for; pass packed sequences with cu_seq_lens_q, cu_seq_lens_k, max_length_q and "
    "max_length_k"
)


@dataclass(frozen=True)
class Packed:
    """Where the sequences begin, of queries and keys, counting through all rows."""

    offsets_q: Tensor
    offsets_k: Tensor
    longest_q: int
    longest_k: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor, itself: bool, **options: Any) -> Tensor:
        """(B, H, L, d), (B, H_kv, S, d), (B, H_kv, S, e) -> (B, L, H, e), Nyström attention of each sequence."""
        if not itself:
            options |= {"window": 0, "pinned": 0}  # of no effect on sequences as short as those that may come here
        offsets_k = self.offsets_k
        if itself and offsets_k is not self.offsets_q and offsets_k.shape == self.offsets_q.shape:
            message = "Nyström attention: cu_seq_lens_q and cu_seq_lens_k must be equal in self-attention"
            torch._assert_async((self.offsets_q == offsets_k).all(), message)
            offsets_k = self.offsets_q
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        out = nystrom_attention_varlen(q, k, v, self.offsets_q, offsets_k, self.longest_q, self.longest_k, **options)
        return out.unflatten(0, (query.shape[0], query.shape[2]))

    def mask(self, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """``mask``, or where that is None what ``causal`` says, without the pairs of different sequences.

        For exact attention: (B, 1 or H, L, S), bool or additive like ``mask``.
        """
        (B, _, L, _), S = query.shape, key.shape[2]
        ends_q, ends_k = self.offsets_q[1:], self.offsets_k[1:]
        of_query = torch.bucketize(torch.arange(B * L, device=query.device), ends_q, right=True).view(B, 1, L, 1)
        of_key = torch.bucketize(torch.arange(B * S, device=query.device), ends_k, right=True).view(B, 1, 1, S)
        same = of_query == of_key
        if mask is None:
            return same.tril() if causal and L > 1 else same
        return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, torch.finfo(mask.dtype).min)


def find(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool | None, arguments: dict[str, Any]
) -> tuple[Packed | None, str | None]:
    """How the batch of a call is packed, and what of its positions nobody can honour.

    Args:
        query, key: (B, H, L, d), (B, H_kv, S, d).
        mask: None or 4-D, bool with True = keep or additive.
        causal: whether the call is. transformers' causal masks, where there are any, have heeded the positions already.
        arguments: the call's keyword arguments. Positions are read, which on a GPU waits for it, in batches of one that
            are not being compiled; elsewhere they are asserted to rise.

    Raises:
        NotImplementedError: incomplete offsets, or packed sequences and padding at once.
        RuntimeError: restarting positions where they are not read.
    """
    given = {name: arguments[name] for name in OFFSETS if arguments.get(name) is not None}
    if given and len(given) < len(OFFSETS):
        missing = ", ".join(name for name in OFFSETS if name not in given)
        raise NotImplementedError(f"Nyström attention: got {', '.join(given)} without {missing}; pass all four or none")
    padding = mask if mask is not None and mask.shape[1:3] == (1, 1) else None
    if given:
        if padding is not None:
            if query.shape[0] > 1 or len(given["cu_seq_lens_q"]) == 2:
                return None, None  # a padded batch, whose offsets say where the padding is
            _require_no_padding(padding)
        offsets_q, offsets_k, *longest = given.values()
        return Packed(offsets_q, offsets_k, *(int(x) if isinstance(x, Tensor) else x for x in longest)), None
    positions = arguments.get("position_ids")
    if positions is None or (causal is not False and mask is not None):
        return None, None
    positions = positions if positions.dim() > 1 else positions[None]
    B, L = query.shape[0], query.shape[2]
    if L == 1 or L != key.shape[2] or positions.shape not in ((1, L), (B, L)) or (B > 1 and mask is not None):
        return None, None  # one new token, or positions in other coordinates, such as those of images
    if B > 1 or _must_not_wait(positions):
        rises, restarts = _kind(positions)
        if padding is not None:
            rises = rises | ~_kept(padding).all()
        torch._assert_async(~restarts if causal is not False or mask is not padding else rises, _UNREAD)
        return None, None
    if (positions.diff() > 0).all():  # as nearly always, and in the fewest steps, because every layer asks again
        return None, None
    rises, restarts = _kind(positions if padding is None else positions[_kept(padding)[:, 0, 0]][None])
    rises, restarts = torch.stack([rises, restarts]).tolist()
    if rises:
        return None, None
    if not restarts:
        return None, ODD
    if padding is not None:
        _require_no_padding(padding)
    (offsets, _), (longest, _) = prepare_fa_kwargs_from_position_ids(positions)
    return Packed(offsets, offsets, int(longest), int(longest)), None


def _kind(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Of positions (rows, tokens): whether they rise, or are all the same, and whether they restart at the first."""
    steps = positions.diff()
    rises = ((steps > 0).all(-1) | (steps == 0).all(-1)).all()
    restarts = ((steps == 1) | (positions[:, 1:] == positions[:, :1])).all()
    return rises, restarts & ~rises


def _kept(padding: Tensor) -> Tensor:
    return padding if padding.dtype == torch.bool else padding == 0


def _require_no_padding(padding: Tensor) -> None:
    message = (
        "Nyström attention: packed sequences and a mask with padding in one batch are not supported; leave the padding "
        "out, and the mask"
    )
    kept = _kept(padding).all()
    if _must_not_wait(kept):
        torch._assert_async(kept, message)
    elif not kept:
        raise NotImplementedError(message)


def _must_not_wait(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
