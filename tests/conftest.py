"""Tests run on one thread: tensors this small only lose by threads, and the cores are shared with other workers.

With NYSTROM_SIMT=<library of tests/simt/kernels.py> the operator's CPU tensors run through the CUDA kernels' source.
"""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed

EMULATED = os.environ.get("NYSTROM_SIMT")


FUZZ_CHUNK = 25  # configurations in a test, so that workers can share them


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=500, metavar="N", help="configurations that tests/fuzz draws")
    parser.addoption("--fuzz-seed", type=int, default=0, metavar="SEED", help="other configurations (default 0)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "numbers" in metafunc.fixturenames:
        count = metafunc.config.getoption("--fuzz")
        chunks = [range(first, min(first + FUZZ_CHUNK, count)) for first in range(0, count, FUZZ_CHUNK)]
        metafunc.parametrize("numbers", chunks, ids=[f"{chunk.start}-{chunk.stop - 1}" for chunk in chunks])


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


@pytest.fixture
def device() -> str:
    """Where a test's tensors are; tests/cuda runs some of these tests again and says otherwise."""
    return "cpu"


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A group of this process alone, which DistributedDataParallel and FSDP2 ask for."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every call of the operator by compat.attention."""
    from nystrom_ext import nystrom_attention
    from nystrom_ext.compat import presets

    calls: list[dict[str, Any]] = []

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs)
        return nystrom_attention(*args, **kwargs)

    monkeypatch.setattr(presets, "nystrom_attention", spy)
    return calls


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Counts what the Hugging Face attention function calls, and keeps the arguments of the last Nyström attention."""
    from nystrom_ext.integrations import transformers as integration

    counts = SimpleNamespace(nystrom=0, sdpa=0, arguments=None)
    nystrom_attention, sdpa = integration.nystrom_attention, integration.sdpa_attention_forward

    def count_nystrom(*args: Any, **kwargs: Any) -> Any:
        counts.nystrom, counts.arguments = counts.nystrom + 1, (args, kwargs)
        return nystrom_attention(*args, **kwargs)

    def count_sdpa(*args: Any, **kwargs: Any) -> Any:
        counts.sdpa += 1
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(integration, "nystrom_attention", count_nystrom)
    monkeypatch.setattr(integration, "sdpa_attention_forward", count_sdpa)
    return counts


@pytest.fixture(scope="session", autouse=EMULATED is not None)
def cuda_kernels_in_the_emulator() -> Iterator[None]:
    """Allocated memory is filled with NaN, so that a kernel that reads what none wrote shows it."""
    import nystrom_ext  # noqa: F401

    torch.ops.load_library(EMULATED)
    torch.ops.nystrom_simt.options(int(os.environ.get("NYSTROM_SIMT_SEED", "0")), 232448)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    launches, _, _, ldmatrix, conflicts, _ = torch.ops.nystrom_simt.stats()
    assert launches > 0
    assert conflicts == 0, f"{conflicts} bank conflicts in {ldmatrix} ldmatrix"
