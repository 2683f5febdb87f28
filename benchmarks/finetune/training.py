"""Training of all arms in lockstep: step by step on the same batches, so that noise of the machine hits them alike."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import metrics
from .data import PAD, Encoded
from .interrupts import Interrupts

MAX_GRAD_NORM = 1.0


@dataclass
class Arm:
    """One attention: its model and what was measured. ``losses`` and ``seconds`` hold one number per step."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    dev: dict[int, dict[str, float]] = field(default_factory=dict)  # metrics after that many steps

    @staticmethod
    def create(name: str, model: nn.Module, args: argparse.Namespace) -> Arm:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
        return Arm(name, model, optimizer)

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        outputs = self.model(ids, ids == PAD)
        if labels.is_floating_point():
            return nn.functional.mse_loss(outputs.squeeze(1), labels)
        return nn.functional.cross_entropy(outputs, labels)

    def state(self) -> dict[str, Any]:
        measured = {"losses": self.losses, "seconds": self.seconds, "dev": self.dev}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **measured}

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds, self.dev = state["losses"], state["seconds"], state["dev"]


def train(
    arms: list[Arm],
    train_set: Encoded,
    dev_set: Encoded,
    args: argparse.Namespace,
    names: tuple[str, ...],
    interrupts: Interrupts,
    save: Callable[[], None],
) -> None:
    """Train up to the last step, from wherever the arms are. Random numbers depend on seed and step alone."""
    epoch = train_set.steps_per_epoch(args.batch_size)
    total = steps(train_set, args)
    first = len(arms[0].losses)
    with interrupts.deferred(), progress(total, "training", first) as bar, live_log(args, first) as log:
        for step in range(first, total + 1):
            if step == total or (step and step % (args.eval_steps or epoch) == 0):
                evaluate_dev(arms, dev_set, args, names, step, interrupts, save)
                log("dev", {f"{arm.name}/{key}": x for arm in arms for key, x in arm.dev[step].items()}, step)
            if step == total:
                break
            batch = train_set.training_batch(step, args.batch_size, args.seed)
            for arm in arms:
                schedule(arm.optimizer, step, total, args.learning_rate, args.warmup_steps)
                train_step(arm, *batch, step, args)
            log("loss", {arm.name: arm.losses[-1] for arm in arms}, step + 1)
            if interrupts.pending or (step + 1) % args.checkpoint_every == 0:
                save()
            interrupts.check()
            bar.set_postfix({arm.name: f"{arm.losses[-1]:.3f}" for arm in arms}, refresh=False)
            bar.update()


def steps(train_set: Encoded, args: argparse.Namespace) -> int:
    return args.max_steps or args.epochs * train_set.steps_per_epoch(args.batch_size)


def train_step(arm: Arm, ids: Tensor, labels: Tensor, step: int, args: argparse.Namespace) -> None:
    """Forward, backward and optimizer on ids (B, n), labels (B,); appends loss and seconds."""
    ids, labels = ids.to(args.device), labels.to(args.device)
    arm.model.train()
    torch.manual_seed((args.seed << 32) + step)  # dropout: alike in all arms, and after a resume
    _wait(ids)
    start = time.perf_counter()
    arm.optimizer.zero_grad()
    loss = arm.loss(ids, labels)
    loss.backward()
    nn.utils.clip_grad_norm_(arm.model.parameters(), MAX_GRAD_NORM)
    arm.optimizer.step()
    _wait(ids)
    arm.seconds.append(time.perf_counter() - start)
    arm.losses.append(loss.item())


def schedule(optimizer: torch.optim.Optimizer, step: int, total: int, peak: float, warm_up: float) -> None:
    """Linear rise, linear fall; a function of the step, so there is no scheduler to save."""
    warm_up = max(1, round(warm_up * total if warm_up < 1 else warm_up))
    for group in optimizer.param_groups:
        group["lr"] = peak * min((step + 1) / warm_up, (total - step) / max(1, total - warm_up))


def evaluate_dev(
    arms: list[Arm],
    data: Encoded,
    args: argparse.Namespace,
    names: tuple[str, ...],
    step: int,
    interrupts: Interrupts,
    save: Callable[[], None],
) -> None:
    """Saves before, as a signal need not wait for an evaluation, and after."""
    missing = [arm for arm in arms if step not in arm.dev]
    if missing:
        save()
        with interrupts.deferred(False):
            for arm in missing:
                arm.dev[step] = evaluate(arm, data, args, names, f"dev, {arm.name}")
        save()


def evaluate(arm: Arm, data: Encoded, args: argparse.Namespace, names: tuple[str, ...], title: str) -> dict[str, float]:
    return metrics.score(names, outputs(arm, data, args, title), data.labels)


@torch.no_grad()
def outputs(arm: Arm, data: Encoded, args: argparse.Namespace, title: str) -> Tensor:
    """(examples, labels), in the order of the examples."""
    arm.model.eval()
    torch.manual_seed(args.seed)  # the Reformer draws its hashes
    # torch's fused layer, for softmax only: (n, n) weights, slow at 1024
    torch.backends.mha.set_fastpath_enabled(False)
    found: list[Tensor] = []
    batches = data.evaluation_batches(args.eval_batch_size)
    with progress(len(data), title) as bar:
        for indices in batches:
            ids = data.batch(indices)[0].to(args.device)
            found.append(arm.model(ids, ids == PAD).float().cpu())
            bar.update(len(indices))
    order = torch.tensor([index for indices in batches for index in indices])
    return torch.cat(found)[order.argsort()]


@contextlib.contextmanager
def live_log(args: argparse.Namespace, first: int) -> Iterator[Callable[[str, dict[str, float], int], None]]:
    """log(title, values, step), for TensorBoard or for nobody."""
    if args.report_to == "none":
        yield lambda title, values, step: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(args.output_dir / "tensorboard", purge_step=first) as writer:

        def log(title: str, values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(f"{title}/{name}", value, step)

        yield log


def progress(total: int, title: str, initial: int = 0) -> tqdm[None]:
    interval = 0.1 if sys.stderr.isatty() else 10.0  # few lines in a log
    return tqdm(total=total, desc=title, initial=initial, mininterval=interval, leave=title == "training")


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
