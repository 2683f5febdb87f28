"""Random configurations and extreme values on a GPU: ``pytest tests/cuda/test_gpu_fuzz.py --fuzz 2000``."""

from test_extremes import *  # noqa: F403  (collected here with this folder's device)
from test_invariance import test_what_new_memory_holds  # noqa: F401

from tests.fuzz.test_fuzz import test_configurations  # noqa: F401
