"""Nyström attention for PyTorch: O(n) attention that swaps into existing transformers."""

from ._library import build_info, cmake_prefix_path
from ._version import __version__
from .convert import Report, convert_, nystrom, revert_
from .diagnosis import Diagnosis, diagnose
from .functional import nystrom_attention, nystrom_attention_weights
from .modules import NystromMultiheadAttention
from .varlen import nystrom_attention_varlen

__all__ = [
    "Diagnosis",
    "NystromMultiheadAttention",
    "Report",
    "__version__",
    "build_info",
    "cmake_prefix_path",
    "convert_",
    "diagnose",
    "nystrom",
    "nystrom_attention",
    "nystrom_attention_varlen",
    "nystrom_attention_weights",
    "revert_",
]
