"""`NystromMultiheadAttention`: `nn.MultiheadAttention` at a cost linear in the sequence length.

Up to ``num_landmarks`` tokens it computes what `nn.MultiheadAttention` computes; beyond, it approximates
(Nyströmformer, arXiv 2102.03902; :mod:`nystrom_ext.reference`). Shapes in this file: N batch, H heads, L queries,
S keys, E ``embed_dim``, d = E / H, m ``num_landmarks``.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._attention import IGNORE_THRESHOLD, ValueConvolution, check_key_mask, exact_attention, same_tensor, zero
from ._options import Options, count
from ._tracing import refuse_script
from .functional import nystrom_attention, nystrom_attention_weights

_F: Any = F  # nn.MultiheadAttention's own checks, so that messages agree; they are missing in the stubs

# A fixed negative key instead of register_forward_pre_hook: generated keys count up from 0 in every process, so the
# first hook registered on an unpickled module could overwrite ours.
HOOK_KEY = -1


def keep_python_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Does nothing. Hooks keep nn.TransformerEncoderLayer from running a fused exact attention on the module's weights
    instead of calling it. At module level, so that copies and pickles keep it."""


def added_keys(module: nn.MultiheadAttention) -> int:
    """How many keys ``add_bias_kv`` and ``add_zero_attn`` add."""
    return (module.bias_k is not None) + module.add_zero_attn


class NystromMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with Nyström attention: same parameters, state_dict, initial values and ``forward``.

    The shape chooses the regime. With min(L, S) <= ``num_landmarks``, S counting the keys of ``add_bias_kv`` and
    ``add_zero_attn``, the result is that of `nn.MultiheadAttention` to rounding, with every mask, weights and dropout;
    only rows without any key give ``out_proj.bias`` and zero weights where upstream may give NaN. Beyond, attention is
    approximated at a cost of O((L + S) m) and does not depend on padding; where ``query is key``, ``key_padding_mask``
    removes the queries too, and their output is ``out_proj.bias``. Dropout then acts on the (L, m) probabilities.

    Args:
        num_landmarks: m, the number of segment means that stand for the sequence.
        pinv_iterations: Newton-Schulz iterations for the pseudo-inverse of the m x m matrix.
        conv_kernel_size: taps of a depthwise convolution of the values, added to the attention in both regimes. Adds
            the parameter ``conv.weight`` (H, taps); needs L = S and no added keys.
        coefficient: scale of the iteration's start; ``"global"``, as in the paper's code, couples a batch's samples.
        window, pinned: exact attention, beyond m tokens, to the tokens at a distance of at most ``window`` and to the
            first ``pinned`` ones, beside the landmarks; needs self-attention, ``query is key``, and no added keys.
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
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`: same shapes, masks (True = ignore) and messages.

        Beyond ``num_landmarks`` tokens a floating-point ``key_padding_mask`` holds 0 (keep) or values <= -1e4 (ignore);
        anything else raises RuntimeError, on CUDA asynchronously. Self-attention is ``query is key``: a copy as the key
        is cross-attention, whose padded queries take part in the landmarks as any other. A strided NestedTensor is
        accepted in the self-attention of a ``batch_first`` module without masks, in every mode.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            masked = key_padding_mask is not None or attn_mask is not None
            return self._forward_nested(query, key, value, masked, need_weights, average_attn_weights)
        batched = _F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        q, k, v = self._project(query, key, value)
        kpm = self._key_mask(key_padding_mask, k)
        ignored = kpm if kpm is None or kpm.dtype == torch.bool else kpm <= IGNORE_THRESHOLD
        dropout_p = self.dropout if self.training else 0.0
        exact = self._is_exact(q.shape[2], k.shape[2], attn_mask)
        ignored_queries = None
        if ignored is not None and (not exact or self.conv is not None) and same_tensor(query, key):
            ignored_queries = ignored[:, : q.shape[2]]
        if exact:
            is_causal = is_causal and kpm is None and not need_weights  # else attn_mask itself is used, as upstream
            mask = self._additive_mask(q, k, kpm, None if is_causal else attn_mask)
            out, weights = exact_attention(q, k, v, mask, dropout_p, is_causal, need_weights)
        else:
            check_key_mask(kpm)
            self._check_window(query, key)
            out, weights = self._nystrom(q, k, v, ignored, ignored_queries, dropout_p, need_weights)
        if self.conv is not None and (exact or need_weights):  # else the operator has added it
            out = out + self.conv(v, ignored, ignored_queries)

        out = out.transpose(1, 2).flatten(2)
        weights = weights.mean(1) if weights is not None and average_attn_weights else weights
        if not batched:
            return self.out_proj(out.squeeze(0)), None if weights is None else weights.squeeze(0)
        return self.out_proj(out if self.batch_first else out.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> q (N, H, L, d), k and v (N, H, S, d) with the added keys."""
        q, k, v = self._in_projection(query, key, value)
        if query.dim() == 2:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        if len(q) != len(k):
            raise RuntimeError(f"query and key must have the same batch size, got {len(q)} and {len(k)}")
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if self.conv is not None and q.shape[1] != k.shape[1]:
            raise ValueError(
                f"the convolution needs L = S, got L={q.shape[1]}, S={k.shape[1]}; construct with conv_kernel_size=None"
            )
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def _in_projection(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        """q, k, v in the caller's layout. Reads the weights at each call: others may have replaced them by tensors."""
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        if not self._qkv_same_embed_dim:
            if key.shape[:-1] != value.shape[:-1]:
                raise AssertionError(
                    f"key's sequence and batch dims {key.shape[:-1]} do not match value's {value.shape[:-1]}"
                )
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            return _F._in_projection(query, key, value, *weights, *biases)
        if key.shape != value.shape:
            raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
        if query is key and key is value:  # strided views suffice; _in_projection_packed would copy q, k and v
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return _F._in_projection_packed(query, key, value, self.in_proj_weight, self.in_proj_bias)

    def _key_mask(self, mask: Tensor | None, k: Tensor) -> Tensor | None:
        """key_padding_mask (N, S) or (S,) -> (N, S) with the added keys, which are never masked."""
        if mask is None:
            return None
        if mask.dtype != torch.bool:
            F._canonical_mask(mask, "key_padding_mask", None, "", mask.dtype)  # raises for dtypes that are no masks
        mask = F.pad(mask if mask.dim() == 2 else mask.unsqueeze(0), (0, added_keys(self)))
        for dim, (size, expected) in enumerate(zip(mask.shape, (len(k), k.shape[2]), strict=True)):
            if size != expected:
                raise AssertionError(f"Expected key_padded_mask.shape[{dim}] to be {expected}, but got {size}")
        return mask

    def _is_exact(self, L: int, S: int, attn_mask: Tensor | None) -> bool:
        if min(L, S) <= self.num_landmarks:
            return True
        if attn_mask is not None and self.unsupported_mask == "error":
            raise NotImplementedError(
                f"NystromMultiheadAttention: attn_mask is not supported with L={L}, S={S} > num_landmarks="
                f"{self.num_landmarks} (an (L, S) mask is O(L*S)), nor is is_causal (landmarks are means over past and "
                f"future). Use key_padding_mask, raise num_landmarks, or construct with "
                f'unsupported_mask="exact".'
            )
        return attn_mask is not None

    def _check_window(self, query: Tensor, key: Tensor) -> None:
        if (self.window or self.pinned) and not same_tensor(query, key):
            raise ValueError(
                f"NystromMultiheadAttention: window={self.window} and pinned={self.pinned} need self-attention, got a "
                f"key of shape {tuple(key.shape)} that is not the query of shape {tuple(query.shape)}; pass the same "
                f"tensor as both, or construct with window=0, pinned=0"
            )

    def _additive_mask(self, q: Tensor, k: Tensor, kpm: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
        """Both masks as one of q's dtype that broadcasts to (N, H, L, S). F.scaled_dot_product_attention on the CPU
        refuses others or, float32 next to float64, silently computes nonsense (torch 2.13)."""
        kpm = F._canonical_mask(kpm, "key_padding_mask", F._none_or_dtype(attn_mask), "attn_mask", q.dtype)
        attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", q.dtype, check_other=False)
        if attn_mask is not None:
            N, H, L, S = *q.shape[:3], k.shape[2] - added_keys(self)
            expected = (L, S) if attn_mask.dim() == 2 else (N * H, L, S)
            if attn_mask.shape != expected:
                raise RuntimeError(
                    f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {expected}."
                )
            attn_mask = F.pad(attn_mask, (0, added_keys(self)))
            attn_mask = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (N, H))
        if kpm is not None:
            kpm = kpm[:, None, None]
            attn_mask = kpm if attn_mask is None else kpm + attn_mask
        return None if attn_mask is None else attn_mask.to(q.dtype)

    def _nystrom(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ignored: Tensor | None,
        ignored_queries: Tensor | None,
        dropout_p: float,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """-> (N, H, L, d) and, with need_weights, the weights (N, H, L, S) that gave it."""
        options: dict[str, Any] = {
            "query_padding_mask": ignored_queries,
            "num_landmarks": self.num_landmarks,
            "pinv_iterations": self.pinv_iterations,
            "coefficient": self.coefficient,
            "window": self.window,
            "pinned": self.pinned,
            "dropout_p": dropout_p,
        }
        if not need_weights:
            conv_weight = None if self.conv is None else self.conv.weight
            return nystrom_attention(q, k, v, ignored, conv_weight=conv_weight, **options), None
        if not torch.compiler.is_compiling():  # a warning would break the graph
            _warn_approximate_weights()
        weights = nystrom_attention_weights(q, k, ignored, **options)
        return weights @ zero(v, ignored), weights

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, masked: bool, need_weights: bool, average_attn_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Pads, computes with a mask, and returns a NestedTensor; weights stay padded, with zeros."""
        same = query is key and key is value
        if not same or query.layout != torch.strided or query.dim() != 3 or not self.batch_first or masked:
            raise AssertionError(
                "NystromMultiheadAttention does not support NestedTensor outside of strided 3-D self-attention in a "
                f"batch_first module without masks, got {query.dim()}-D query of layout {query.layout}, "
                f"query is key is value: {same}, batch_first={self.batch_first}, masks: {masked}; pad it and pass "
                "key_padding_mask"
            )
        x = query.to_padded_tensor(0.0)
        padding = torch.arange(x.shape[1], device=x.device) >= query._nested_tensor_size()[:, :1].to(x.device)
        out, weights = self.forward(x, x, x, padding, need_weights, average_attn_weights=average_attn_weights)
        if weights is not None:
            weights = weights.masked_fill(padding[:, :, None] if weights.dim() == 3 else padding[:, None, :, None], 0)
        return torch._nested_tensor_from_mask(out, ~padding), weights


@functools.cache
def _warn_approximate_weights() -> None:
    warnings.warn(
        "NystromMultiheadAttention: need_weights=True costs O(L * S) beyond num_landmarks tokens, and the weights are "
        "approximate (entries may be negative, rows need not sum to 1); need_weights=False costs O(L + S)",
        stacklevel=7,  # past the hook-calling frames of nn.Module
    )
