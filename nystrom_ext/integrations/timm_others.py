"""Why timm's other attention modules stay exact."""

from __future__ import annotations

import re
from typing import Any

_BIAS = "may add position biases to its scores, which landmarks cannot honour; it stays exact"
_WINDOWS = "attends within windows of the image, at a cost linear in its size; it stays exact"
_POOLED = "attends to pooled or strided keys, at a lower cost already; it stays exact"
_FEW = "has one query, or a few latent ones, at a cost linear in the tokens already; it stays exact"
_NO_PAIRS = "has no softmax over pairs of tokens, its cost is linear in them already; it stays what it is"
_HEADS = "mixes the scores and probabilities of its heads, which are never formed here; it stays exact"
_TWO = "subtracts two softmaxes; it stays exact, or call nystrom_ext.nystrom_attention for each in its forward"
_OTHER = "is not timm's Attention, AttentionRope or EvaAttention; call nystrom_ext.nystrom_attention in its forward"

# Names below timm.layers and timm.models. Those that contain neither Attention nor Attn are found by this table alone.
_REASONS = {
    _BIAS: """beit.Attention bottleneck_attn.BottleneckAttn convit.GPSA efficientformer.Attention
        efficientformer_v2.Attention2d efficientformer_v2.Attention2dDownsample
        efficientvit_msra.CascadedGroupAttention gcvit.WindowAttentionGlobal halo_attn.HaloAttn levit.Attention
        levit.AttentionDownsample maxxvit.Attention2d maxxvit.AttentionCl swin_transformer.WindowAttention
        swin_transformer_v2.WindowAttention swin_transformer_v2_cr.WindowMultiHeadAttention tiny_vit.Attention
        vision_transformer_relpos.RelPosAttention vision_transformer_sam.Attention""",
    _WINDOWS: "davit.WindowAttention nest.Attention twins.LocallyGroupedAttn",
    _POOLED: """mvitv2.MultiScaleAttention mvitv2.MultiScaleAttentionPoolFirst nextvit.EfficientAttention
        pvt_v2.Attention twins.GlobalSubSampleAttn""",
    _FEW: """attention_pool.AttentionPoolLatent cait.ClassAttn crossvit.CrossAttention other_pool.SimPool1d
        other_pool.SimPool2d volo.ClassAttention""",
    _NO_PAIRS: """cbam.ChannelAttn cbam.LightChannelAttn cbam.LightSpatialAttn cbam.SpatialAttn
        coat.FactorAttnConvRelPosEnc coord_attn.CoordAttn coord_attn.EfficientLocalAttn coord_attn.SimpleCoordAttn
        coord_attn.StripAttn davit.ChannelAttention davit.ChannelAttentionV2 edgenext.CrossCovarianceAttn
        mobilevit.LinearSelfAttention nextvit.ConvAttention non_local_attn.BilinearAttnTransform
        selective_kernel.SelectiveKernelAttn split_attn.SplitAttn swiftformer.EfficientAdditiveAttention
        volo.OutlookAttention xcit.XCA""",
    _HEADS: "cait.TalkingHeadAttn",
    _TWO: "diff_attention.DiffAttention vision_transformer.DiffParallelScalingBlock",
    _OTHER: """convit.MHSA iformer.SHMA shvit.SHSA
        vision_transformer.ParallelScalingBlock""",
}
REASONS = {name: why for why, names in _REASONS.items() for name in names.split()}


def reason(cls: type[Any]) -> str | None:
    """Why a module of this class is never converted; None for classes that are no attention of timm's."""
    package, _, name = cls.__module__.rpartition(".")
    if package not in ("timm.layers", "timm.models"):
        return None
    why = REASONS.get(f"{name}.{cls.__qualname__}", _OTHER if re.search("Attention|Attn", cls.__name__) else None)
    return why and f"{cls.__module__}.{cls.__qualname__} {why}"
