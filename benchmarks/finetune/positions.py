"""Longer inputs for a pretrained model with a table of learned positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import UsageError


def extend_(model: nn.Module, length: int, how: str) -> int:
    """Let ``model`` read ``length`` tokens, in place; returns how many it could read before.

    "tile" repeats the rows, so that every position is one the model knows and near neighbours stay neighbours;
    "interpolate" stretches them, so that far positions stay far and distances shrink. Models without such a table are
    left alone. Rows in front of the padding index (RoBERTa) keep their meaning.
    """
    known = 0
    for owner in list(model.modules()):
        table = owner._modules.get("position_embeddings")
        if not isinstance(table, nn.Embedding):
            continue
        reserved = 0 if table.padding_idx is None else table.padding_idx + 1
        known = table.num_embeddings - reserved
        if length <= known:
            continue
        rows = table.weight.data
        longer = torch.cat([rows[:reserved], _stretched(rows[reserved:], length, how)])
        owner.position_embeddings = nn.Embedding.from_pretrained(longer, freeze=False, padding_idx=table.padding_idx)
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if buffer.shape == (1, len(rows)):  # position_ids, token_type_ids
                count = torch.arange(len(longer)) if name == "position_ids" else torch.zeros(len(longer))
                persistent = name not in owner._non_persistent_buffers_set
                owner.register_buffer(name, count.to(buffer)[None], persistent=persistent)
        config = getattr(model, "config", None)
        if config is not None:
            config.max_position_embeddings = len(longer)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", length)
    if not known and length > limit:
        raise UsageError(
            f"--max-length must not exceed the model's positions, got {length} > {limit} in a {type(model).__name__} "
            "without a table of learned positions; lower it"
        )
    return known


def _stretched(rows: Tensor, length: int, how: str) -> Tensor:
    if how == "tile":
        return rows.repeat(-(-length // len(rows)), 1)[:length]
    return F.interpolate(rows.T[None], size=length, mode="linear", align_corners=True)[0].T
