"""benchmarks.finetune.swap: embeddings of a model that was never trained with Nyström attention."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from finetune_data import bert, glue, reviews

from benchmarks.finetune import swap

TINY = "--reviews 4 --pairs 6 --num-landmarks 8 --window 0 3 --pinned 0 --layers all --repetitions 1 --threads 1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    glue(tmp_path / "glue", "MRPC")
    reviews(tmp_path, count=12, length=30)
    bert(tmp_path / "model")
    monkeypatch.setattr(swap, "MAX_LENGTH", 64)
    monkeypatch.setattr(swap, "LEAST_LENGTH", 20)
    monkeypatch.setattr(swap, "COST_LENGTHS", (32, 64))
    return tmp_path


def command(folder: Path, options: str = TINY) -> list[str]:
    named = ["--data", str(folder), "--model", str(folder / "model"), "--output", str(folder / "out" / "swap")]
    return [*named, *options.split()]


def test_measures_and_keeps_what_is_done(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert swap.main(command(folder)) == 0
    shown = capsys.readouterr().out
    document = folder / "out" / "swap.json"
    found = json.loads(document.read_text())
    assert [(case["num_landmarks"], case["window"]) for case in found["cases"]] == [(8, 0), (8, 3)]
    exact = found["exact"]
    assert exact["cosine"] == pytest.approx(1) and exact["neighbour"] == exact["same_label"] == 1
    assert all(0 < case["least_cosine"] <= case["cosine"] < 1 - 1e-6 for case in found["cases"])
    assert {(cost["tokens"], cost["window"]) for cost in found["cost"]} == {(n, w) for n in (32, 64) for w in (0, 3)}
    rows = [line for line in shown.splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| none |") and rows[3].startswith("| all | 8 | 3 | 0 |")
    assert (folder / "out" / "swap.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(swap.Texts, "score", None)  # nothing is embedded a second time
    assert swap.main(command(folder)) == 0
    assert json.loads(document.read_text())["cases"] == found["cases"]


def test_enough_landmarks_change_nothing(folder: Path) -> None:
    assert swap.main(command(folder, TINY.replace("--num-landmarks 8", "--num-landmarks 64"))) == 0
    for case in json.loads((folder / "out" / "swap.json").read_text())["cases"]:
        assert case["least_cosine"] == pytest.approx(1, abs=1e-5) and case["neighbour_in_exact_index"] == 1


def test_embeddings_are_means_over_the_tokens(folder: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder / "model").eval()
    ids = [[2, *range(5, n), 3] for n in (12, 9, 20)]
    with torch.no_grad():
        expected = [model(torch.tensor([tokens])).last_hidden_state[0].mean(0) for tokens in ids]
        found = swap.embed(model, ids)
    torch.testing.assert_close(found, torch.nn.functional.normalize(torch.stack(expected), dim=-1))


@pytest.mark.parametrize("change, message", [("--reviews 400", "lower it"), ("--window -1", "at least 0")])
def test_bad_input_is_one_line(change: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert swap.main([*command(folder), *change.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / "swap.json").write_text("{")
    assert swap.main(command(folder)) == 2 and "remove it" in capsys.readouterr().err
