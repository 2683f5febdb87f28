"""The tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import gradients, stages
from .cases import PASSES, Case

OURS = "nystrom_ext"


def show(results: dict[str, Any]) -> None:
    """All tables, under a line about the machine."""
    console = _console()
    console.print(about(results), style="bold")
    for name, pass_name, cells in grouped(results):
        console.print(f"\n{name}, {pass_name}: {shape(cells)}", style="italic")
        console.print(_times(cells, results["peaks"]["gflops"]))
    console.print("median ms ± half the interquartile range; below, multiples of the first line's time", style="dim")
    for record in results["stages"]:
        console.print(f"\nstages of nystrom_ext, n={record['case']['n']}", style="italic")
        console.print(_stages(record, results["peaks"]["gflops"]))
    if results["gradients"]:
        title = f"backward pass by the gradients asked for: {shape(results['gradients'])}"
        console.print(f"\n{title}, {results['machine']['build']['cpu_capability']}", style="italic")
        console.print(_gradients(results["gradients"]))
    if results["memory"]:
        console.print("\npeak memory in MiB beyond inputs, result and gradients", style="italic")
        console.print(_memory(results["memory"]))


def about(results: dict[str, Any]) -> str:
    machine, peaks = results["machine"], results["peaks"]
    name = machine.get("accelerator") or (
        f"{machine['processor']}, {machine['build']['cpu_capability']}, "
        f"{machine['threads']} of {machine['cores']} cores"
    )
    return (
        f"{name}, torch {machine['versions']['torch']}; peak "
        f"{peaks['gflops']:.0f} GFLOP/s ({peaks['method']}), best torch.mm {peaks['matmul_gflops']:.0f} GFLOP/s, "
        f"copy {peaks['copy_gb_per_s']:.0f} GB/s"
    )


def grouped(results: dict[str, Any]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Table, pass and the cells of both."""
    for name in dict.fromkeys(cell["table"] for cell in results["cells"]):
        for pass_name in PASSES:
            yield name, pass_name, [c for c in results["cells"] if (c["table"], c["pass"]) == (name, pass_name)]


def shape(cells: list[dict[str, Any]]) -> str:
    """What all cases of a table share."""
    cases = [cell["case"] for cell in cells]
    names = {"batch": "B", "heads": "H", "n": "n", "d": "d", "m": "m", "dtype": ""}
    shared = {key: cases[0][key] for key in names if len({case[key] for case in cases}) == 1}
    return " ".join(f"{names[key]}={value}" if names[key] else str(value) for key, value in shared.items())


def _times(cells: list[dict[str, Any]], peak: float) -> Table:
    table = Table()
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    table.add_column(cells[0]["table"], max_width=44)
    for column in columns:
        table.add_column(column, justify="right")
    top = cells[0]["row"]
    base = {cell["column"]: cell["median"] for cell in cells if cell["row"] == top and "median" in cell}
    for row in dict.fromkeys(cell["row"] for cell in cells):
        found = {cell["column"]: cell for cell in cells if cell["row"] == row}
        if len({cell.get("status") for cell in found.values()}) == 1 and "status" in (first := found[columns[0]]):
            table.add_row(f"{row}\n{escape(first['status'])}", *[""] * len(columns))  # one reason for the whole line
        else:
            table.add_row(row, *(_time(found.get(c), None if row == top else base.get(c)) for c in columns))
    if top == OURS:
        table.add_section()
        table.add_row("nystrom_ext, GFLOP/s", *(_rate(cells, column, peak) for column in columns))
    return table


def _time(cell: dict[str, Any] | None, base: float | None) -> str:
    if cell is None:
        return ""
    if "status" in cell:
        return escape(cell["status"])
    spread = (cell["upper_quartile"] - cell["lower_quartile"]) / 2 / cell["median"]
    text = f"{cell['median'] * 1e3:.2f} ±{spread:.0%}"
    return f"{text}\n[dim]{cell['median'] / base:.1f}x[/dim]" if base else text


def _rate(cells: list[dict[str, Any]], column: str, peak: float) -> str:
    for cell in cells:
        if cell["row"] == OURS and cell["column"] == column and "median" in cell:
            return f"{rate(cell):.0f}\n[dim]{rate(cell) / peak:.0%} of peak[/dim]"
    return ""


def rate(cell: dict[str, Any]) -> float:
    """GFLOP/s, counting the products that the method needs."""
    return Case(**cell["case"]).flops(PASSES[cell["pass"]]) / cell["median"] / 1e9


def _stages(record: dict[str, Any], peak: float) -> Table:
    table = Table()
    for name in ("stage", "median ms", "best, GFLOP/s", "of peak"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for name, seconds in record["stages"].items():
        flops = stages.rate(record, (name,)) if name in stages.PASSES else None
        shown = (f"{flops:.0f}", f"{flops / peak:.0%}") if flops else ("", "")
        table.add_row(name, f"{seconds['median'] * 1e3:.2f}", *shown)
    return table


def _gradients(records: list[dict[str, Any]]) -> Table:
    """One line for each set of gradients, without a convolution and with one."""
    table = Table()
    for name in ("gradients", "median ms", "peak MiB", f"median ms, {gradients.TAPS} taps", "peak MiB"):
        table.add_column(name, justify="left" if name == "gradients" else "right")
    base = {r["taps"]: r["median"] for r in records if r["wanted"] == gradients.EVERYTHING}
    for wanted in dict.fromkeys(record["wanted"] for record in records):
        found = {r["taps"]: r for r in records if r["wanted"] == wanted}
        texts = []
        for taps in base:
            texts += _gradient(found[taps], base[taps]) if taps in found else ["", ""]
        table.add_row(wanted, *texts)
    return table


def _gradient(record: dict[str, Any], base: float) -> list[str]:
    size = record["bytes"]
    relative = f"[dim]{record['median'] / base:.2f}x[/dim]"
    return [f"{record['median'] * 1e3:.2f} {relative}", "" if size is None else f"{size / 2**20:.1f}"]


def _memory(records: list[dict[str, Any]]) -> Table:
    table = Table()
    columns = list(dict.fromkeys(record["column"] for record in records))
    table.add_column("memory", max_width=44)
    for column in columns:
        table.add_column(column, justify="right")
    for row, pass_name in dict.fromkeys((record["row"], record["pass"]) for record in records):
        found = {r["column"]: r for r in records if (r["row"], r["pass"]) == (row, pass_name)}
        texts = (f"{r['bytes'] / 2**20:.1f}" if "bytes" in r else escape(r["status"]) for r in found.values())
        table.add_row(f"{row}, {pass_name}", *texts)
    return table


def show_bars(bars: list[dict[str, Any]]) -> None:
    """Pass, fail or not measured."""
    if not bars:
        print("no bars: they speak of B=1 H=8 d=64 m=64 float32 on a CPU")
        return
    table = Table(title="bars (B=1 H=8 d=64 m=64 float32 on a CPU)", title_justify="left")
    for name in ("bar", "required", "measured", ""):
        table.add_column(name, justify="left" if name == "bar" else "right")
    words = {True: "[green]pass", False: "[red]FAIL", None: "not measured"}
    for bar in bars:
        if isinstance(bar["limit"], bool):
            required, measured = "yes", {True: "yes", False: "no", None: ""}[bar["measured"]]
        else:
            required = f"{'≤' if bar['at_most'] else '≥'} {bar['limit']:.4g}"
            measured = "" if bar["measured"] is None else f"{bar['measured']:.4g}"
        table.add_row(bar["bar"], required, measured, words[bar["passed"]])
    _console().print(table)


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # a file has no edge
    return console
