"""benchmarks.finetune: Hugging Face models under their Trainer, from a tiny random BERT; resume, signals, positions."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_data import bert, glue, reviews, write

from benchmarks.finetune import UsageError, data, memory
from benchmarks.finetune.__main__ import main
from benchmarks.finetune.arguments import DEFAULTS, FREE, PRETRAINED_ONLY, SCRATCH_ONLY, config, parse

T = pytest.importorskip("transformers")
pytest.importorskip("datasets")
pretrained = pytest.importorskip("benchmarks.finetune.pretrained")
positions = pytest.importorskip("benchmarks.finetune.positions")


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Offline, without the process that measures memory."""
    monkeypatch.setattr(memory, "peak", lambda *args: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    for name in ("MRPC", "STS-B", "MNLI"):
        glue(folder, name)
    return folder


def arguments(tiny: Path, texts: Path, out: Path, *options: object) -> list[str]:
    given = ["--task", "mrpc", "--data-dir", texts, "--model", tiny, "--attention", "nystrom", "--num-landmarks", 8]
    given += ["--max-length", 48, "--batch-size", 2, "--checkpoint-every", 2, "--threads", 1, "--output-dir", out]
    return [str(x) for x in (*given, *options)]


def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def test_a_run_from_start_to_predictions(tiny: Path, texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    options = ["--attention", "softmax", "nystrom", "--max-steps", 3, "--do-predict", "--save-model"]
    assert main(arguments(tiny, texts, tmp_path, *options, "--report-to", "tensorboard")) == 0
    found = results(tmp_path)
    assert found["task"] == "mrpc" and found["evaluated"] == "dev" and found["steps"] == 3
    arms = found["arms"]
    assert list(arms) == ["softmax", "nystrom"] and arms["softmax"]["losses"] != arms["nystrom"]["losses"]
    for arm in arms.values():
        assert len(arm["losses"]) == len(arm["seconds"]) == 3 and set(arm["test"]) == {"f1", "accuracy"}
        assert list(arm["dev"]) == ["3"] and arm["dev"]["3"] == arm["test"]
    lines = (tmp_path / "test-nystrom.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 13 and {x.split("\t")[1] for x in lines[1:]} <= {"0", "1"}
    saved = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "nystrom" / "model")
    assert saved.config.id2label == {0: "0", 1: "1"}
    assert list(tmp_path.glob("**/events.out.tfevents.*")) and "dev f1" in capfd.readouterr().out
    assert str(tmp_path) not in found["command"]


def test_both_arms_start_from_the_same_values(tiny: Path, texts: Path, tmp_path: Path):
    args = parse(arguments(tiny, texts, tmp_path))
    softmax, nystrom = (pretrained.build(args, name, ("a", "b")) for name in ("softmax", "nystrom"))
    ours, theirs = nystrom.state_dict(), softmax.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = torch.arange(5, 45)[None] % 20 + 5
    assert not torch.allclose(softmax.eval()(ids).logits, nystrom.eval()(ids).logits, atol=1e-7)
    args = parse(arguments(tiny, texts, tmp_path, "--include", "*.layer.1.*"))
    converted = [
        name for name, m in pretrained.build(args, "nystrom", ()).named_modules() if "nystrom_options" in vars(m)
    ]
    assert converted == ["bert.encoder.layer.1.attention.self"]


@pytest.mark.parametrize("task", ["stsb", "mnli"])
def test_scores_and_further_test_sets(task: str, tiny: Path, texts: Path, tmp_path: Path):
    assert main(arguments(tiny, texts, tmp_path, "--task", task, "--max-steps", 1)) == 0
    arm = results(tmp_path)["arms"]["nystrom"]
    assert list(arm["test"]) == (["pearson", "spearman"] if task == "stsb" else ["accuracy"])
    assert list(arm["further"]) == (["dev_mismatched"] if task == "mnli" else [])


# ---- resume


class Crash(Exception):
    """What no part of the program expects."""


def crash_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = pretrained.Watch.on_step_begin

    def crash(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise Crash
        begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(pretrained.Watch, "on_step_begin", crash)


def test_resume_is_bit_identical(tiny: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--epochs", 2]  # 6 steps each; the model has dropout
    assert main(arguments(tiny, texts, whole, *options)) == 0
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(9, patch)  # in the second epoch, after the checkpoint of step 8
        main(arguments(tiny, texts, parts, *options))
    write(parts / "nystrom/checkpoint-10/trainer_state.json", "{")  # as if the crash had come while it was written
    assert main(arguments(tiny, texts, parts, *options, "--resume")) == 0
    a, b = results(whole)["arms"]["nystrom"], results(parts)["arms"]["nystrom"]
    assert a["losses"] == b["losses"] and len(a["losses"]) == 12 and a["dev"] == b["dev"] and len(a["dev"]) == 2


def test_a_signal_waits_for_the_step_and_its_checkpoint(
    tiny: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    options = ["--attention", "softmax", "nystrom", "--max-steps", 3, "--checkpoint-every", 1000]
    with monkeypatch.context() as patch:
        step = pretrained.TimedTrainer.training_step

        def signalled(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 1 and "nystrom" in self.args.output_dir:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, *args, **kwargs)

        patch.setattr(pretrained.TimedTrainer, "training_step", signalled)
        assert main(arguments(tiny, texts, tmp_path, *options)) == 128 + signal.SIGTERM
    assert "--resume" in capfd.readouterr().err.splitlines()[-1]
    assert (tmp_path / "softmax/arm.json").exists() and (tmp_path / "nystrom/checkpoint-2").exists()
    assert main(arguments(tiny, texts, tmp_path, *options, "--resume")) == 0
    assert "softmax: finished before" in capfd.readouterr().out
    assert len(results(tmp_path)["arms"]["nystrom"]["losses"]) == 3


def test_resume_refuses_other_options_and_other_data(
    tiny: Path, texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    assert main(arguments(tiny, texts, tmp_path, "--max-steps", 1)) == 0
    for options, message in (
        (["--max-steps", 1, "--resume", "--learning-rate", 1], "learning_rate was 2e-05, is 1.0"),
        (["--max-steps", 1, "--resume", "--data-dir", glue(tmp_path / "other", "MRPC", 14)], "data of the first run"),
    ):
        assert main(arguments(tiny, texts, tmp_path, *options)) == 2
        assert message in capfd.readouterr().err


# ---- bad input, dry runs


def test_a_dry_run_writes_nothing(tiny: Path, texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    for model in (["--model", tiny], ["--model", "scratch", "--attention", "softmax"]):
        assert main(arguments(tiny, texts, tmp_path / "out", *model, "--dry-run")) == 0
        assert "s per step on the longest texts" in capfd.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["attention_probs_dropout_prob", "attention_dropout"])
def test_attention_dropout_is_set_where_the_model_has_it(name: str, tiny: Path, texts: Path, tmp_path: Path):
    folder = tiny
    if name == "attention_dropout":
        folder = tmp_path / "model"
        T.DistilBertForSequenceClassification(
            T.DistilBertConfig(vocab_size=64, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
        ).save_pretrained(folder)
    args = parse(arguments(tiny, texts, tmp_path, "--attention-dropout", 0.25, "--model", folder))
    assert getattr(pretrained.build(args, "softmax", ("a", "b")).config, name) == 0.25


def test_out_of_memory_comes_with_advice(
    tiny: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def exhausted(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(pretrained.TimedTrainer, "training_step", exhausted)
    assert main(arguments(tiny, texts, tmp_path)) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "2 texts of 48 tokens do not; lower --batch-size" in error and "--gradient-checkpointing" in error


BAD = {
    "no model": (["--model", "nothing/here"], "got nothing/here"),
    "no model there": (["--model", "tests"], "got tests"),
    "baseline": (["--attention", "linformer"], "--attention linformer needs --model scratch"),
    "lra": (["--task", "lra-text"], "--task lra-text needs --model scratch"),
    "scratch only": (["--d-model", "8"], "--d-model needs --model scratch"),
    "pretrained only": (["--model", "scratch", "--bf16"], "--bf16 needs a Hugging Face --model"),
    "attention dropout": (["--attention-dropout", "1"], "--attention-dropout must be in [0, 1), got 1.0"),
    "include": (["--include", "nothing.*"], "--attention nystrom must convert a module"),
    "window": (["--window", "-1"], "--window must not be negative, got -1"),
    "warm-up": (["--warmup-steps", "1.5"], "--warmup-steps must be whole or a share below 1, got 1.5"),
    "no run": (["--resume"], "leave out --resume"),
    "Hub": (["--task", "hub", "--dataset-name", "nobody/nothing"], "--task hub takes no --data-dir"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line_and_status_2(
    case: str, tiny: Path, texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    options, message = BAD[case]
    assert main(arguments(tiny, texts, tmp_path, *options)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1] and len(lines) == 1, lines


def test_a_data_set_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match="got nobody/nothing"):
        data.load(parse(["--dataset-name", "nobody/nothing"]))


def test_names_of_hugging_faces_scripts_are_understood():
    args = parse(["--task_name", "synthetic", "--per_device_train_batch_size", "3", "--max_seq_length=70"])
    assert args.batch_size == 3 and args.max_length == 70
    assert {*FREE, *PRETRAINED_ONLY, *SCRATCH_ONLY} <= {*DEFAULTS} == {*vars(args)}
    json.dumps(config(args))


# ---- longer inputs


@pytest.mark.parametrize("how", ["tile", "interpolate"])
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert", "Albert", "Electra"])
def test_positions_are_extended(kind: str, how: str):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "DistilBert":
        sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    reserved = 2 if kind == "Roberta" else 0
    extra = {"embedding_size": 16} if kind in ("Albert", "Electra") else {}
    options = {"vocab_size": 30, "max_position_embeddings": 20 + reserved, "pad_token_id": 1 if reserved else 0}
    model = getattr(T, f"{kind}Model")(getattr(T, f"{kind}Config")(**sizes, **options, **extra)).eval()
    before = model.get_input_embeddings().weight.clone()
    table = model.embeddings.position_embeddings.weight.detach().clone()
    ids = torch.arange(2, 22)[None]
    expected = model(ids).last_hidden_state

    assert positions.extend_(model, 50, how) == 20 and model.config.max_position_embeddings == 50 + reserved
    longer = model.embeddings.position_embeddings.weight
    assert torch.equal(longer[:reserved], table[:reserved]) and torch.equal(longer[reserved], table[reserved])
    if how == "tile":
        assert torch.equal(longer[reserved:][40:], table[reserved:][:10])
        torch.testing.assert_close(model(ids).last_hidden_state, expected)
    else:
        assert torch.allclose(longer[-1], table[-1])
    assert model(torch.arange(2, 27).repeat(2)[None]).last_hidden_state.shape == (1, 50, 16)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert positions.extend_(model, 30, how) == 50  # long enough: nothing changes
    assert model.embeddings.position_embeddings.weight is longer


def test_long_reviews_are_read_whole(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder = reviews(tmp_path, length=150)
    options = ["--task", "imdb", "--data-dir", folder, "--max-length", 160, "--max-steps", 1]
    assert main(arguments(tiny, folder, tmp_path / "out", *options)) == 0
    assert results(tmp_path / "out")["sizes"]["longest"] == 160
    assert "64 positions extended to 160 (tile)" in capfd.readouterr().out
