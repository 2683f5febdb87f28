"""The emulator of CUDA kernels: it runs correct kernels correctly, and sees what it is there to see."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from simt import build

if build.cuda_headers() is None:
    pytest.skip("the headers of the CUDA toolkit are not installed", allow_module_level=True)

SEEDS = (0, 1, 2)
Binaries = Callable[[str], tuple[Path, Path]]

# What a build says of a kernel with a defect.
CAUGHT = {
    "plain": """
        product missing_barrier: wrong values
        product missing_refill_barrier: wrong values
        product missing_wait: wrong values
        product wait_after_barrier: wrong values
        product missing_syncwarp: wrong values
        product swizzled_writes_only: wrong values
        product no_swizzle: bank conflicts
        product overlapping_blocks: wrong values
        product short_shared_memory: cp.async: destination outside shared memory: offset 32752 of 32752
        reduce divergent_shuffle: divergence
        reduce skipped_barrier: exits while .* wait at __syncthreads
        reduce early_exit: exits while .* wait at __syncthreads|__syncthreads after 32 threads .* have exited
        reduce uninitialised_read: wrong values
        copy_async unawaited_copy: exits with 1 cp.async copies
        copy_async misaligned_copy: cp.async: source not aligned
        break_rules misaligned_row: ldmatrix: the row of lane 31 is not aligned
        break_rules short_shared_memory: ldmatrix: the row of lane 31 is outside shared memory
        large_launch too_much_shared_memory: too much dynamic shared memory
    """,
    "race": """
        product missing_barrier: race: ldmatrix at shared memory .* wrote without a barrier
        product missing_refill_barrier: race: cp.async to at shared memory .* read without a barrier
        product missing_wait: race: ldmatrix .* where a cp.async .* is in flight
        product wait_after_barrier: race: ldmatrix .* where a cp.async .* is in flight
        product missing_syncwarp: race: load at shared memory .* wrote without a barrier
        product no_swizzle: bank conflicts
        product overlapping_blocks: race: store at global memory .* another block
        reduce missing_barrier: (uninitialised|race): load at shared memory
        reduce uninitialised_read: uninitialised: load at shared memory
        reduce overlapping_blocks: race: store at global memory .* another block
        reverse missing_barrier: race: .* at global memory
        reverse_quads missing_syncwarp: (uninitialised|race): load at shared memory
        reverse_quads narrow_mask: (uninitialised|race): load at shared memory
        copy_async read_before_wait: race: load .* where a cp.async .* is in flight
        copy_async source_overwritten: race: .*(written while the copy was in flight|read without a barrier)
        break_rules shared_overrun: store beyond shared memory
        break_rules other_stack: access to a local variable of thread 0
    """,
    "asan": """
        product load_tail: AddressSanitizer: heap-buffer-overflow
        product store_tail: AddressSanitizer: heap-buffer-overflow
        copy store_tail: AddressSanitizer: heap-buffer-overflow
        break_rules shared_overrun: AddressSanitizer: heap-buffer-overflow
    """,
}
CASES = [(mode, *case.strip().split(": ", 1)) for mode, text in CAUGHT.items() for case in text.strip().splitlines()]


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Binaries:
    """The self-test as a program and as a library, by mode."""
    folder = tmp_path_factory.mktemp("simt")
    return cache(lambda mode: build.build(mode, [build.FOLDER / "selftest" / "selftest.cpp"], folder / mode))


def run(program: Path, *cases: tuple[str, int]) -> list[str]:
    """What the self-test says of each (kernel and defect, seed)."""
    arguments = [word for names, seed in cases for word in (*names.split(), str(seed))]
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=60)
    if "AddressSanitizer" in done.stderr:
        return [done.stderr]
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("mode", build.MODES)
def test_correct_kernels(binaries: Binaries, mode: str) -> None:
    verdicts = run(binaries(mode)[0], *[("* none", seed) for seed in (*SEEDS, 12345)])
    assert len(verdicts) >= 40
    assert [v for v in verdicts if not v.endswith(": ok")] == []


@pytest.mark.parametrize(("mode", "names", "pattern"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_defects_are_caught(binaries: Binaries, mode: str, names: str, pattern: str) -> None:
    for seed in SEEDS:
        (verdict,) = run(binaries(mode)[0], (names, seed))
        assert re.search(pattern, verdict), verdict


@pytest.mark.parametrize("mode", build.MODES)
def test_usable_after_errors(binaries: Binaries, mode: str) -> None:
    broken = [
        "reduce divergent_shuffle",
        "product short_shared_memory",
        "reduce early_exit",
        "copy_async unawaited_copy",
    ]
    for seed in SEEDS:
        verdicts = run(binaries(mode)[0], *[(names, seed) for names in broken], ("* none", seed))
        assert all("block (" in v for v in verdicts[: len(broken)])
        assert all(v.endswith(": ok") for v in verdicts[len(broken) :])


@pytest.mark.parametrize("mode", ["plain", "race"])
def test_inside_python(binaries: Binaries, mode: str, capfd: pytest.CaptureFixture[str]) -> None:
    library = ctypes.CDLL(str(binaries(mode)[1]))
    assert library.selftest_run(b"reduce", b"early_exit", 0) == 1
    assert library.selftest_run(b"product", b"none", 1) == 1
    broken, correct = capfd.readouterr().out.splitlines()
    assert "have exited" in broken or "exits while" in broken
    assert correct == "product none 1: ok"


def test_inside_python_with_sanitizers(binaries: Binaries) -> None:
    program = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).selftest_run(*[a.encode() for a in sys.argv[2:4]], 1)"
    cases = {
        "product none": "product none 1: ok",
        "product store_tail": "heap-buffer-overflow",
        "reduce early_exit": "__syncthreads",
    }
    for names, pattern in cases.items():
        command = [sys.executable, "-c", program, str(binaries("asan")[1]), *names.split()]
        done = subprocess.run(command, capture_output=True, text=True, env=build.sanitizer_environment(), timeout=60)
        assert pattern in done.stdout + done.stderr
