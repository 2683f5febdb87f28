"""Training of all arms in lockstep on the same bags, and their test."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.finetune import training
from benchmarks.finetune.interrupts import Interrupts
from benchmarks.finetune.training import progress, schedule, train_step
from benchmarks.speed.memory import return_freed_memory

from .bags import FEATURES, Bags
from .model import build


@dataclass
class Arm(training.Arm):
    """One attention: its model, what was measured, and with which probability test bags are positive."""

    scores: list[float] = field(default_factory=list)

    @staticmethod
    def of(args: argparse.Namespace, name: str) -> Arm:
        return Arm(**vars(training.Arm.create(name, build(args, name), args)))

    def loss(self, bags: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(bags), labels)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "scores": self.scores}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.scores = state["scores"]


def train(
    arms: list[Arm], bags: Bags, args: argparse.Namespace, interrupts: Interrupts, save: Callable[[], None]
) -> None:
    """Up to the last step, from wherever the arms are. Random numbers depend on seed and step alone."""
    first = len(arms[0].losses)
    with interrupts.deferred(), progress(args.steps, "training", first) as bar:
        for step in range(first, args.steps):
            bag = bags.bag("train", step)
            for arm in arms:
                schedule(arm.optimizer, step, args.steps, args.learning_rate, args.warmup_steps)
                train_step(arm, bag.instances, bag.label, step, args)
            if interrupts.pending or (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
                save()
            interrupts.check()
            bar.set_postfix({arm.name: f"{arm.losses[-1]:.3f}" for arm in arms}, refresh=False)
            bar.update()


@torch.no_grad()
def test(
    arms: list[Arm], bags: Bags, args: argparse.Namespace, interrupts: Interrupts, save: Callable[[], None]
) -> None:
    """Bags that are not yet scored."""
    first = len(arms[0].scores)
    with interrupts.deferred(), progress(args.test_bags, "test", first) as bar:
        for number in range(first, args.test_bags):
            bag = bags.bag("test", number)
            for arm in arms:
                arm.scores.append(arm.model.eval()(bag.instances.to(args.device)).softmax(-1)[0, 1].item())
            if interrupts.pending or number + 1 == args.test_bags:
                save()
            interrupts.check()
            bar.update()


def auc(scores: list[float]) -> float:
    """Area under the ROC curve of the test bags' scores, every other of which is positive."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score([number % 2 for number in range(len(scores))], scores))


def two_steps(args: argparse.Namespace, name: str) -> Callable[[], None]:
    """Two training steps on a bag of the largest size, in a process of its own, whose memory is measured."""
    return_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    arm, n = Arm.of(args, name), args.instances[-1]
    bag, label = torch.randn(1, n, FEATURES), torch.zeros(1, dtype=torch.long)
    arm.loss(bag[:, : 2 * args.num_landmarks].to(args.device), label.to(args.device)).backward()  # loads the libraries
    arm.optimizer.zero_grad()

    def steps() -> None:
        for step in range(2):
            train_step(arm, bag, label, step, args)

    return steps
