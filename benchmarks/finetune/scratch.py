"""A model from scratch: an nn.TransformerEncoder, all arms in lockstep."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from . import checkpoint, data, memory, model, training
from .arguments import config
from .interrupts import Interrupts
from .splits import Example, Splits


class Job:
    """One run: data as token numbers, and what to do with them."""

    def __init__(self, args: argparse.Namespace, splits: Splits) -> None:
        self.args, self.splits = args, splits
        self.tokenizer = None
        if splits.tokens != "bytes":
            self.tokenizer = data.train_tokenizer([text for text, _ in splits.train], args.vocab_size, splits.tokens)
        self.sets = {
            name: data.Encoded(getattr(splits, name), self.tokenizer, args.max_length)
            for name in ("train", "dev", "test")
        }
        self.lengths = sorted(self.sets["train"].lengths)
        self.vocab = self.tokenizer.get_vocab_size() if self.tokenizer else data.BYTES
        self.shape = (self.vocab, max(1, len(splits.labels)), len(self.sets["train"].ids[0]) > 1)
        self.steps = training.steps(self.sets["train"], args)

    def arm(self, name: str) -> training.Arm:
        return training.Arm.create(name, model.build(self.args, name, *self.shape), self.args)

    def trial(self, name: str) -> float:
        """Seconds of a training step on the longest texts."""
        arm, train = self.arm(name), self.sets["train"]
        longest = sorted(range(len(train)), key=lambda i: train.lengths[i])[-self.args.batch_size :]
        for step in range(2):  # the first one also loads and allocates
            training.train_step(arm, *train.batch(longest), step, self.args)
        return arm.seconds[-1]

    def run(self, interrupts: Interrupts) -> dict[str, Any]:
        """Train and evaluate; the results of each arm."""
        args, sets = self.args, self.sets
        if self.tokenizer:
            text = self.tokenizer.to_str(pretty=True)
            checkpoint.write_atomically(args.output_dir / "tokenizer.json", lambda file: file.write(text.encode()))
        arms = [self.arm(name) for name in args.attention]
        header: dict[str, Any] = {"config": config(args), "fingerprint": self.splits.fingerprint()}
        save = checkpoint.begin(args, header, arms)

        training.train(arms, sets["train"], sets["dev"], args, self.splits.metrics, interrupts, save)
        return {arm.name: self._result(arm) for arm in arms}

    def predict(self, name: str, split: str) -> torch.Tensor:
        """Outputs for an unlabelled split, from the checkpoint of the finished run."""
        arm = self.arm(name)
        arm.restore(torch.load(self.args.output_dir / checkpoint.NAME, weights_only=True)["arms"][name])
        texts: list[Example] = [(text, 0) for text in self.splits.unlabelled[split]]
        encoded = data.Encoded(texts, self.tokenizer, self.args.max_length)
        return training.outputs(arm, encoded, self.args, f"{split}, {name}")

    def _result(self, arm: training.Arm) -> dict[str, Any]:
        args, names = self.args, self.splits.metrics
        start = time.perf_counter()
        test = training.evaluate(arm, self.sets["test"], args, names, f"test, {arm.name}")
        seconds = time.perf_counter() - start
        further = {
            name: training.evaluate(arm, data.Encoded(examples, self.tokenizer, args.max_length), args, names, name)
            for name, examples in self.splits.further.items()
        }
        return {
            "parameters": sum(p.numel() for p in arm.model.parameters()),
            "test": test,
            "further": further,
            "test_seconds": seconds,
            "dev": {str(step): values for step, values in arm.dev.items()},
            "median_seconds_per_step": statistics.median(arm.seconds),
            "peak_memory_bytes": memory.measure(args, arm.name, *self.shape),
            "losses": arm.losses,
            "seconds": arm.seconds,
        }
