"""benchmarks.mil: bags, the three kinds of attention, checkpoints, results and bad input, on tiny models."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.finetune import checkpoint, memory
from benchmarks.mil import bags as bags_module
from benchmarks.mil import training
from benchmarks.mil.__main__ import main
from benchmarks.mil.arguments import parse
from benchmarks.mil.bags import Bags
from benchmarks.mil.model import ATTENTIONS, build, with_rows

pytest.importorskip("sklearn")
TINY = (
    "--instances 40 60 --dim 8 --heads 2 --num-landmarks 8 --steps 6 --test-bags 4 --threads 1 --checkpoint-every 2"
).split()


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Restores the threads, and spares the processes that measure memory."""
    if "measures_memory" not in request.fixturenames:
        monkeypatch.setattr(memory, "peak", lambda *args: None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def measures_memory() -> None:
    """For the tests that want the real measurement."""


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


# Bags


def test_bags_are_reproducible_and_labelled() -> None:
    args = parse(["--instances", "50", "90", "--digit", "7", "--share", "0.2"])
    one, two, other = Bags(args), Bags(args), Bags(parse(["--instances", "50", "90", "--seed", "1"]))
    sizes = set()
    for split in ("train", "test"):
        for number in range(6):
            bag, again = one.bag(split, number), two.bag(split, number)
            assert torch.equal(bag.instances, again.instances) and torch.equal(bag.positive, again.positive)
            n = bag.instances.shape[1]
            assert bag.instances.shape == (1, n, 64) and bag.instances.dtype == torch.float32 and 50 <= n <= 90
            assert bag.label.tolist() == [number % 2]
            assert bag.positive.sum() == (round(0.2 * n) if number % 2 else 0)
            sizes.add(n)
    assert len(sizes) > 3
    assert not torch.equal(one.bag("train", 1).instances[:, :50], one.bag("test", 1).instances[:, :50])
    assert not torch.equal(one.bag("train", 1).instances[:, :50], other.bag("train", 1).instances[:, :50])


def test_positive_instances_show_the_digit_and_are_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise an instance is a multiple of one of the shifted images, of the split's own."""
    from sklearn.datasets import load_digits

    monkeypatch.setattr(bags_module, "NOISE", 0.0)
    bags, shown = Bags(parse(["--instances", "900", "--digit", "4", "--share", "0.1"])), load_digits().target
    shifted = torch.from_numpy(bags._digits[0].reshape(-1, 64))
    for split, images in (("train", slice(0, 1198)), ("test", slice(1198, None))):
        bag = bags.bag(split, 1)
        mean = shifted.view(9, -1, 64)[:, images].mean((0, 1))
        pixels = bag.instances[0] * bags_module.SPREAD + mean
        likeness, found = (pixels @ (shifted / shifted.norm(dim=1, keepdim=True)).T / pixels.norm(dim=1)[:, None]).max(
            1
        )
        image = found % len(shown)
        assert (likeness > 0.9999).all() and torch.equal(torch.from_numpy(shown)[image] == 4, bag.positive)
        assert ((image < 1198) == (split == "train")).all()
        row, column = bag.positive.nonzero()[:, 0] // 30, bag.positive.nonzero()[:, 0] % 30
        assert max(row.max() - row.min(), column.max() - column.min()) < 25
        assert not bags.bag(split, 0).positive.any()


# Models


def test_the_package_and_ours_are_one_model() -> None:
    pytest.importorskip("nystrom_attention")
    args = parse(TINY)
    bag = Bags(args).bag("train", 1).instances
    exact, package, ours = (build(args, name).eval() for name in ATTENTIONS)
    assert all(torch.equal(a, b) for a, b in zip(exact.parameters(), package.parameters(), strict=True))
    torch.testing.assert_close(ours(bag), package(bag))
    assert not torch.allclose(exact(bag), ours(bag))
    matrix = package.second.attention(package.second.norm(package._tokens(bag)), return_attn=True)[1].mean(1)[0]
    left = matrix.shape[0] - 65  # the zeros in front of the class token and 8 x 8 patches
    expected = matrix[left, left + 1 : left + 1 + bag.shape[1]]
    for model in (package, ours):
        torch.testing.assert_close(with_rows(model).attention_of_class_token(bag)[0], expected)


def test_exact_attention_says_its_weights() -> None:
    args = parse(TINY)
    bag = Bags(args).bag("train", 1).instances
    weights = build(args, "exact").eval().attention_of_class_token(bag)
    assert weights.shape == bag.shape[:2] and (weights > 0).all() and 0.8 < weights.sum() < 1


# Runs


def test_smoke_run(tmp_path: Path, measures_memory: None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nystrom_attention")
    assert main([*TINY, "--output-dir", str(tmp_path)]) == 0
    found = results(tmp_path)
    assert list(found["arms"]) == list(ATTENTIONS)
    for arm in found["arms"].values():
        assert 0 <= arm["auc"] <= 1 and 0 <= arm["heat_map_auc"] <= 1 and arm["median_seconds_per_step"] > 0
        assert len(arm["losses"]) == 6 and len(arm["scores"]) == 4 and arm["peak_memory_bytes"] > 0
    theirs, ours = (found["arms"][name] for name in ATTENTIONS[1:])
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    page, shown = (tmp_path / "results.md").read_text(), capsys.readouterr().out
    assert page.startswith("`python -m benchmarks.mil --instances 40 60") and str(Path.home()) not in page
    assert all(f"| {name} |" in page and name in shown for name in ATTENTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.pt", "heatmap.png", "results.json", "results.md"
    ]  # fmt: skip


@pytest.mark.parametrize("phase", ["train", "test"])
def test_resume_is_bit_identical(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    options = [*TINY, "--attention", "exact", "nystrom_ext"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*options, "--output-dir", str(whole)]) == 0
    bag = Bags.bag

    def interrupted(self: Bags, split: str, number: int) -> Any:
        if (split, number) == (phase, 3 if phase == "train" else 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return bag(self, split, number)

    with monkeypatch.context() as patch:
        patch.setattr(Bags, "bag", interrupted)
        assert main([*options, "--output-dir", str(parts)]) == 128 + signal.SIGTERM
    assert "with --resume to continue" in capsys.readouterr().err and not (parts / "results.json").exists()
    state = torch.load(parts / checkpoint.NAME, weights_only=True)["arms"]["exact"]
    assert (len(state["losses"]), len(state["scores"])) == ((4, 0) if phase == "train" else (6, 2))
    assert main([*options, "--output-dir", str(parts), "--resume"]) == 0
    for name, arm in results(whole)["arms"].items():
        resumed = results(parts)["arms"][name]
        assert all(resumed[key] == arm[key] for key in ("losses", "scores", "auc", "heat_map_auc"))
    assert results(whole)["config"] == results(parts)["config"]


def test_a_model_learns() -> None:
    """The figures of the results mean something."""
    args = parse("--instances 200 --share 0.3 --digit 0 --dim 32 --num-landmarks 16 --steps 80 --test-bags 20".split())
    torch.set_num_threads(1)
    arm, bags = training.Arm.of(args, "nystrom_ext"), Bags(args)
    from benchmarks.finetune.interrupts import Interrupts

    training.train([arm], bags, args, Interrupts(), lambda: None)
    training.test([arm], bags, args, Interrupts(), lambda: None)
    assert training.auc(arm.scores) > 0.9


# Bad input

BAD = {
    "--digit 10": "--digit must be one of 0 to 9, got 10",
    "--instances 8": "--instances must be one number or the least and the most, from 16, got 8",
    "--instances 60 40": "got 60 40; write --instances 2000 4000",
    "--instances 20 30 40": "got 20 30 40",
    "--instances -5": "--instances must be greater than 0, got -5",
    "--share 1.5": "--share must be at most 1, got 1.5",
    "--share nan": "--share must be greater than 0, got nan",
    "--dim 10 --heads 4": "--dim must be divisible by --heads, got 10 and 4",
    "--dropout 1": "--dropout must be in [0, 1), got 1",
    "--steps 0": "--steps must be greater than 0, got 0",
    "--test-bags 1": "--test-bags must be at least 2",
    "--warmup-steps 1.5": "--warmup-steps must be whole or a share below 1",
    "--weight-decay -1": "--weight-decay must not be negative, got -1",
    "--seed -1": "--seed must be in [0, 2**31), got -1",
    "--attention exact exact": "--attention must not repeat",
    "--attention softmax": "invalid choice: 'softmax'",
    "--device nowhere": "--device must be usable, got nowhere",
    "--output-dir /dev/null/x": "--output-dir must be writable",
    "--resume": "--resume needs a checkpoint",
    "--unknown": "--help lists the options",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_input_is_one_line_and_status_2(options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--output-dir", str(tmp_path), *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and BAD[options] in error


def test_resume_refuses_damage_and_other_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*TINY, "--attention", "exact", "--output-dir", str(tmp_path)]
    assert main(options) == 0
    assert main([*options, "--resume", "--digit", "5", "--checkpoint-every", "9"]) == 2
    assert "--resume needs the options of the first run: digit was 3, is 5; restore" in capsys.readouterr().err
    (tmp_path / checkpoint.NAME).write_text("x")
    assert main([*options, "--resume"]) == 2
    assert "it is damaged; leave out --resume" in capsys.readouterr().err


def test_too_little_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(training, "train_step", fails)
    assert main([*TINY, "--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: a step must fit into memory, a bag of 60 instances does not; lower --instances")


def test_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nystrom_attention", None)
    assert main([*TINY, "--output-dir", str(tmp_path)]) == 2
    assert "pip install nystrom-attention, or leave it out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
