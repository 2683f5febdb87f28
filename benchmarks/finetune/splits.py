"""What a reader of a data set returns."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

Text = str | bytes | tuple[str, str] | tuple[bytes, bytes]  # bytes stand for themselves: one token each
Example = tuple[Text, float]  # text, number of the label (int) or score (float)


@dataclass
class Splits:
    """Examples of each split. A reader leaves ``dev`` empty when the data set has none, ``test`` when it is unlabelled.

    ``further`` holds other labelled test sets, ``unlabelled`` texts to predict; ``labels`` is empty for scores.
    """

    source: str  # one line: what the data are
    labels: tuple[str, ...]
    train: list[Example]
    test: list[Example]
    dev: list[Example] = field(default_factory=list)
    further: dict[str, list[Example]] = field(default_factory=dict)
    unlabelled: dict[str, list[Text]] = field(default_factory=dict)
    metrics: tuple[str, ...] = ("accuracy",)  # the first one counts
    tokens: str = "words"  # how a model from scratch reads them: "words", "symbols" (between blanks) or "bytes"
    evaluated: str = "test"  # what the split ``test`` is called in the data set

    def fingerprint(self) -> str:
        """Changes with any text, label or order: a run must resume on the data it began with."""
        digest = hashlib.sha256()
        for name in ("train", "dev", "test"):
            for text, label in getattr(self, name):
                for part in (name, str(label), *parts(text)):
                    digest.update((part if isinstance(part, bytes) else part.encode()) + b"\0")
        return digest.hexdigest()


def parts(text: Text) -> tuple[str | bytes, ...]:
    return text if isinstance(text, tuple) else (text,)
