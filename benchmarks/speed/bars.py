"""The bars that the project set itself, each beside what the run measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import gradients, stages
from .cases import MIL_HEADS, MIL_LANDMARKS, MIL_LENGTHS, MODULES, ONE_LONG, PASSES, Case, mil_column

COMPOSITIONS = ("eager", "two SDPA", "two SDPA compiled")
EXACT = {("forward", 512): 2.0, ("forward", 4096): 22.0, ("forward+backward", 4096): 20.0}
SHAPE = {"batch": 1, "heads": 8, "head_dim": 64, "num_landmarks": 64, "dtype": "float32", "device": "cpu"}
SHARED = ("H=1", "H=8", f"H=1, m={MIL_LANDMARKS}")
GRAIN = 2**20  # bytes: what a process measures of itself is no finer


class Cells:
    """The measured cells by table, pass, row and column."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.cells = {(c["table"], c["pass"], c["row"], c["column"]): c for c in results["cells"] if "median" in c}

    def median(self, table: str, pass_name: str, row: str, column: int | str) -> float | None:
        cell = self.cells.get((table, pass_name, row, str(column)))
        return cell["median"] if cell else None

    def ratio(self, table: str, pass_name: str, above: str, below: str, column: int | str) -> float | None:
        """Seconds of row ``above`` / seconds of row ``below``."""
        a, b = (self.median(table, pass_name, row, column) for row in (above, below))
        return a / b if a and b else None

    def lengths(self) -> list[int]:
        return sorted({int(column) for table, _, _, column in self.cells if table == "length"})


def bar(name: str, measured: float | bool | None, limit: float, at_most: bool = False) -> dict[str, Any]:
    """``passed`` is None where the run did not measure it."""
    passed = None if measured is None else measured <= limit if at_most else measured >= limit
    return {"bar": name, "measured": measured, "limit": limit, "at_most": at_most, "passed": passed}


def bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    """All bars that speak of the shape that was measured."""
    if any(results["config"][name] != value for name, value in SHAPE.items()):
        return []
    cells = Cells(results)
    same = results["same_bits"]
    return [
        *_compositions(cells),
        *_exact(cells),
        *_window(cells),
        *_types(cells, results["machine"]["build"]["cpu_capability"]),
        *_gradients(results["gradients"]),
        *_peak(results),
        bar("n = 65536 / n = 4096, forward: linear in n", _growth(cells), 1.1 * 16, at_most=True),
        *_memory(results),
        bar("n = 1,000,000 runs forward+backward", _million(cells), True),
        *(bar(f"1 thread / 2 threads, {heads}", _threads(cells, heads), 1.8) for heads in SHARED),
        *_mil(cells),
        *_packed(cells, results["memory"]),
        *_modules(cells),
        bar("thread count and batch mates change no bit", same, True),
        bar("half padding / none, forward", _padding(cells), 0.6, at_most=True),
    ]


def _compositions(cells: Cells) -> Iterator[dict[str, Any]]:
    """Against the best of those that were measured."""
    for pass_name in ("forward", "forward+backward"):
        for n in cells.lengths():
            found = {peer: cells.ratio("length", pass_name, peer, "nystrom_ext", n) for peer in COMPOSITIONS}
            ratios = {peer: ratio for peer, ratio in found.items() if ratio}
            best = min(ratios, key=ratios.__getitem__, default="a composition")
            limit = 1.5 if pass_name != "forward" else 2.0 if n <= 1024 else 1.7
            yield bar(f"{best} / ours, {pass_name}, n = {n}", ratios.get(best), limit)


def _exact(cells: Cells) -> Iterator[dict[str, Any]]:
    for (pass_name, n), limit in EXACT.items():
        ratio = cells.ratio("length", pass_name, "exact SDPA", "nystrom_ext", n)
        yield bar(f"exact SDPA / ours, {pass_name}, n = {n}", ratio, limit)


def _window(cells: Cells) -> Iterator[dict[str, Any]]:
    for pass_name in ("forward", "forward+backward"):
        for n in (n for n in cells.lengths() if n >= 2048):
            ratio = cells.ratio("length", pass_name, "with window", "nystrom_ext", n)
            yield bar(f"with window / plain, {pass_name}, n = {n}", ratio, 1.7, at_most=True)


def _types(cells: Cells, capability: str) -> Iterator[dict[str, Any]]:
    for n in (512, 2048, 4096):
        if capability != "avx512":  # there torch multiplies bfloat16 matrices one number at a time
            ratio = cells.ratio("dtype", "forward", "two SDPA, bfloat16", "nystrom_ext, bfloat16", n)
            yield bar(f"two SDPA / ours, bfloat16, forward, n = {n}", ratio, 20.0)
        for dtype in ("bfloat16", "float16"):
            ratio = cells.ratio("dtype", "forward", f"nystrom_ext, {dtype}", "nystrom_ext, float32", n)
            yield bar(f"{dtype} / float32, ours, forward, n = {n}", ratio, 1.15, at_most=True)


def _peak(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Percent of peak in the key and the query pass."""
    measured = {record["case"]["n"]: record for record in results["stages"]}
    for direction, limit in (("forward", 65.0), ("backward", 55.0)):
        for n in measured or (4096,):
            rate = stages.rate(measured[n], stages.DIRECTIONS[direction]) if measured else None
            percent = rate and 100 * rate / results["peaks"]["gflops"]
            yield bar(f"percent of peak in the {direction} passes, n = {n}", percent, limit)


def _gradients(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Backward pass for one gradient beside that for three."""
    found = {r["wanted"]: r["median"] for r in records if not r["taps"] and r["case"]["n"] == gradients.LENGTH}
    for name, limit in (("dV", 0.6), ("dQ", 0.7)):
        ratio = found[name] / found[gradients.EVERYTHING] if found else None
        yield bar(
            f"{name} alone / {gradients.EVERYTHING}, backward, n = {gradients.LENGTH}", ratio, limit, at_most=True
        )


def _growth(cells: Cells) -> float | None:
    long, short = (cells.median("length", "forward", "nystrom_ext", n) for n in (65536, 4096))
    return long / short if long and short else None


def _memory(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for record in results["memory"]:
        if record["contestant"] == "nystrom_ext" and "bytes" in record:
            limit = Case(**record["case"]).workspace() + GRAIN
            name = f"MiB beyond inputs and results, {record['pass']}, n = {record['column']}"
            yield bar(name, record["bytes"] / 2**20, limit / 2**20, at_most=True)


def _packed(cells: Cells, memory: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    column = "32 of 32 to 2048"
    for pass_name in PASSES:
        ratio = cells.ratio("packed", pass_name, "packed", "padded, with a mask", column)
        yield bar(f"packed / padded with a mask, {pass_name}", ratio, 1.03, at_most=True)
    for record in memory:
        if record["row"] == "packed" and "bytes" in record:
            limit = Case(**record["case"]).landmark_buffers(PASSES[record["pass"]]) + 4 * GRAIN
            name = f"MiB beyond inputs and results, packed, {record['pass']}"
            yield bar(name, record["bytes"] / 2**20, limit / 2**20, at_most=True)
    ratio = cells.ratio("threads", "forward", "1 thread", "2 threads", ONE_LONG)
    yield bar(f"1 thread / 2 threads, packed, {ONE_LONG}", ratio, 1.7)


def _modules(cells: Cells) -> Iterator[dict[str, Any]]:
    stock, ours, never = MODULES
    ratio = cells.ratio("modules", "forward", ours, stock, 4096)
    yield bar("NystromMultiheadAttention / nn.MultiheadAttention, called alike, n = 4096", ratio, 1.0, at_most=True)
    ratio = cells.ratio("modules", "forward", stock, never, 4096)
    yield bar("nn.MultiheadAttention / ours with need_weights='never', n = 4096", ratio, 15.0)


def _mil(cells: Cells) -> Iterator[dict[str, Any]]:
    """Slides of many landmarks, beside the package and beside the best composition."""
    for heads, d in MIL_HEADS:
        limits = (("lucidrains", "forward", 3.5 if d == 64 else 3.0), ("lucidrains", "forward+backward", 2.5))
        for peer, pass_name, limit in (*limits, ("two SDPA", "forward", 2.0)):
            for n in MIL_LENGTHS:
                column = mil_column(heads, n)
                ratio = cells.ratio("mil", pass_name, peer, "nystrom_ext", column)
                yield bar(f"{peer} / ours, {pass_name}, m = {MIL_LANDMARKS}, {column}", ratio, limit)


def _million(cells: Cells) -> bool | None:
    return True if cells.median("million", "forward+backward", "nystrom_ext", "1,000,000") else None


def _threads(cells: Cells, heads: str) -> float | None:
    return cells.ratio("threads", "forward", "1 thread", "2 threads", heads)


def _padding(cells: Cells) -> float | None:
    return cells.ratio("mask", "forward", "nystrom_ext, half of each sample padded", "nystrom_ext", 4096)
