"""timm: an ``attn_layer`` with Nyström attention.

    timm.create_model("vit_base_patch16_224", attn_layer=NystromTimmAttention)

:func:`nystrom_ext.convert_` makes existing models use it.
"""

from __future__ import annotations

from collections.abc import Iterable

from timm.layers import Attention
from torch import Tensor, nn

from ..functional import nystrom_attention
from ..modules import Options


class NystromTimmAttention(Attention):
    """`timm.layers.Attention`, same arguments and parameters. Up to ``num_landmarks`` tokens it is that very module.

    Options are set by :func:`nystrom_ext.convert_`, or for ``attn_layer`` by a subclass::

        class Attention128(NystromTimmAttention):
            nystrom_options = Options(num_landmarks=128)
    """

    nystrom_options = Options()

    def configure(self, options: Options) -> None:
        self.nystrom_options = options

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (B, N, C) -> (B, N, dim_out). ``attn_mask`` and ``is_causal`` beyond num_landmarks tokens:
        NotImplementedError, or exact attention with ``unsupported_mask="exact"``."""
        options, tokens = self.nystrom_options, x.shape[1]
        masked = attn_mask is not None or is_causal
        if tokens <= options.num_landmarks or (masked and options.unsupported_mask == "exact"):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        if masked:
            raise NotImplementedError(
                f"NystromTimmAttention: attn_mask and is_causal are not supported with {tokens} tokens > num_landmarks="
                f'{options.num_landmarks}; raise num_landmarks or use unsupported_mask="exact"'
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        out = nystrom_attention(
            q,
            k,
            v,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            **options.attention,
        )
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


SWAPS: dict[type[nn.Module], type[nn.Module]] = {Attention: NystromTimmAttention}


def find(modules: dict[str, nn.Module]) -> dict[str, str | None]:
    """timm's other attention modules, with the reason why they are never converted."""
    ours = [(name, type(m)) for name, m in modules.items() if not isinstance(m, Attention)]
    ours = [(name, cls) for name, cls in ours if cls.__module__.startswith("timm.") and "Attention" in cls.__name__]
    return {name: f"{cls.__module__}.{cls.__qualname__} is not timm.layers.Attention" for name, cls in ours}


def convert(modules: dict[str, nn.Module], options: dict[str, Options]) -> None:
    """Nothing besides the change of class."""


def revert(modules: Iterable[nn.Module], scope: Iterable[nn.Module]) -> None:
    """Nothing besides the change of class."""
