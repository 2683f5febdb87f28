"""Every Python example of the README runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from optional import import_timm

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "import timm" in EXAMPLES[number]:
        import_timm()
    if "import transformers" in EXAMPLES[number] or "from transformers" in EXAMPLES[number]:
        pytest.importorskip("transformers")
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {"__name__": "readme"})


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3
