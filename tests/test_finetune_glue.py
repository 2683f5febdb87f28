"""benchmarks.finetune: GLUE's nine layouts, tables, metrics, archives, and their bad input, from tiny fixtures."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from finetune_data import LABELS, SPLITS, glue, reviews, sentence, write

from benchmarks.finetune import UsageError, data, metrics
from benchmarks.finetune.arguments import parse
from benchmarks.finetune.splits import Splits
from benchmarks.finetune.tasks import files
from benchmarks.finetune.tasks.glue import LAYOUTS

FOLDERS = {task: layout.folder for task, layout in LAYOUTS.items()}
SINGLE = ("cola", "sst2")


def load(task: str, folder: Path, *options: object) -> Splits:
    return data.load(parse(["--task", task, "--data-dir", str(folder), *map(str, options)]))


def text(task: str, i: int) -> object:
    return sentence(i) if task in SINGLE else (sentence(i), sentence(i + 1))


@pytest.mark.parametrize("task", LAYOUTS)
def test_every_task_reads_its_columns(task: str, tmp_path: Path):
    splits = load(task, glue(tmp_path, FOLDERS[task]))
    names = LABELS.get(FOLDERS[task], ("1", "0"))
    assert [example[0] for example in splits.train] == [text(task, i) for i in range(12)]
    assert splits.dev == splits.test and splits.evaluated.startswith("dev")
    found = [splits.labels[int(label)] if splits.labels else label for _, label in splits.train]
    assert found == [names[i % len(names)] if splits.labels else float(names[i % len(names)]) for i in range(12)]
    tests = [name for name in SPLITS.get(FOLDERS[task], ("test",)) if name.startswith("test")]
    assert {name: texts[0] for name, texts in splits.unlabelled.items()} == dict.fromkeys(tests, text(task, 0))
    assert list(splits.further) == (["dev_mismatched"] if task == "mnli" else [])


def test_label_orders_are_the_official_ones():
    orders = {task: layout.labels for task, layout in LAYOUTS.items()}
    assert orders["mnli"] == ("contradiction", "entailment", "neutral")
    assert orders["qnli"] == orders["rte"] == ("entailment", "not_entailment")
    assert orders["stsb"] == () and {orders[x] for x in ("cola", "sst2", "mrpc", "qqp", "wnli")} == {("0", "1")}


def test_folders_may_be_named_otherwise(tmp_path: Path):
    glue(tmp_path, "SST-2")
    (tmp_path / "SST-2").rename(tmp_path / "sst2")
    assert load("sst2", tmp_path).train == load("sst2", tmp_path / "sst2").train


def test_quotes_and_odd_line_ends_are_part_of_the_text(tmp_path: Path):
    glue(tmp_path, "SST-2")
    odd = 'he said "no and\u2028left\x85 it'
    write(tmp_path / "SST-2/train.tsv", f"sentence\tlabel\r\n{odd}\t1\r\nplain\t0\r\n")
    assert load("sst2", tmp_path).train == [(odd, 1), ("plain", 0)]


def test_short_lines_of_qqp_are_skipped_and_others_are_refused(tmp_path: Path):
    for name in ("QQP", "QNLI"):
        glue(tmp_path, name)
        path = tmp_path / name / "train.tsv"
        write(path, path.read_text() + "12\tonly\n")
    assert len(load("qqp", tmp_path).train) == 12
    with pytest.raises(UsageError, match=r"QNLI/train.tsv must have at least 3 columns.* line 14 has 2"):
        load("qnli", tmp_path)


BAD = {
    "unknown label": ("SST-2", "train", "sentence\tlabel\nfine\tgreat\n", "one of 0, 1.*train.tsv line 2 has 'great'"),
    "no header": ("SST-2", "train", "fine\t1\nbad\t0\n", "must begin with a header line"),
    "header in CoLA": ("CoLA", "train", "source\tlabel\tx\tsentence\n", "one of 0, 1.*line 1 has 'label'"),
    "score": ("STS-B", "dev", "h\n" + "x\t" * 9 + "7\n", "from 0 to 5.*'7'"),
    "not UTF-8": ("RTE", "dev", b"h\n\xe9", "must be UTF-8"),
    "columns of test": ("MRPC", "test", "h\n1\t2\n", "at least 5 columns, line 2 has 2"),
    "one class": ("SST-2", "train", "sentence\tlabel\nfine\t1\nfiner\t1\n", "two classes"),
    "no examples": ("SST-2", "dev", "sentence\tlabel\n", "must have examples"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(case: str, tmp_path: Path):
    folder, split, content, message = BAD[case]
    write(glue(tmp_path, folder) / folder / f"{split}.tsv", content)
    task = next(task for task, name in FOLDERS.items() if name == folder)
    with pytest.raises(UsageError, match=message):
        load(task, tmp_path)


def test_missing_files_are_named(tmp_path: Path):
    (glue(tmp_path, "MNLI") / "MNLI/dev_mismatched.tsv").unlink()
    with pytest.raises(UsageError, match="lacks dev_mismatched"):
        load("mnli", tmp_path)
    with pytest.raises(UsageError, match="RTE.* lacks train, dev"):
        load("rte", tmp_path)


# ---- archives


def archive(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_a_tar_reads_as_its_folder(tmp_path: Path):
    folder = glue(tmp_path / "glue", "MRPC")
    with tarfile.open(tmp_path / "glue.tar.xz", "w:xz") as tar:
        tar.add(folder, "glue_data")
    assert load("mrpc", tmp_path / "glue.tar.xz") == load("mrpc", folder)


@pytest.mark.parametrize("name", ["../MRPC/train.tsv", "/MRPC/train.tsv"])
def test_archives_that_leave_their_folder_are_refused(name: str, tmp_path: Path):
    with pytest.raises(UsageError, match="outside itself"):
        load("mrpc", archive(tmp_path / "x.tar", {name: b"h\n"}))
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_links_in_archives_are_not_followed(tmp_path: Path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo("MRPC/train.tsv")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(member)
    with pytest.raises(UsageError, match="lacks train, dev"):
        load("mrpc", tmp_path / "x.tar")


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = archive(tmp_path / "x.tar.gz", {f"x/{i}": bytes(10_000) for i in range(3)}, "w:gz")
    for name in ("MAX_FILE", "MAX_TOTAL"):
        with monkeypatch.context() as patch, pytest.raises(UsageError, match="must not unpack to more"):
            patch.setattr(files, name, 9_000 if name == "MAX_FILE" else 25_000)
            load("mrpc", path)


# ---- tables


def table(path: Path, rows: list[dict[str, object]], features: object = None) -> None:
    datasets = pytest.importorskip("datasets")
    path.parent.mkdir(parents=True, exist_ok=True)
    made = datasets.Dataset.from_list(rows, features=features)
    datasets.disable_progress_bars()
    getattr(made, {".csv": "to_csv", ".jsonl": "to_json", ".parquet": "to_parquet"}[path.suffix])(path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_the_hubs_tables_mean_the_same(kind: str, tmp_path: Path):
    hub = ("entailment", "neutral", "contradiction")
    for split in ("train", "validation_matched", "validation_mismatched", "test_matched"):
        rows = [
            {"premise": sentence(i), "hypothesis": sentence(i + 1), "label": -1 if "test" in split else i % 3, "idx": i}
            for i in range(6)
        ]
        table(tmp_path / "mnli" / f"{split}-00000-of-00001.{kind}", rows)
    splits = load("mnli", tmp_path)
    assert splits.train[1] == (("".join(sentence(1)), sentence(2)), splits.labels.index(hub[1]))
    assert list(splits.further) == ["validation_mismatched"] and list(splits.unlabelled) == ["test_matched"]


def test_names_in_parquet_win_over_numbers(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({
        "sentence1": datasets.Value("string"), "sentence2": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["not_entailment", "entailment"]),
    })  # fmt: skip
    rows = [{"sentence1": "a", "sentence2": "b", "label": i % 2} for i in range(4)]
    for split in ("train", "validation"):
        table(tmp_path / f"{split}-0.parquet", rows, features)
    splits = load("rte", tmp_path)
    assert [splits.labels[int(label)] for _, label in splits.train[:2]] == ["not_entailment", "entailment"]


def custom(path: Path, content: str) -> Splits:
    file = write(path, content)
    return data.load(parse(["--train-file", str(file), "--validation-file", str(file)]))


def test_own_files(tmp_path: Path):
    splits = custom(tmp_path / "a.csv", "sentence1,sentence2,label\na b,c,yes\nd,e,no\nf,g,no\n")
    assert splits.labels == ("no", "yes") and splits.train[0] == (("a b", "c"), 1) and len(splits.dev) == 3
    splits = custom(tmp_path / "b.json", "\n".join(json.dumps({"title": "t", "label": x / 2}) for x in range(3)))
    assert splits.labels == () and splits.train[1] == ("t", 0.5) and splits.metrics == ("pearson", "spearman")
    splits = custom(tmp_path / "c.tsv", 'text\tlabel\n"quoted\t3\nx\t5\n')
    assert splits.labels == ("3", "5") and splits.train[0] == ('"quoted', 0)


OWN = {
    "columns": ("a.csv", "sentence,score\na,1\n", "lacks label and has sentence, score"),
    "suffix": ("a.xls", "x", "one of .csv"),
    "damaged": ("a.parquet", "x", "intact parquet file"),
    "empty text": ("a.csv", "text,label\n,1\nb,0\n", "must hold texts"),
}


@pytest.mark.parametrize("case", OWN)
def test_bad_own_files_are_named(case: str, tmp_path: Path):
    name, content, message = OWN[case]
    with pytest.raises(UsageError, match=message):
        custom(tmp_path / name, content)


def test_reviews_as_tables(tmp_path: Path):
    for split in ("train", "test"):
        table(tmp_path / f"{split}-0.parquet", [{"text": f"{split} {i}", "label": i % 2} for i in range(8)])
    splits = load("imdb", tmp_path)
    assert splits.labels == ("neg", "pos") and splits.test[1] == ("test 1", 1)
    assert load("imdb", reviews(tmp_path / "acl")).labels == splits.labels


# ---- metrics and subsets


def test_metrics_against_hand_computed_values():
    logits = torch.tensor([[0.0, 1], [1, 0], [0, 1], [1, 0], [0, 1]])  # answers 1 0 1 0 1
    labels = torch.tensor([1, 0, 0, 1, 1])  # 2 true positives, 1 false positive, 1 false negative, 1 true negative
    found = metrics.score(("accuracy", "f1", "matthews"), logits, labels)
    assert found["accuracy"] == pytest.approx(3 / 5) and found["f1"] == pytest.approx(2 / 3)
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)
    scores = torch.tensor([[0.0], [1], [2], [10]])
    found = metrics.score(("pearson", "spearman"), scores, torch.tensor([0.0, 1, 2, 3]))
    assert found["spearman"] == pytest.approx(1) and found["pearson"] == pytest.approx(15.5 / (5 * 62.75) ** 0.5)
    assert metrics.score(("pearson",), torch.ones(4, 1), torch.tensor([0.0, 1, 2, 3])) == {"pearson": 0}


def test_subsets_keep_the_shares_of_the_classes(tmp_path: Path):
    glue(tmp_path, "SST-2")
    lines = [f"text {i}\t{int(i % 4 > 0)}" for i in range(40)]
    write(tmp_path / "SST-2/train.tsv", "\n".join(["sentence\tlabel", *lines]))
    labels = [label for _, label in load("sst2", tmp_path, "--max-train", 8).train]
    assert (labels.count(0), labels.count(1)) == (2, 6)
    assert load("sst2", tmp_path, "--max-train", 8, "--seed", 1).train != load("sst2", tmp_path, "--max-train", 8).train
