"""`NystromMultiheadAttention`: `nn.MultiheadAttention` at a cost linear in the sequence length.

Up to ``num_landmarks`` tokens it computes what `nn.MultiheadAttention` computes; beyond, it approximates
(Nyströmformer, arXiv 2102.03902; :mod:`nystrom_ext.reference`). Shapes in this file: N batch, H heads, L queries,
S keys, E ``embed_dim``, d = E / H, m ``num_landmarks``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ._attention import ValueConvolution, exact_attention
from ._masks import added_keys, additive_mask, zero
from ._options import Options, count
from ._packed import nested, unpadded
from ._projection import project
from ._regime import Regime, regime
from ._rows import attention_rows
from ._tracing import fx_leaf, refuse_script
from ._warnings import warn_once
from .functional import nystrom_attention, nystrom_attention_weights

_F: Any = F  # nn.MultiheadAttention's own checks, so that messages agree; they are missing in the stubs

_APPROXIMATE_WEIGHTS = (
    "NystromMultiheadAttention: need_weights=True, nn.MultiheadAttention's default, costs O(L * S) beyond "
    "num_landmarks tokens, and the weights are approximate (entries may be negative, rows need not sum to 1, no "
    'dropout); where the call cannot say need_weights=False, need_weights="never" in the constructor or convert_ '
    "returns None instead"
)

# A fixed negative key instead of register_forward_pre_hook: generated keys count up from 0 in every process, so the
# first hook registered on an unpickled module could overwrite ours.
HOOK_KEY = -1


def keep_python_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Does nothing. Hooks keep nn.TransformerEncoderLayer from running a fused exact attention on the module's weights
    instead of calling it. At module level, so that copies and pickles keep it."""


class NystromMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with Nyström attention: same parameters, state_dict, initial values and ``forward``.

    The shape chooses the regime. With min(L, S) <= ``num_landmarks``, S counting the keys of ``add_bias_kv`` and
    ``add_zero_attn``, the result is that of `nn.MultiheadAttention` to rounding, with every mask, weights and dropout;
    only rows without any key give ``out_proj.bias`` and zero weights where upstream may give NaN. Beyond, attention is
    approximated at a cost of O((L + S) m) and does not depend on padding; in self-attention, ``key_padding_mask``
    removes the queries too, and their output is ``out_proj.bias``. Dropout then acts on the (L, m) probabilities.

    Args:
        num_landmarks: m, the number of segment means that stand for the sequence.
        pinv_iterations: Newton-Schulz iterations for the pseudo-inverse of the m x m matrix.
        conv_kernel_size: taps of a depthwise convolution of the values, added to the attention in both regimes. Adds
            the parameter ``conv.weight`` (H, taps); needs L = S and no added keys.
        coefficient: scale of the iteration's start; ``"global"``, as in the paper's code, couples a batch's samples.
        window, pinned: exact attention, beyond m tokens, to the tokens at a distance of at most ``window`` and to the
            first ``pinned`` ones, beside the landmarks; needs self-attention and no added keys.
        self_attention: whether queries and keys are the same tokens, so that the keys' padding is that of the queries.
            None: where one tensor is passed as both, or two of the same memory; with others of equal length and a
            ``key_padding_mask`` a warning asks for the option. True, as for ``a(n(x), n(x), n(x))`` or ``x + pos``
            twice, refuses L != S; False is cross-attention.
        need_weights: ``"never"`` returns None instead of the weights even to callers who leave ``need_weights`` at its
            default of True, which costs O(L S).
        unpad: drop padded tokens before the projections in self-attention with a ``key_padding_mask`` beyond m tokens,
            as users of flash-attn do by hand: the same results, in less time where much is padding. Waits for a GPU.
        unsupported_mask: for calls with ``attn_mask`` (so also ``is_causal``) beyond m tokens: ``"error"`` raises
            NotImplementedError, ``"exact"`` computes exact attention.
    The other arguments are those of `nn.MultiheadAttention`.
    """

    num_landmarks: int
    pinv_iterations: int
    coefficient: str
    unsupported_mask: str
    window: int
    pinned: int
    self_attention: bool | None
    need_weights: str
    unpad: bool
    conv: ValueConvolution | None

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        num_landmarks: int = 64,
        pinv_iterations: int = 6,
        conv_kernel_size: int | None = None,
        coefficient: str = "per_head",
        unsupported_mask: str = "error",
        window: int = 0,
        pinned: int = 0,
        self_attention: bool | None = None,
        need_weights: str = "on_request",
        unpad: bool = False,
    ) -> None:
        options = Options(
            num_landmarks=num_landmarks,
            pinv_iterations=pinv_iterations,
            coefficient=coefficient,
            unsupported_mask=unsupported_mask,
            window=window,
            pinned=pinned,
            self_attention=self_attention,
            need_weights=need_weights,
            unpad=unpad,
        )
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.configure(options)
        if (window or pinned) and (add_bias_kv or add_zero_attn):
            raise ValueError(
                f"window and pinned need as many keys as queries, got window={window}, pinned={pinned} with "
                f"add_bias_kv={add_bias_kv}, add_zero_attn={add_zero_attn}; leave out one or the other"
            )
        if conv_kernel_size is None:
            return
        conv_kernel_size = count("conv_kernel_size", conv_kernel_size, 1, "None leaves the convolution out")
        if add_bias_kv or add_zero_attn:
            raise ValueError(
                f"conv_kernel_size needs as many keys as queries, got conv_kernel_size={conv_kernel_size} with "
                f"add_bias_kv={add_bias_kv}, add_zero_attn={add_zero_attn}; leave out one or the other"
            )
        self.conv = ValueConvolution(num_heads, conv_kernel_size, device, dtype)

    def configure(self, options: Options) -> None:
        """Set options and the hook that makes encoder layers call ``forward``. Conversion calls it too."""
        vars(self).update(vars(options))
        if "conv" not in self._modules:
            self.conv = None
        self._forward_pre_hooks[HOOK_KEY] = keep_python_forward

    def _reset_parameters(self) -> None:
        super()._reset_parameters()
        conv = self._modules.get("conv")  # self.conv does not exist yet when nn.MultiheadAttention.__init__ calls
        if isinstance(conv, ValueConvolution):
            conv.reset_parameters()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in vars(Options()))

    def merge_masks(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor) -> Any:
        """Raises: nn.TransformerEncoderLayer calls it only on the way to its fused exact attention."""
        raise RuntimeError(
            "NystromMultiheadAttention: a fused encoder fast path was about to bypass Nyström attention (the module's "
            "forward pre-hook was removed); call nystrom_ext.convert_() again or "
            "torch.backends.mha.set_fastpath_enabled(False)"
        )

    @fx_leaf
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        query_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`: same shapes, masks (True = ignore) and messages.

        Beyond ``num_landmarks`` tokens a floating-point ``key_padding_mask`` holds 0 (keep) or values <= -1e4 (ignore);
        anything else raises RuntimeError, on CUDA asynchronously. An ``attn_mask`` on the CPU that masks nothing is no
        mask. ``query_padding_mask``, (N, L) or (L,) bool with True = ignore, names queries that are padding where the
        keys' mask does not: they take no part in the landmarks and give ``out_proj.bias``. A strided NestedTensor is
        accepted in the self-attention of a ``batch_first`` module without masks, in every mode.
        """
        need_weights = need_weights and self.need_weights == "on_request"
        if self.self_attention and key_padding_mask is None:
            key_padding_mask = query_padding_mask
        if query.is_nested or key.is_nested or value.is_nested:
            masked = any(mask is not None for mask in (key_padding_mask, attn_mask, query_padding_mask))
            return nested(self, query, key, value, masked, need_weights, average_attn_weights)
        batched = _F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        if self.unpad and not need_weights and key_padding_mask is not None and query_padding_mask is None:
            if (out := unpadded(self, query, key, value, key_padding_mask, attn_mask)) is not None:
                return out, None
        q, k, v = project(self, query, key, value)
        call = regime(self, query, key, q, k, key_padding_mask, query_padding_mask, attn_mask, is_causal)
        if call.exact:
            is_causal = is_causal and call.key_mask is None and not need_weights  # else attn_mask itself, as upstream
            mask = additive_mask(q, k, call.key_mask, None if is_causal else attn_mask, added_keys(self))
            dropout_p = self.dropout if self.training else 0.0
            out, weights = exact_attention(q, k, v, mask, dropout_p, is_causal, need_weights)
            out, weights = zero(out, call.given), None if weights is None else zero(weights, call.given)
        else:
            out, weights = self._nystrom(q, k, v, call, need_weights, average_attn_weights)
        if self.conv is not None and call.exact:  # else the operator has added it
            out = out + self.conv(v, call.keys, call.queries)

        out = out.transpose(1, 2).flatten(2)
        weights = weights.mean(1) if weights is not None and weights.dim() == 4 and average_attn_weights else weights
        if not batched:
            return self.out_proj(out.squeeze(0)), None if weights is None else weights.squeeze(0)
        return self.out_proj(out if self.batch_first else out.transpose(0, 1)), weights

    def _nystrom(
        self, q: Tensor, k: Tensor, v: Tensor, call: Regime, need_weights: bool, average_attn_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """-> (N, H, L, d) and, with need_weights, the matrix behind it, (N, L, S) or (N, H, L, S), without dropout."""
        options = {**self.attention_options(), "query_padding_mask": call.queries, "self_attention": False}
        conv_weight = None if self.conv is None else self.conv.weight
        out = nystrom_attention(q, k, v, call.keys, conv_weight=conv_weight, **options)
        if not need_weights:
            return out, None
        warn_once(NystromMultiheadAttention, _APPROXIMATE_WEIGHTS)
        options["dropout_p"] = 0.0
        return out, nystrom_attention_weights(q, k, call.keys, average_heads=average_attn_weights, **options)

    def attention_rows(
        self,
        query: Tensor,
        rows: Tensor | Sequence[int],
        key: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        *,
        query_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Some rows of the weights that ``forward(query, key, ...)`` returns with ``need_weights``, without the others:
        O(R S) memory beside the projections, O(L + S) time. A class token's: ``attention_rows(x, [0])``.

        Args:
            rows: positions of R queries, a list or an int64 tensor on the device of query; negative ones count from
                the end.
            key: as in ``forward``; None: query, self-attention.
        The other arguments are those of ``forward``, without ``attn_mask``.

        Returns:
            (N, R, S), with ``average_attn_weights=False`` (N, H, R, S), unbatched without N; S counts the keys of
            ``add_bias_kv`` and ``add_zero_attn``. Without dropout, in training too. Differentiable.

        Raises:
            ValueError: rows that are no positions of queries.
            NotImplementedError: nested tensors.
        The other errors are those of ``forward``.
        """
        key = query if key is None else key
        return attention_rows(self, query, rows, key, key_padding_mask, query_padding_mask, average_attn_weights)

    def attention_options(self) -> dict[str, Any]:
        """Options of the operator, without masks."""
        return {
            "num_landmarks": self.num_landmarks,
            "pinv_iterations": self.pinv_iterations,
            "coefficient": self.coefficient,
            "window": self.window,
            "pinned": self.pinned,
            "dropout_p": self.dropout if self.training else 0.0,
        }
