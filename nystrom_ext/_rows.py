"""Some rows of the attention weights of `NystromMultiheadAttention`, without the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ._attention import exact_weights
from ._masks import added_keys, additive_mask, zero
from ._problem import at
from ._projection import project_scored
from ._regime import regime
from ._weights import positions
from .functional import nystrom_attention_weights

_F: Any = F  # nn.MultiheadAttention's own checks, so that messages agree; they are missing in the stubs


def attention_rows(
    module: Any,
    query: Tensor,
    rows: Tensor | Sequence[int],
    key: Tensor,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    average: bool,
) -> Tensor:
    """:meth:`NystromMultiheadAttention.attention_rows`."""
    if query.is_nested or key.is_nested:
        raise NotImplementedError(
            "NystromMultiheadAttention: attention_rows takes no nested tensors, got one; pad it and pass "
            "key_padding_mask"
        )
    if module.self_attention and key_padding_mask is None:
        key_padding_mask = query_padding_mask
    batched = _F._mha_shape_check(query, key, key, key_padding_mask, None, module.num_heads)
    q, k = project_scored(module, query, key)
    call = regime(module, query, key, q, k, key_padding_mask, query_padding_mask)
    rows = positions(rows, q.shape[2], q.device)
    if call.exact:
        mask = additive_mask(q, k, call.key_mask, None, added_keys(module))
        weights = zero(exact_weights(q.index_select(2, rows), k, mask), at(call.given, rows))
        weights = weights.mean(1) if average else weights
    else:
        options = {**module.attention_options(), "dropout_p": 0.0, "self_attention": False}
        weights = nystrom_attention_weights(
            q, k, call.keys, query_padding_mask=call.queries, average_heads=average, rows=rows, **options
        )
    return weights if batched else weights.squeeze(0)
