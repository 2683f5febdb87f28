"""benchmarks.finetune: the study, its table, and the measurement against the length."""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_data import glue, reviews

from benchmarks.finetune import compare, memory, scaling, study
from benchmarks.finetune.arguments import parse


@pytest.fixture
def data(tmp_path: Path) -> Path:
    glue(tmp_path / "data" / "glue", "MRPC")
    return reviews(tmp_path / "data").resolve()


def results(folder: Path, seed: int, arms: dict[str, float], **options: Any) -> Path:
    folder.mkdir(parents=True)
    config = vars(parse(["--task", "synthetic", "--seed", str(seed)])) | options
    config = {name: None if isinstance(value, Path) else value for name, value in config.items()}
    found = {
        name: {
            "test": {"accuracy": score}, "dev": {"1": {"accuracy": score}, "2": {"accuracy": score}},
            "median_seconds_per_step": 0.5, "peak_memory_bytes": 2**20, "losses": [1.0, 0.5], "seconds": [0.5, 0.5],
        }
        for name, score in arms.items()
    }  # fmt: skip
    document = {"task": "synthetic", "source": "x", "config": config, "steps": 2, "arms": found}
    (folder / "results.json").write_text(json.dumps(document | {"sizes": {"train": 10, "test": 5}}))
    return folder


def test_the_table_has_one_row_per_experiment_and_compares_seed_by_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for seed, exact, ours in ((0, 0.80, 0.78), (1, 0.90, 0.89)):
        results(tmp_path / f"a{seed}", seed, {"softmax": exact})
        results(tmp_path / f"b{seed}", seed, {"nystrom": ours}, num_landmarks=32)
    results(tmp_path / "c", 0, {"nystrom": 0.8}, num_landmarks=32, window=16, pinned=1)
    assert compare.main([str(tmp_path), "--output", str(tmp_path / "out" / "table")]) == 0
    rows = [line.split(" | ")[6:10] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [
        ["softmax", "accuracy", "85.0 (80.0 to 90.0, 2 seeds)", ""],
        ["Nyström m=32", "accuracy", "83.5 (78.0 to 89.0, 2 seeds)", "-1.5"],
        ["Nyström m=32 w=16 p=1", "accuracy", "80.0", "+0.0"],
    ]
    assert (tmp_path / "out/table.md").exists() and (tmp_path / "out/table.png").read_bytes()[1:4] == b"PNG"


def test_runs_with_other_options_are_rows_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, warmup, score in (("usual", 0.1, 0.8), ("cold", 0.0, 0.7)):
        results(tmp_path / name, 0, {"nystrom": score}, warmup_steps=warmup)
    results(tmp_path / "exact", 0, {"softmax": 0.9, "linformer": 0.6}, linformer_k=8, eval_steps=3)
    results(tmp_path / "wide", 0, {"linformer": 0.65}, linformer_k=16)
    results(tmp_path / "partly", 0, {"nystrom": 0.75}, exclude=["*.0.*"])
    assert compare.main([str(tmp_path), "--output", str(tmp_path / "table")]) == 0
    rows = [line.split(" | ")[5:10] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [
        ["warmup_steps=0.0", "Nyström m=64", "accuracy", "70.0", ""],
        ["warmup_steps=0.1", "softmax", "accuracy", "90.0", ""],
        ["warmup_steps=0.1", "Linformer k=8", "accuracy", "60.0", "-30.0"],
        ["warmup_steps=0.1", "Nyström m=64 not=*.0.*", "accuracy", "75.0", "-15.0"],
        ["warmup_steps=0.1", "Nyström m=64", "accuracy", "80.0", "-10.0"],
        ["warmup_steps=0.1", "Linformer k=16", "accuracy", "65.0", "-25.0"],
    ]


def test_the_tables_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "x.json").write_text("{}")
    for path, message in ((tmp_path / "x.json", "must be a results.json"), (tmp_path, "none was found")):
        assert compare.main([str(path)]) == 2
        assert message in capsys.readouterr().err


def plan(data: Path) -> dict[Path, list[str]]:
    namespace = argparse.Namespace(
        data=data, experiments=list(study.EXPERIMENTS), settings=None, seeds=[0, 1], threads=1, extra="",
        output=data / "study",
    )  # fmt: skip
    return study.commands(namespace)


def test_every_command_of_the_study_is_valid(data: Path):
    found = plan(data)
    arguments = [parse(words[3:]) for words in found.values()]
    assert len({str(args.output_dir) for args in arguments}) == len(found)
    assert {args.seed for args in arguments} == {0, 1}
    published = {(args.task, args.max_length, args.num_landmarks, args.window, args.pinned) for args in arguments}
    for task, length in (("mrpc", 128), ("sst2", 128), ("imdb", 512), ("imdb", 1024)):
        for setting in ((32, 0, 0), (64, 0, 0), (32, 16, 1), (64, 16, 1)):
            assert (task, length, *setting) in published


def test_a_study_continues_and_survives_failures(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    words = ["--data", str(data), "--experiments", "synthetic", "--settings", "softmax"]
    words += ["--seeds", "0", "--output", str(tmp_path / "study")]
    tiny = "--max-train 8 --max-test 4 --max-length 80 --max-steps 2 --batch-size 2"
    assert study.main([*words, "--extra", tiny + " --d-model 9"]) == 1
    assert "--d-model must be divisible" in capfd.readouterr().err
    assert study.main([*words, "--extra", tiny]) == 0
    run = tmp_path / "study/synthetic/softmax-seed0/results.json"
    before = run.stat().st_mtime_ns
    assert study.main([*words, "--extra", tiny]) == 0 and run.stat().st_mtime_ns == before
    assert "| softmax |" in (tmp_path / "study/comparison.md").read_text()
    assert study.main([*words, "--list"]) == 0
    assert study.main(["--data", str(tmp_path / "nothing")]) == 2


def test_a_signal_reaches_the_run_and_the_study_continues(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    words = ["--data", str(data), "--experiments", "synthetic", "--settings", "softmax"]
    words += ["--seeds", "0", "--output", str(tmp_path)]
    words += ["--extra", "--max-train 8 --max-test 4 --max-length 80 --max-steps 100000"]
    run = tmp_path / "synthetic" / "softmax-seed0"

    def interrupt() -> None:
        deadline = time.monotonic() + 50
        while "training" not in (log.read_text() if (log := run / "log.txt").exists() else ""):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert study.main(words) == 128 + signal.SIGTERM
    thread.join()
    assert "run the same command to continue" in capfd.readouterr().err
    assert "--resume" in (run / "log.txt").read_text() and (run / "checkpoint.pt").exists()


def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(memory, "measure", lambda *args: 2**20)
    words = ["--lengths", "70", "130", "--attention", "softmax", "linformer", "--steps", "1", "--num-landmarks", "8"]
    assert scaling.main([*words, "--output", str(tmp_path / "s")]) == 0
    cases = json.loads((tmp_path / "s.json").read_text())["cases"]
    assert [(case["attention"], case["length"]) for case in cases][:2] == [("softmax", 70), ("linformer", 70)]
    capsys.readouterr()
    assert scaling.main([*words, "--output", str(tmp_path / "s")]) == 0
    assert "s per step" not in capsys.readouterr().out  # all done before
    assert scaling.main(["--lengths", "0"]) == 2
    (tmp_path / "s.json").write_text("{")
    assert scaling.main([*words, "--output", str(tmp_path / "s")]) == 2
    torch.set_num_threads(1)
