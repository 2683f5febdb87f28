"""Other implementations of Nyström attention: their results, their checkpoints, and classes in place of theirs.

preset("lucidrains")                          the options under which `nystrom_attention` computes the same
attention("lucidrains", q, k, v, mask)        the same in every case, fused where the mathematics coincide
load_state_dict(module, weights, "official")  a checkpoint into `NystromMultiheadAttention`
LucidrainsNystromAttention                    nystrom_attention.NystromAttention, of TransMIL
XformersNystromAttention                      xformers.components.attention.NystromAttention, removed in 0.0.29
"""

from .checkpoints import load_state_dict
from .lucidrains import NystromAttention as LucidrainsNystromAttention
from .presets import attention, preset
from .xformers import NystromAttention as XformersNystromAttention

__all__ = ["LucidrainsNystromAttention", "XformersNystromAttention", "attention", "load_state_dict", "preset"]
