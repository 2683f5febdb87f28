"""What a conversion did, as its user sees it."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ._options import Options


@dataclass(frozen=True)
class Report:
    """What :func:`convert_` did: names of converted modules, skipped name -> reason, options that reproduce it.

    Options of single layers are in ``options["options_for"]``, where there are any; ``notes``: name -> what the
    converted module will refuse.
    """

    converted: list[str]
    skipped: dict[str, str]
    options: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; ``convert_(model, **report.to_dict()["options"])`` converts the same modules of the same model."""
        return {
            "converted": list(self.converted),
            "skipped": dict(self.skipped),
            "options": dict(self.options),
            "notes": dict(self.notes),
        }

    def __str__(self) -> str:
        own = self.options.get("options_for", {})
        rows = [(name, _listed("converted", own.get(glob.escape(name), {}))) for name in self.converted]
        rows = [(name, f"{text}; {self.notes[name]}" if name in self.notes else text) for name, text in rows]
        rows += [(name, f"skipped: {reason}") for name, reason in self.skipped.items()]
        rows = [(name or "(the model itself)", result) for name, result in rows]
        width = max((len(name) for name, _ in rows), default=0)
        counts = f"{len(self.converted)} converted, {len(self.skipped)} skipped"
        summary = _listed(counts, {name: self.options[name] for name in vars(Options())})
        return "\n".join([f"{name:<{width}}  {result}" for name, result in rows] + [summary])


def _listed(text: str, options: Mapping[str, Any]) -> str:
    return f"{text} ({', '.join(f'{name}={value!r}' for name, value in options.items())})" if options else text
