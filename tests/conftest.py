"""Tests run on one thread: tensors this small only lose by threads, and the cores are shared with other workers."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)  # some tests are about threads


@pytest.fixture
def fresh() -> Iterator[None]:
    """One seed, nothing compiled yet, and float64, in which results can be compared to rounding."""
    torch.manual_seed(0)
    torch.compiler.reset()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A group of this process alone, which DistributedDataParallel and FSDP2 ask for."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
