"""Each worker of pytest-xdist gets one thread: the machine's cores are shared out to workers, not to kernels."""

import os

import torch


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
