"""Tiny data sets in the official formats, for the tests of benchmarks.finetune."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

# Columns of each official file up to the ones that are read, with {} for the texts and the label.
HEADERS = {
    "CoLA": "source\tlabel\tnotes\tsentence",
    "SST-2": "sentence\tlabel",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "MNLI": "index\tpromptID\tpairID\ts1_binary\ts2_binary\ts1_syntax\ts2_syntax\tgenre\tsentence1\tsentence2\tlabel1"
    "\tgold_label",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
    "WNLI": "index\tsentence1\tsentence2\tlabel",
}
TEST_HEADERS = HEADERS | {"CoLA": "index\tsentence", "SST-2": "index\tsentence", "QQP": "id\tquestion1\tquestion2"}
LINES: dict[str, Callable[[int, str, str, str], str]] = {
    "CoLA": lambda i, a, b, label: f"gj04\t{label}\t\t{a}",
    "SST-2": lambda i, a, b, label: f"{a}\t{label}",
    "MRPC": lambda i, a, b, label: f"{label}\t{i}\t{i + 1}\t{a}\t{b}",
    "STS-B": lambda i, a, b, label: f"{i}\tg\tf\t2012\t{i}\tnone\tnone\t{a}\t{b}\t{label}",
    "QQP": lambda i, a, b, label: f"{i}\t{i}\t{i + 1}\t{a}\t{b}\t{label}",
    "MNLI": lambda i, a, b, label: f"{i}\t1\t1e\t( x )\t( y )\tS\tS\tfiction\t{a}\t{b}\tneutral\t{label}",
    "QNLI": lambda i, a, b, label: f"{i}\t{a}\t{b}\t{label}",
    "RTE": lambda i, a, b, label: f"{i}\t{a}\t{b}\t{label}",
    "WNLI": lambda i, a, b, label: f"{i}\t{a}\t{b}\t{label}",
}
TEST_LINES = {name: (lambda i, a, b, label, line=line: line(i, a, b, "")) for name, line in LINES.items()} | {
    "CoLA": lambda i, a, b, label: f"{i}\t{a}",
    "SST-2": lambda i, a, b, label: f"{i}\t{a}",
    "QQP": lambda i, a, b, label: f"{i}\t{a}\t{b}",
}
LABELS = {
    "STS-B": ("0.000", "2.5", "5.000"),
    "MNLI": ("neutral", "contradiction", "entailment"),
    "QNLI": ("not_entailment", "entailment"),
    "RTE": ("not_entailment", "entailment"),
}
SPLITS = {"MNLI": ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")}
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew strange potions in old castles".split()


def sentence(i: int, length: int = 12) -> str:
    return " ".join(WORDS[(i * 5 + j * (1 + i % 3)) % len(WORDS)] for j in range(length + i % 5))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def glue(folder: Path, task: str, count: int = 12, length: int = 12) -> Path:
    """The files of a task, named by its folder, as they are distributed: with a byte order mark in MRPC."""
    labels = LABELS.get(task, ("1", "0"))
    for split in SPLITS.get(task, ("train", "dev", "test")):
        test = split.startswith("test")
        line, header = (TEST_LINES if test else LINES)[task], (TEST_HEADERS if test else HEADERS)[task]
        lines = [] if task == "CoLA" and not test else [header]
        lines += [line(i, sentence(i, length), sentence(i + 1, length), labels[i % len(labels)]) for i in range(count)]
        mark = "\ufeff" if task == "MRPC" else ""
        write(folder / task / f"{split}.tsv", mark + "\n".join(lines) + "\n")
    return folder


def reviews(folder: Path, count: int = 6, length: int = 12) -> Path:
    for split in ("train", "test"):
        for label, rating, word in (("neg", 2, "dull"), ("pos", 9, "lovely")):
            for i in range(count):
                text = f"{sentence(i, length)}<br /><br />{split} {word} {i}."
                write(folder / "aclImdb" / split / label / f"{i}_{rating}.txt", text)
    return folder


def cifar(folder: Path, count: int = 4) -> Path:
    for number, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        records = [bytes([(number + i) % 10]) + bytes([(16 * i) % 256]) * 3072 for i in range(count)]
        write(folder / "cifar-10-batches-bin" / f"{name}.bin", b"".join(records))
    return folder


def pathfinder(folder: Path, count: int = 10) -> Path:
    from PIL import Image

    root, lines = folder / "pathfinder32" / "curv_contour_length_14", []
    for i in range(count):
        file = io.BytesIO()
        Image.new("L", (32, 32), 10 * i).save(file, "PNG")
        write(root / "imgs" / "0" / f"sample_{i}.png", file.getvalue())
        lines.append(f"imgs/0 sample_{i}.png {i} {i % 2} 1.8 6 2 0.75 14 1 2")
    write(root / "imgs" / "0" / "sample_empty.png", b"")
    lines.append("imgs/0 sample_empty.png 99 1 1.8 6 2 0.75 14 1 2")
    write(root / "metadata" / "0.npy", "\n".join(lines) + "\n")
    return folder


def retrieval(folder: Path, count: int = 6) -> Path:
    for split in ("train", "eval", "test"):
        lines = [f"{i % 2}.0\tP{i}\tQ{i}\t{sentence(i)}\t{split} {sentence(i + 3)}" for i in range(count)]
        write(folder / "tsv_data" / f"new_aan_pairs.{split}.tsv", "\n".join(lines) + "\n")
    return folder


def bert(folder: Path) -> Path:
    """A tiny random BERT with 64 positions and a tokenizer that knows WORDS."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate(special + sorted({*WORDS, "dull", "lovely", "train", "test", "."}))}
    BertTokenizerFast(vocab=vocabulary, model_max_length=64).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder
