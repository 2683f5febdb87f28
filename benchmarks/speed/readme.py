"""``python -m benchmarks.speed.readme RESULTS.json``: writes the README's table from a run's results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.finetune import UsageError
from benchmarks.finetune.arguments import Parser
from benchmarks.finetune.checkpoint import write_atomically

from .cases import PASSES
from .report import OURS, about, shape

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
README = Path(__file__).parents[2] / "README.md"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after bad input."""
    parser = Parser(prog="python -m benchmarks.speed.readme", description=__doc__, allow_abbrev=False)
    parser.add_argument("results", type=Path, help="a JSON document of python -m benchmarks.speed")
    parser.add_argument("--readme", type=Path, default=README, help="the file with the markers")
    try:
        args = parser.parse_args(argv)
        regenerate(args.results, args.readme)
        print(f"wrote {args.readme}")
        return 0
    except UsageError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2


def regenerate(results: Path, readme: Path) -> None:
    """Replace what stands between the markers."""
    try:
        table = tables(json.loads(results.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UsageError(
            f"{results} must be a result of python -m benchmarks.speed: {error!r}; name another"
        ) from error
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--readme must be readable, {readme}: {error.strerror}; name another") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UsageError(f"{readme} must hold {BEGIN} and {END} once each, in this order; add them")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    new = f"{before}{BEGIN}\n{table}\n{END}{after}"
    write_atomically(readme, lambda file: file.write(new.encode()))


def tables(results: dict[str, Any]) -> str:
    """Markdown: one line per length, ours in milliseconds, the others as multiples of it."""
    cells = [cell for cell in results["cells"] if cell["table"] == "length"]
    names = list(dict.fromkeys(cell["contestant"] for cell in cells if "median" in cell))
    others = [name for name in names if name != OURS]
    lines = [
        f"Median milliseconds of `{OURS}`, and how many times as long the others take, as attention alone: packages "
        f"without their projections and convolutions. {shape(cells)}; {about(results)}."
    ]
    for pass_name in PASSES:
        lines += ["", f"| {pass_name}, n | {OURS} | " + " | ".join(others) + " |", "|--:" * (2 + len(others)) + "|"]
        chosen = {
            (c["contestant"], c["case"]["n"]): c["median"] for c in cells if c["pass"] == pass_name and "median" in c
        }
        for n in sorted({n for _, n in chosen}):
            ours = chosen[OURS, n]
            multiples = (f"{chosen[name, n] / ours:.1f}×" if (name, n) in chosen else "–" for name in others)
            lines.append(f"| {n:,} | {ours * 1e3:.2f} ms | " + " | ".join(multiples) + " |")
    absent = {c["contestant"]: c["status"] for c in cells if c["contestant"] not in names}
    if absent:
        lines += ["", "Not measured: " + "; ".join(f"{name} ({why})" for name, why in absent.items()) + "."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
