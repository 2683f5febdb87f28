"""Tests run on one thread: tensors this small only lose by threads, and the cores are shared with other workers."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)  # some tests are about threads
