"""Every task of benchmarks.finetune runs from local files for a few steps with softmax and Nyström attention, offline.

`make smoke` runs this file alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import finetune_data as made
import pytest
import torch

from benchmarks.finetune import memory
from benchmarks.finetune.__main__ import main
from benchmarks.finetune.data import TASKS
from benchmarks.finetune.tasks.glue import LAYOUTS

SCRATCH = "--d-model 16 --feedforward 16 --num-landmarks 8 --max-steps 3 --batch-size 2"
PRETRAINED = "--num-landmarks 8 --max-steps 3 --batch-size 2 --max-length 48 --model"


def own(folder: Path) -> Path:
    lines = ["sentence1,sentence2,label", *(f"{made.sentence(i)},{made.sentence(i + 1)},{i % 2}" for i in range(8))]
    for name in ("train", "validation"):
        made.write(folder / f"{name}.csv", "\n".join(lines))
    return folder


CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    **{
        task: (lambda folder, name=layout.folder: made.glue(folder, name), f"--data-dir {{}} {PRETRAINED} {{model}}")
        for task, layout in LAYOUTS.items()
    },
    "imdb": (
        lambda folder: made.reviews(folder, length=100),
        f"--data-dir {{}} {PRETRAINED} {{model}} --max-length 96",
    ),
    "imdb scratch": (made.reviews, f"--data-dir {{}} {SCRATCH}"),
    "mrpc scratch": (lambda folder: made.glue(folder, "MRPC"), f"--data-dir {{}} {SCRATCH}"),
    "stsb scratch": (lambda folder: made.glue(folder, "STS-B"), f"--data-dir {{}} {SCRATCH}"),
    "files": (own, f"--train-file {{}}/train.csv --validation-file {{}}/validation.csv {PRETRAINED} {{model}}"),
    "synthetic": (lambda folder: folder, f"{SCRATCH} --max-train 12 --max-test 4 --max-length 96"),
    "lra-listops": (lambda folder: folder, f"{SCRATCH} --max-train 8 --max-test 4"),
    "lra-text": (lambda folder: made.reviews(folder, length=200), f"--data-dir {{}} {SCRATCH}"),
    "lra-image": (made.cifar, f"--data-dir {{}} {SCRATCH}"),
    "lra-pathfinder": (made.pathfinder, f"--data-dir {{}} {SCRATCH}"),
    "lra-retrieval": (made.retrieval, f"--data-dir {{}} {SCRATCH}"),
}


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(memory, "peak", lambda *args: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fast = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.mha.set_fastpath_enabled(fast)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return made.bert(tmp_path_factory.mktemp("model"))


def test_no_task_is_forgotten():
    assert {name.split()[0] for name in CASES} == {*TASKS} - {"hub"}


@pytest.mark.parametrize("case", CASES)
def test_task(case: str, model: Path, tmp_path: Path):
    make, options = CASES[case]
    folder = make(tmp_path / "data")
    words = [word.format(*[folder] * word.count("{}"), model=model) for word in options.split()]
    command = ["--task", case.split()[0], *words, "--attention", "softmax", "nystrom", "--threads", "1"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    arms = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]
    for arm in arms.values():
        assert len(arm["losses"]) == 3 and all(0 <= loss < 50 for loss in arm["losses"]) and arm["test"]
    assert arms["softmax"]["losses"] != arms["nystrom"]["losses"]
