"""``python -m benchmarks.finetune.swap --data DIR``: what a swap without any training does to sentence embeddings.

A model that was never trained with Nyström attention, all-MiniLM-L6-v2 unless another is named, embeds IMDB reviews and
MRPC sentences with softmax attention and with every combination of landmarks, window, pinned tokens and converted
layers. Cases done already are kept.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nystrom_ext import nystrom, nystrom_attention

from . import UsageError, data, pretrained, report, swap_report
from .arguments import Parser, parse
from .checkpoint import write_atomically
from .study import data_set

BATCH, MAX_LENGTH, LEAST_LENGTH = 10, 512, 200  # tokens of reviews; shorter ones say little
LAYERS: dict[str, dict[str, Any]] = {
    "all": {},
    "all but 1, 2": {"exclude": "encoder.layer.[12].*"},
    "last 3": {"include": "encoder.layer.[345].*"},
}
COST_LENGTHS = (512, 4096)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.finetune.swap", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with glue.tar.xz or glue, and aclImdb.tar.xz or aclImdb")
    add("--model", default="minilm", help="minilm, or the folder of a BERT with a tokenizer, 6 layers")
    add("--num-landmarks", nargs="+", type=int, default=[32, 64, 128])
    add("--window", nargs="+", type=int, default=[0, 8, 16, 32])
    add("--pinned", nargs="+", type=int, default=[0, 1, 4])
    add("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    add("--reviews", type=int, default=100)
    add("--pairs", type=int, default=400, help="of MRPC's dev set")
    add("--repetitions", type=int, default=20, help="timed calls of the attention alone; the median counts")
    add("--threads", type=int, default=1)
    add("--output", type=Path, default=Path("runs/swap"), help="writes OUTPUT.json, OUTPUT.md and OUTPUT.png")
    try:
        args = parser.parse_args(argv)
        counts = (args.reviews, args.pairs, args.repetitions, args.threads, *args.num_landmarks)
        if min(counts) < 1 or min(args.window + args.pinned) < 0:
            raise UsageError("counts must be positive, --window and --pinned at least 0; change what is not")
        torch.set_num_threads(args.threads)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        measure(args)
    except UsageError as error:
        print("error:", error, file=sys.stderr)
        return 2
    return 0


def measure(args: argparse.Namespace) -> None:
    document = args.output.with_suffix(".json")
    setting = {name: getattr(args, name) for name in ("model", "reviews", "pairs")}
    found = report.resumed(document, setting)
    texts = Texts.read(args)
    grid = list(itertools.product(args.num_landmarks, args.window, args.pinned))
    with torch.inference_mode():
        if "exact" not in found:
            found["exact"] = texts.score(None, {}) | {"tokens": [len(ids) for ids in texts.reviews.ids]}
        for layers, (m, w, p) in tqdm(list(itertools.product(args.layers, grid)), desc="embedding", unit="swap"):
            options = {"num_landmarks": m, "window": w, "pinned": p}
            case = {"layers": layers, **options}
            if any(case.items() <= done.items() for done in found["cases"]):
                continue
            found["cases"].append({**case, **texts.score(LAYERS[layers], options)})
            report.write_json(document, found)
        heads, width = texts.model.config.num_attention_heads, texts.model.config.hidden_size
        found["cost"] = cost((1, heads, width // heads), grid, args.repetitions)
    found["threads"] = args.threads
    report.write_json(document, found)
    table = swap_report.table(found)
    print(table, end="")
    write_atomically(args.output.with_suffix(".md"), lambda file: file.write(table.encode()))
    figure = swap_report.draw(found)
    write_atomically(args.output.with_suffix(".png"), lambda file: figure.savefig(file, format="png", dpi=130))


@dataclass
class Encoded:
    ids: list[list[int]]
    labels: Tensor


class Texts:
    """The model and what it embeds: reviews, training reviews for a classifier of embeddings, pairs of sentences."""

    def __init__(self, model: Any, train: Encoded, reviews: Encoded, pairs: Encoded) -> None:
        self.model, self.reviews, self.pairs = model, reviews, pairs
        self.exact = embed(model, reviews.ids)
        self.classifier = _classifier(embed(model, train.ids), train.labels)
        self.pairs_exact = embed(model, pairs.ids)

    @classmethod
    @torch.inference_mode()
    def read(cls, args: argparse.Namespace) -> Texts:
        from transformers import AutoModel, AutoTokenizer

        folder = pretrained.folder(args.model)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        imdb = _load("imdb", data_set(args.data, "aclImdb"), max_train=10 * args.reviews, max_test=10 * args.reviews)
        mrpc = _load("mrpc", data_set(args.data, "glue"), max_test=args.pairs)

        def encode(examples: list[Any], least: int) -> Encoded:
            ids = tokenizer([text for text, _ in examples], truncation=True, max_length=MAX_LENGTH)["input_ids"]
            chosen = [i for i, tokens in enumerate(ids) if len(tokens) >= least]
            return Encoded([ids[i] for i in chosen], torch.tensor([examples[i][1] for i in chosen]))

        def long_enough(examples: list[Any], count: int) -> Encoded:
            found = encode(examples, LEAST_LENGTH)
            if len(found.ids) < count:
                have = f"{len(found.ids)} reviews of {LEAST_LENGTH} tokens or more"
                raise UsageError(f"--reviews {args.reviews} needs {count} of them, the data has {have}; lower it")
            return Encoded(found.ids[:count], found.labels[:count])

        sides = [(side, label) for pair, label in mrpc.dev for side in pair]
        texts = [long_enough(imdb.train, 4 * args.reviews), long_enough(imdb.test, args.reviews), encode(sides, 0)]
        return cls(AutoModel.from_pretrained(folder).eval(), *texts)

    def score(self, layers: dict[str, Any] | None, options: dict[str, int]) -> dict[str, float]:
        """All as shares between 0 and 1, against the exact embeddings; ``layers`` None is the exact model itself."""
        reviews, pairs = self.exact, self.pairs_exact
        if layers is not None:
            with nystrom(self.model, **options, **layers):
                reviews = embed(self.model, self.reviews.ids)
                if max(map(len, self.pairs.ids)) > options["num_landmarks"]:  # otherwise they are exact
                    pairs = embed(self.model, self.pairs.ids)
        cosine = (reviews * self.exact).sum(-1)
        predicted, expected = (torch.from_numpy(self.classifier.predict(x.numpy())) for x in (reviews, self.exact))
        left, right = pairs[::2], pairs[1::2]
        return {
            "cosine": cosine.mean().item(),
            "least_cosine": cosine.min().item(),
            "neighbour": _share(_nearest(reviews, reviews) == _nearest(self.exact, self.exact)),
            "neighbour_in_exact_index": _share(_nearest(reviews, self.exact) == _nearest(self.exact, self.exact)),
            "same_label": _share(predicted == expected),
            "accuracy": _share(predicted == self.reviews.labels),
            "paraphrase_auc": _auc((left * right).sum(-1), self.pairs.labels[::2]),
        }


def embed(model: Any, ids: list[list[int]]) -> Tensor:
    """Mean over tokens, normalised, as sentence-transformers does: (texts, features)."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out = torch.empty(len(ids), model.config.hidden_size)
    for start in range(0, len(ids), BATCH):
        chosen = order[start : start + BATCH]
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in chosen], batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor([[len(ids[i])] for i in chosen])
        states = model(input_ids=padded, attention_mask=mask.long()).last_hidden_state
        out[chosen] = F.normalize((states * mask[..., None]).sum(1), dim=-1)
    return out


def cost(shape: tuple[int, int, int], grid: list[tuple[int, int, int]], repetitions: int) -> list[dict[str, Any]]:
    """Milliseconds of the attention alone, (batch, heads, features); all take turns. ``num_landmarks`` 0 is exact."""
    (batch, heads, features), cases = shape, []
    for n in COST_LENGTHS:
        x = torch.randn(3, batch, heads, n, features)
        calls: dict[tuple[int, int, int], Any] = {(0, 0, 0): lambda x=x: F.scaled_dot_product_attention(*x)}
        for m, w, p in grid:
            calls[m, w, p] = lambda x=x, m=m, w=w, p=p: nystrom_attention(*x, num_landmarks=m, window=w, pinned=p)
        times: dict[tuple[int, int, int], list[float]] = {key: [] for key in calls}
        for _ in range(repetitions + 1):
            for key, call in calls.items():
                start = time.perf_counter()
                call()
                times[key].append(1e3 * (time.perf_counter() - start))
        for (m, w, p), found in times.items():
            ms = statistics.median(found[1:])
            cases.append({"tokens": n, "num_landmarks": m, "window": w, "pinned": p, "milliseconds": ms})
    return cases


def _load(task: str, folder: str, **sizes: int) -> Any:
    words = ["--task", task, "--data-dir", folder, "--model", "minilm"]
    return data.load(parse(words + [f"--{name.replace('_', '-')}={size}" for name, size in sizes.items()]))


def _classifier(embeddings: Tensor, labels: Tensor) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000, C=10).fit(embeddings.numpy(), labels.numpy())


def _auc(similarity: Tensor, labels: Tensor) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels.numpy(), similarity.numpy()))


def _nearest(queries: Tensor, index: Tensor) -> Tensor:
    return (queries @ index.mT).fill_diagonal_(-2).argmax(-1)


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


if __name__ == "__main__":
    sys.exit(main())
