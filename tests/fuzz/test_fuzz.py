"""Random configurations against the reference; ``--fuzz N`` draws N of them, ``python -m tests.fuzz`` repeats one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.fuzz.configurations import EXPANDED, LONGEST_IN_EMULATOR, ROLES, Configuration, configuration
from tests.fuzz.differential import fuzz
from tests.problems import DTYPES


def test_configurations(numbers: range, device: str, request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("--fuzz-seed")
    failures = [failure for number in numbers if (failure := fuzz(seed, number, device))]
    assert not failures, "\n" + "\n".join(failures)


def test_a_configuration_is_its_number() -> None:
    for number in range(50):
        a, b = configuration(3, number), configuration(3, number)
        assert a == b and a != configuration(4, number) and a != configuration(3, number + 1)
        assert all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_everything_is_drawn() -> None:
    """The first 500 hold every option, alone and where it borders on another."""
    seen = Counter(kind for number in range(500) for kind in kinds(configuration(0, number)))
    assert min(seen[kind] for kind in kinds(None)) >= 5, seen


def kinds(p: Configuration | None) -> list[str]:
    """What a configuration has; of None, everything that one can have."""
    facts = {
        "exact": p and 0 < min(p.L, p.keys) <= p.m,
        "nystrom": p and min(p.L, p.keys) > p.m,
        "one token more than landmarks": p and min(p.L, p.keys) == p.m + 1,
        "as many tokens as landmarks": p and min(p.L, p.keys) == p.m,
        "no tokens": p and min(p.L, p.keys) == 0,
        "one landmark": p and p.m == 1,
        "several chunks": p and max(p.L, p.keys) == 4097,
        "window, nystrom": p and p.options.get("window") and p.L > p.m,
        "pinned, nystrom": p and p.options.get("pinned") and p.L > p.m,
        "window, masked": p and p.options.get("window") and p.mask != "none",
        "window, dropout": p and p.options.get("window") and p.options.get("dropout_p"),
        "convolution, masked": p and p.taps and p.mask != "none",
        "even taps": p and p.taps and p.taps % 2 == 0,
        "grouped": p and p.kv_heads not in (None, p.H),
        "global": p and p.options.get("coefficient") == "global",
        "other masks of queries": p and p.L == p.keys and p.query_mask not in ("same", "equal"),
        "all dropped": p and p.options.get("dropout_p") == 1,
        "some gradients": p and 0 < len(p.wanted) < len(ROLES) - 1,
        "no gradients": p and not p.wanted,
        "stride 0": p and p.layout["query"] in EXPANDED,
        "gradient of stride 0": p and p.layout["grad"] in EXPANDED,
        "packed": p and p.packed,
        "packed, window": p and p.packed and p.options.get("window"),
        "packed, convolution": p and p.packed and p.taps,
        "packed, dropout": p and p.packed and p.options.get("dropout_p"),
        "packed, other lengths of queries": p and p.packed and p.query_mask != "equal",
        "joined heads": p and p.layout["query"] == p.layout["key"] == p.layout["value"] == "heads inside",
        **{str(dtype): p and p.dtype == dtype for dtype in DTYPES},
    }
    return [name for name, fact in facts.items() if p is None or fact]


def test_small_ones_are_small() -> None:
    small = [configuration(0, number, small=True) for number in range(200)]
    assert all(max(p.L, p.keys) <= LONGEST_IN_EMULATOR for p in small)
