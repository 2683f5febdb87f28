"""benchmarks.finetune: data formats, bad input, checkpoints, interruption and results, on tiny models."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.finetune import checkpoint, data, memory, synthetic, training
from benchmarks.finetune.__main__ import main
from benchmarks.finetune.arguments import parse
from benchmarks.finetune.model import build
from benchmarks.finetune.tasks import reviews as reviews_task

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "--max-length 96 --max-positions 128 --d-model 8 --heads 2 --layers 1 --feedforward 8 --batch-size 4 "
    "--max-train 24 --max-test 6 --checkpoint-every 2 --dropout 0.1 --threads 1"
).split()
SOFTMAX = [*TINY, "--attention", "softmax"]


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Restores the settings that a run makes for its process, and spares the process that measures memory."""
    if "measures_memory" not in request.fixturenames:
        monkeypatch.setattr(memory, "measure", lambda *args: None)
    threads, fast = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    yield
    torch.set_num_threads(threads)
    torch.backends.mha.set_fastpath_enabled(fast)


@pytest.fixture
def measures_memory() -> None:
    """For the tests that want the real measurement."""


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic aclImdb folder."""
    folder = tmp_path_factory.mktemp("data") / "aclImdb"
    assert main([*TINY, "--write-synthetic", str(folder)]) == 0
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# ---- synthetic reviews


def test_synthetic_reviews_are_deterministic_balanced_and_of_the_asked_length():
    one, two, other = (synthetic.generate(512, seed, 20, 10) for seed in (1, 1, 2))
    assert one == two != other
    assert not set(one["train"]) & set(one["test"])
    assert Counter(label for _, label in one["train"]) == {0: 10, 1: 10}
    for text, _ in one["train"]:
        assert 512 * 0.7 < len(synthetic.tokens(reviews_task.clean(text))) <= 512


def test_the_verdict_sentences_decide_the_label_and_other_adjectives_do_not():
    for text, label in synthetic.generate(1024, 0, 50, 1)["train"]:
        sentences = reviews_task.clean(text).split(".")
        others = Counter(
            synthetic.POLARITY[word]
            for sentence in sentences
            if "this film" not in sentence
            for word in synthetic.tokens(sentence)
            if word in synthetic.POLARITY
        )
        assert synthetic.verdict(text) == label
        assert others[0] == others[1] > 0
    assert synthetic.verdict("i say this film was never dull. the soup was dull.") == 1
    assert synthetic.verdict("i say this film was never lovely. the soup was lovely.") == 0


def test_negated_verdicts_occur_in_both_classes():
    for label in (0, 1):
        text = " ".join(synthetic.review(random.Random(seed), label, 800) for seed in range(10))
        verdicts = [s for s in text.split(".") if "this film" in s]
        negated = [s for s in verdicts if any(f" {word} " in s for word in synthetic.NEGATIONS)]
        assert 0 < len(negated) < len(verdicts) / 2


# ---- readers


def test_folder_and_archives_give_the_splits_that_were_generated(reviews: Path, tmp_path: Path):
    expected = data.load(parse([*TINY, "--task", "synthetic"]))
    sources = [reviews, reviews.parent]
    for mode in ("", "gz", "xz"):
        path = tmp_path / f"reviews.tar.{mode}"
        with tarfile.open(path, f"w:{mode}") as archive:
            archive.add(reviews, "aclImdb")
        sources.append(path)
    for source in sources:
        read = data.load(parse([*TINY, "--data-dir", str(source)]))
        assert (read.train, read.dev, read.test) == (expected.train, expected.dev, expected.test), source


def test_reader_ignores_extras_replaces_breaks_and_orders_by_name(tmp_path: Path):
    for name in (
        "train/neg/10_1.txt",
        "train/neg/2_1.txt",
        "train/pos/0_9.txt",
        "test/neg/0_2.txt",
        "test/pos/0_8.txt",
    ):
        write(tmp_path / name, f"{name}<br /><br />end")
    for name in (
        "train/unsup/0_0.txt",
        "train/labeledBow.feat",
        "train/neg/README.txt",
        "imdb.vocab",
        "train/neg/._2_1.txt",
    ):
        write(tmp_path / name, "extra")
    splits = data.TASKS["imdb"](parse(["--data-dir", str(tmp_path)]))
    names = ["train/neg/10_1.txt", "train/neg/2_1.txt", "train/pos/0_9.txt"]
    assert splits.train == [(f"{name} end", int("pos" in name)) for name in names]


def test_dev_is_held_out_and_subsets_are_balanced(reviews: Path):
    splits = data.load(parse([*TINY, "--data-dir", str(reviews), "--max-train", "8", "--max-test", "3"]))
    assert Counter(label for _, label in splits.train) == {0: 4, 1: 4}
    assert Counter(label for _, label in splits.test) == {0: 2, 1: 1}
    assert splits.dev and not {text for text, _ in splits.dev} & {text for text, _ in splits.train}


def test_batches_cover_an_epoch_once_and_pad_to_the_longest():
    examples = [("word " * (i + 1), 0) for i in range(10)]
    encoded = data.Encoded(examples, data.train_tokenizer([text for text, _ in examples], 10), 7)
    batches = [encoded.training_batch(step, 4, seed=3)[0] for step in range(3)]
    lengths = sorted(int(n) for ids in batches for n in (ids != data.PAD).sum(1))
    assert lengths == [1, 2, 3, 4, 5, 6, 7, 7, 7, 7]
    assert all((ids[:, -1] != data.PAD).any() for ids in batches)
    assert not torch.equal(encoded.training_batch(3, 4, seed=3)[0], batches[0])  # next epoch, new order
    assert data.Encoded([("", 0)], data.train_tokenizer(["a"], 5), 7).ids[0][0].tolist() == [data.UNKNOWN]


# ---- bad input


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def minimal(folder: Path) -> Path:
    for name in ("train/neg/0_1.txt", "train/neg/1_1.txt", "train/pos/0_9.txt", "train/pos/1_9.txt"):
        write(folder / name, "text")
    write(folder / "test/neg/0_1.txt", "text")
    write(folder / "test/pos/0_9.txt", "text")
    return folder


def missing_class(path: Path) -> Path:
    (minimal(path / "d") / "test/pos/0_9.txt").unlink()
    return path / "d"


def not_utf8(path: Path) -> Path:
    write(minimal(path / "d") / "test/pos/0_9.txt", b"caf\xe9")
    return path / "d"


def one_dev_too_few(path: Path) -> Path:
    (minimal(path / "d") / "train/pos/1_9.txt").unlink()
    return path / "d"


def cut_archive(path: Path) -> Path:
    folder = minimal(path / "d")
    write(folder / "train/neg/2_1.txt", random.Random(0).randbytes(4000).hex())
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:xz") as archive:
        archive.add(folder, "aclImdb")
    return write(path / "cut.tar.xz", whole.getvalue()[: len(whole.getvalue()) // 2])


BAD = {
    "missing folder": (lambda p: ["--data-dir", p / "nothing"], "must exist"),
    "missing class": (lambda p: ["--data-dir", missing_class(p)], "test/pos"),
    "class lost to dev": (lambda p: ["--data-dir", one_dev_too_few(p)], "train split"),
    "empty folder": (lambda p: ["--data-dir", p], "train/neg"),
    "no archive": (lambda p: ["--data-dir", write(p / "x.tar.xz", "no archive")], "intact tar"),
    "cut archive": (lambda p: ["--data-dir", cut_archive(p)], "intact tar"),
    "not UTF-8": (lambda p: ["--data-dir", not_utf8(p)], "UTF-8"),
    "imdb without data": (lambda p: ["--task", "imdb"], "--data-dir"),
    "unknown task": (lambda p: ["--task", "poems"], "poems"),
    "landmarks": (lambda p: ["--num-landmarks", "0"], "--num-landmarks must be greater than 0, got 0"),
    "batch": (lambda p: ["--batch-size", "-1"], "--batch-size must be greater than 0, got -1"),
    "not a number": (lambda p: ["--batch-size", "many"], "many"),
    "positions": (lambda p: ["--max-length", "129"], "129 > 128"),
    "attention": (lambda p: ["--attention", "linear"], "linear"),
    "attention twice": (lambda p: ["--attention", "softmax", "softmax"], "repeat"),
    "heads": (lambda p: ["--heads", "3"], "divisible"),
    "dropout": (lambda p: ["--dropout", "1"], "--dropout"),
    "device": (lambda p: ["--device", "abacus"], "abacus"),
    "output": (lambda p: ["--output-dir", write(p / "file", "") / "out"], "--output-dir must be writable"),
    "nothing to resume": (lambda p: ["--resume"], "leave out --resume"),
    "damaged checkpoint": (lambda p: [write(p / "out/checkpoint.pt", "x") and "--resume"], "damaged"),
    "foreign checkpoint": (lambda p: [foreign(p / "out/checkpoint.pt") or "--resume"], "damaged"),
    "synthetic folder exists": (lambda p: ["--write-synthetic", p], "exists"),
}


def foreign(path: Path) -> None:
    path.parent.mkdir()
    torch.save({"weights": torch.zeros(1)}, path)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line_and_status_2(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    options, expected = BAD[case]
    arguments = [*SOFTMAX, "--output-dir", tmp_path / "out", *options(tmp_path)]
    assert main([str(argument) for argument in arguments]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0], lines


def test_missing_extension_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nystrom_ext", None)
    assert main([*TINY, "--output-dir", str(tmp_path)]) == 2
    assert "nystrom_ext" in capfd.readouterr().err


# ---- checkpoints


@pytest.mark.parametrize("when", ["writing", "replacing"])
def test_a_crash_while_writing_leaves_the_old_file(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint.save(tmp_path, {"step": 1})

    def crash(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch if when == "writing" else os, "save" if when == "writing" else "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, {"step": 2})
    assert torch.load(tmp_path / checkpoint.NAME, weights_only=True) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME]


class Crash(Exception):
    """What no part of the program expects."""


def crash_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step, left = training.train_step, iter(range(calls))

    def limited(*args: object) -> None:
        if next(left, None) is None:
            raise Crash
        step(*args)

    monkeypatch.setattr(training, "train_step", limited)


def test_resume_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SOFTMAX, "--epochs", "2"]  # 6 steps each
    assert main([*options, "--output-dir", str(whole)]) == 0
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(7, patch)  # in the second epoch, after the checkpoint of step 6
        main([*options, "--output-dir", str(parts)])
    assert not (parts / "results.json").exists()
    assert main([*options, "--output-dir", str(parts), "--resume"]) == 0
    a, b = results(whole)["arms"]["softmax"], results(parts)["arms"]["softmax"]
    assert len(a["losses"]) == 12 and len(set(a["losses"])) > 6
    assert a["losses"] == b["losses"]
    assert a["dev"] == b["dev"] and set(a["dev"]) == {"6", "12"}
    models = [
        torch.load(folder / checkpoint.NAME, weights_only=True)["arms"]["softmax"]["model"] for folder in (whole, parts)
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize("place", [(data.Encoded, "training_batch"), (training, "train_step"), (training, "evaluate")])
def test_a_signal_anywhere_loses_no_step(
    place: tuple[object, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    options = [*SOFTMAX, "--output-dir", str(tmp_path), "--checkpoint-every", "1000", "--epochs", "2"]
    with monkeypatch.context() as patch:
        original = getattr(*place)

        def signalled(*args: object, **kwargs: object) -> object:
            patch.setattr(*place, original)
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        patch.setattr(*place, signalled)
        assert main(options) == 128 + signal.SIGTERM
    assert "--resume" in capfd.readouterr().err.splitlines()[-1]
    losses = torch.load(tmp_path / checkpoint.NAME, weights_only=True)["arms"]["softmax"]["losses"]
    assert len(losses) == (6 if place[1] == "evaluate" else 1)
    assert main([*options, "--resume"]) == 0
    arm = results(tmp_path)["arms"]["softmax"]
    assert arm["losses"][: len(losses)] == losses and len(arm["losses"]) == 12 and len(arm["dev"]) == 2


def test_resume_refuses_other_options_and_other_data(reviews: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder = tmp_path / "copy"
    minimal(folder)
    options = [*SOFTMAX, "--max-steps", "2", "--output-dir", str(tmp_path / "out")]
    assert main([*options, "--data-dir", str(folder)]) == 0
    capfd.readouterr()
    assert main([*options, "--data-dir", str(folder), "--resume", "--learning-rate", "1"]) == 2
    assert "learning_rate was 0.003, is 1.0" in capfd.readouterr().err
    write(folder / "train/neg/0_1.txt", "changed")
    assert main([*options, "--data-dir", str(folder), "--resume"]) == 2
    assert "data of the first run" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_leaves_a_checkpoint(number: signal.Signals, tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks.finetune", *SOFTMAX, "--output-dir", str(tmp_path)]
    command += ["--max-steps", "100000"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        deadline = time.monotonic() + 50
        while not (tmp_path / checkpoint.NAME).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        error = process.communicate(timeout=20)[1]
    state = torch.load(tmp_path / checkpoint.NAME, weights_only=True)
    assert len(state["arms"]["softmax"]["losses"]) > 0
    assert "Traceback" not in error
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert "--resume" in error.splitlines()[-1]


# ---- results


def test_results_figure_and_table(tmp_path: Path, capfd: pytest.CaptureFixture[str], measures_memory: None):
    assert main([*SOFTMAX, "--max-steps", "3", "--output-dir", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    found = results(tmp_path)
    arm = found["arms"]["softmax"]
    assert found["config"]["seed"] == 0 and found["sizes"]["test"] == 6 and found["ratios"] is None
    assert len(arm["losses"]) == len(arm["seconds"]) == found["steps"] == 3
    assert arm["parameters"] > 0 and 0 <= arm["test"]["accuracy"] <= 1 and arm["median_seconds_per_step"] > 0
    assert 0 < arm["peak_memory_bytes"] < 2**28
    assert "SYNTHETIC" in out and "softmax" in out and "results.json" in out
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "tokenizer.json").exists()


def test_the_softmax_arm_does_not_import_the_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nystrom_ext", None)  # importing it fails
    assert main([*SOFTMAX, "--max-steps", "1", "--output-dir", str(tmp_path)]) == 0


def test_padding_does_not_change_the_answer():
    args = parse(SOFTMAX)
    model = build(args, "softmax", 20, 2).eval()
    ids = torch.randint(1, 20, (2, 9), dtype=torch.int32)
    padded = torch.nn.functional.pad(ids, (0, 5), value=data.PAD)
    torch.testing.assert_close(model(padded, padded == data.PAD), model(ids, ids == data.PAD))


def test_a_small_model_learns(tmp_path: Path):
    options = [*SOFTMAX, "--output-dir", str(tmp_path), "--dropout", "0", "--max-train", "1000", "--max-test", "200"]
    options += "--max-length 64 --d-model 32 --batch-size 32 --epochs 5 --learning-rate 0.01".split()
    assert main(options) == 0
    assert results(tmp_path)["arms"]["softmax"]["test"]["accuracy"] > 0.9  # adjectives alone, negation unread: 0.8


def test_nystrom_arm_converts_and_starts_from_the_same_values(tmp_path: Path):
    nystrom_ext = pytest.importorskip("nystrom_ext")
    args = parse([*TINY, "--num-landmarks", "8"])
    softmax, nystrom = (build(args, name, 20, 2) for name in ("softmax", "nystrom"))
    attention = [m for m in nystrom.modules() if isinstance(m, torch.nn.MultiheadAttention)]
    assert attention and all(isinstance(m, nystrom_ext.NystromMultiheadAttention) for m in attention)
    ours, theirs = nystrom.state_dict(), softmax.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = torch.randint(1, 20, (2, 64), dtype=torch.int32)
    assert not torch.allclose(softmax(ids, ids == data.PAD), nystrom(ids, ids == data.PAD), atol=1e-7)

    options = [*TINY, "--num-landmarks", "8", "--max-steps", "3", "--output-dir", str(tmp_path)]
    assert main(options) == 0
    arms = results(tmp_path)["arms"]
    assert list(arms) == ["softmax", "nystrom"] and results(tmp_path)["ratios"]["median_seconds_per_step"] > 0
    assert arms["softmax"]["losses"] != arms["nystrom"]["losses"]
