"""benchmarks.finetune: Long-Range Arena's tasks, models and baselines, from hand-computed values and tiny fixtures."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from finetune_data import cifar, pathfinder, retrieval, reviews, sentence, write
from torch import nn

from benchmarks.finetune import UsageError, data, scratch, training
from benchmarks.finetune.__main__ import main
from benchmarks.finetune.arguments import parse
from benchmarks.finetune.baselines import BASELINES
from benchmarks.finetune.model import ATTENTIONS, build
from benchmarks.finetune.splits import Splits
from benchmarks.finetune.tasks import listops, lra


def load(task: str, folder: Path, *options: str) -> Splits:
    return data.load(parse(["--task", f"lra-{task}", "--data-dir", str(folder), *options]))


# ---- ListOps

HAND_COMPUTED = {
    "7": 7,
    "[MIN 4 2 9 ]": 2,
    "[MAX 4 2 9 ]": 9,
    "[MED 4 2 9 ]": 4,
    "[MED 1 2 3 8 ]": 2,  # 2.5, rounded down
    "[SM 4 2 9 ]": 5,
    "( ( ( [SM 4 ) 8 ) ] )": 2,
    "[MAX 2 9 [MIN 4 7 ] 0 ]": 9,
    "[SM [MAX 1 [MED 3 9 5 ] ] [MIN 8 6 ] [SM 9 9 9 ] ]": 8,  # 5 + 6 + 7
    "( ( ( ( [MED ( ( ( [MIN 7 ) 5 ) ] ) ) 8 ) 6 ) ] )": 6,
}


@pytest.mark.parametrize("text", HAND_COMPUTED)
def test_hand_computed_expressions(text: str):
    assert listops.evaluate(text) == HAND_COMPUTED[text]


def test_generated_expressions_are_those_that_the_benchmark_specifies():
    splits = listops.generate(3, {"train": 12, "val": 3, "test": 3})
    texts = [text for examples in splits.values() for text, _ in examples]
    assert len({*texts}) == 18
    used = set()
    for text, value in (example for examples in splits.values() for example in examples):
        symbols = listops.symbols(text).split()
        used |= {*symbols}
        assert 500 < len(symbols) < 2000 and listops.evaluate(text) == value
        depth = arguments = deepest = 0
        stack = []
        for symbol in symbols:
            if symbol == "]":
                assert 2 <= arguments <= 10
                arguments, depth = stack.pop() + 1, depth - 1
            elif symbol.startswith("["):
                stack.append(arguments)
                arguments, depth = 0, depth + 1
            else:
                arguments += 1
            deepest = max(deepest, depth)
        assert depth == 0 and deepest <= 9  # digits are the tenth level
    assert used == {*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]"}


def test_parentheses_nest_as_in_the_files():
    for seed in range(50):
        text, value, length = listops.expression(random.Random(seed))
        depth = 0
        for symbol in text.split():
            depth += (symbol == "(") - (symbol == ")")
            assert depth >= 0
        assert depth == 0 and length == len(listops.symbols(text).split()) and value == listops.evaluate(text)


def test_a_quarter_of_the_expressions_are_operations():
    found = [listops.expression(random.Random(seed))[2] > 1 for seed in range(1000)]
    assert 0.2 < sum(found) / 1000 < 0.3


def test_written_files_read_back(tmp_path: Path):
    options = ["--task", "lra-listops", "--max-train", "6", "--max-test", "2", "--seed", "5"]
    assert main([*options, "--write-data", str(tmp_path / "listops")]) == 0
    made, read = data.load(parse(options)), data.load(parse([*options, "--data-dir", str(tmp_path / "listops")]))
    assert (made.train, made.dev, made.test) == (read.train, read.dev, read.test)
    assert (tmp_path / "listops/basic_val.tsv").read_text().startswith("Source\tTarget\n( ")
    more = data.load(parse([*options[:2], "--max-train", "9", *options[4:]]))
    assert (more.dev, more.test) == (made.dev, made.test) and more.train[:6] == made.train


# ---- the other tasks


def test_text_is_read_byte_by_byte(tmp_path: Path):
    splits = load("text", reviews(tmp_path))
    raw = f"{sentence(0)}<br /><br />test dull 0.".encode()
    assert splits.test[0] == (raw, 0)
    encoded = data.Encoded(splits.test, None, 20)
    assert encoded.ids[0][0].tolist() == [byte + 2 for byte in raw[:20]]


def test_images_become_grey(tmp_path: Path):
    splits = load("image", cifar(tmp_path))
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (18, 2, 4)
    pixels, label = splits.train[1]
    assert label == 1 and len(pixels) == 1024 and set(pixels) == {16}
    planes = b"".join(bytes([value]) * 1024 for value in (255, 0, 128))
    assert set(lra._grey(planes)) == {int((0.2989 * 255 + 0.114 * 128) / 255 * 255.5)}
    assert set(lra._grey(b"\xff" * 3072)) == {255}


def test_pathfinder_pairs_pictures_with_labels_and_skips_empty_ones(tmp_path: Path):
    for folder in (pathfinder(tmp_path), tmp_path / "pathfinder32"):
        splits = load("pathfinder", folder)
        examples = splits.train + splits.dev + splits.test
        assert (len(splits.train), len(splits.dev), len(splits.test)) == (8, 1, 1)
        assert {(pixels[0] // 10, label) for pixels, label in examples} == {(i, i % 2) for i in range(10)}


def test_retrieval_reads_pairs(tmp_path: Path):
    splits = load("retrieval", retrieval(tmp_path))
    assert splits.dev[1] == ((sentence(1).encode(), f"eval {sentence(4)}".encode()), 1)
    ids, labels = data.Encoded(splits.train, None, 9).batch([0, 1])
    assert ids.shape == (2, 2, 9) and labels.tolist() == [0, 1]
    model = build(
        parse(["--task", "lra-retrieval", "--data-dir", "x", "--num-landmarks", "4"]), "nystrom", 258, 2, True
    )
    model.eval()
    padded = nn.functional.pad(ids, (0, 6))
    torch.testing.assert_close(model(padded, padded == 0), model(ids, ids == 0))


BAD = {
    "image": (cifar, "cifar-10-batches-bin/test_batch.bin", b"x", "records of 3073 bytes"),
    "image label": (cifar, "cifar-10-batches-bin/test_batch.bin", b"\xff" * 3073, "label below 10"),
    "pathfinder": (pathfinder, "pathfinder32/curv_contour_length_14/metadata/0.npy", "a b\n", "line 1 is 'a b'"),
    "pathfinder names": (
        pathfinder, "pathfinder32/curv_contour_length_14/metadata/0.npy", "imgs/0 x.png 0 1\n", "is missing"
    ),
    "pathfinder picture": (
        pathfinder, "pathfinder32/curv_contour_length_14/imgs/0/sample_3.png", b"\x89PNG", "intact PNG"
    ),
    "retrieval": (retrieval, "tsv_data/new_aan_pairs.eval.tsv", "1\ta\tb\n", "has 3 columns"),
    "listops": (lambda p: p, "basic_val.tsv", "Source\tTarget\n[MAX 1 2 ]\t12\n", "line 2 has"),
    "listops header": (lambda p: p, "basic_val.tsv", "( 1 )\t2\n", "columns Source and Target"),
    "listops split": (lambda p: p, "basic_val.tsv", "Source\tTarget\n3\t3\n", "basic_train.tsv"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(case: str, tmp_path: Path):
    make, name, content, message = BAD[case]
    make(tmp_path)
    write(tmp_path / name, content)
    with pytest.raises(UsageError, match=message):
        load(case.split()[0], tmp_path)


@pytest.mark.parametrize("task", ["image", "pathfinder", "retrieval", "text"])
def test_missing_data_are_named(task: str, tmp_path: Path):
    with pytest.raises(UsageError, match="name|get"):
        load(task, tmp_path)


# ---- models


def test_the_defaults_are_the_papers():
    args = parse(["--task", "lra-listops"])
    assert (args.layers, args.d_model, args.heads, args.feedforward) == (2, 64, 2, 128)
    assert (args.conv_kernel_size, args.num_landmarks, args.max_length, args.max_steps) == (35, 64, 2000, 5000)
    assert parse(["--task", "lra-listops", "--conv-kernel-size", "3"]).conv_kernel_size == 3


def small(*options: str) -> object:
    sizes = "--max-train 6 --max-test 4 --d-model 16 --feedforward 16 --batch-size 2 --max-steps 2 --max-length 150"
    extra = "--linformer-k 16 --performer-features 16 --num-landmarks 8 --threads 1 --conv-kernel-size 5"
    return parse(["--task", "lra-listops", *sizes.split(), *extra.split(), *options])


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_attention_starts_alike_learns_and_ignores_padding(name: str):
    args = small("--dropout", "0")
    model, stock = build(args, name, 17, 10), build(args, "softmax", 17, 10)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in stock.state_dict().items())
    extra = {key.rpartition("self_attn.")[2] for key in {*state} - {*stock.state_dict()}}
    expected = {"linformer": {"project_keys", "project_values"}, "performer": {"features"}, "nystrom": {"conv.weight"}}
    assert extra == expected.get(name, set())

    ids = torch.randint(2, 17, (3, 100), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    ids[1, 60:] = 0
    arm = training.Arm.create(name, model, args)
    arm.loss(ids, torch.tensor([1, 2, 3])).backward()
    assert all(p.grad is not None for p in model.parameters())
    if name == "reformer":
        return  # its buckets depend on the number of positions
    alone, padded = ids[1:2, :60], nn.functional.pad(ids[1:2], (0, 30))
    model.eval()
    torch.testing.assert_close(model(alone, alone == 0), model(padded, padded == 0), atol=1e-4, rtol=1e-3)


def test_baselines_approach_softmax_where_they_should():
    """The Performer with many features and small inputs, because its package adds a constant to each; the Reformer
    where two buckets hold all, and queries are keys."""
    args = small("--performer-features", "4096", "--reformer-hashes", "1")
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(16, 2, batch_first=True)
    x = 0.3 * torch.randn(2, 40, 16)
    keep = torch.arange(40) < torch.tensor([[40], [25]])
    exact = stock(x, x, x, key_padding_mask=~keep)[0]
    performer = BASELINES["performer"][0](stock, args).eval()(x, x, x, key_padding_mask=~keep)[0]
    assert (performer - exact)[keep].norm() < 0.1 * exact[keep].norm()
    reformer = BASELINES["reformer"][0](stock, args).eval()
    q = (
        nn.functional.linear(x, stock.in_proj_weight, stock.in_proj_bias)
        .unflatten(-1, (3, 2, 8))
        .permute(2, 0, 3, 1, 4)
    )
    unit = nn.functional.normalize(q[0], dim=-1)
    scores = (q[0] @ unit.mT) * 8**-0.5
    scores = scores.masked_fill(~keep[:, None, None], -torch.inf).masked_fill(torch.eye(40, dtype=torch.bool), -5e4)
    expected = stock.out_proj((scores.softmax(-1) @ q[2]).transpose(1, 2).flatten(2))
    found = reformer(x, x, x, key_padding_mask=~keep)[0]
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-5, rtol=1e-4)


def test_all_arms_run_and_the_baselines_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    args = small("--attention", *ATTENTIONS)
    job = scratch.Job(args, data.load(args))
    assert job.vocab == 17 and all(job.trial(name) > 0 for name in ATTENTIONS)
    monkeypatch.setitem(__import__("sys").modules, "reformer_pytorch", None)
    with pytest.raises(UsageError, match="needs the package reformer-pytorch"):
        build(args, "reformer", 17, 10)
