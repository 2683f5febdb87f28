"""Other implementations of Nyström attention: their results, their checkpoints, and a class for a removed one.

preset("lucidrains")                          the options under which `nystrom_attention` computes the same
attention("lucidrains", q, k, v, mask)        the same in every case, fused where the mathematics coincide
load_state_dict(module, weights, "official")  a checkpoint into `NystromMultiheadAttention`
XformersNystromAttention                      xformers.components.attention.NystromAttention, removed in 0.0.29
"""

from .checkpoints import load_state_dict
from .presets import attention, preset
from .xformers import NystromAttention as XformersNystromAttention

__all__ = ["XformersNystromAttention", "attention", "load_state_dict", "preset"]
