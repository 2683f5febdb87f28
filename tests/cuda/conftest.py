"""Tests that need a GPU are skipped, with the reason, where there is none."""

import pytest
import torch


@pytest.fixture
def device() -> str:
    return "cuda"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        reason = f"torch {torch.__version__} finds no GPU"
        for item in items:
            if item.path.name.startswith("test_gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))
