"""Hugging Face's Trainer with times, one progress bar, and signals that wait."""

from __future__ import annotations

import time
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import TrainerCallback

from . import metrics
from .interrupts import Interrupts
from .training import progress


class TimedTrainer(Trainer):
    """Adds the seconds of the step to what is logged about it."""

    watch: Watch | None = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.watch:
            logs["seconds"] = self.watch.seconds
        super().log(logs, start_time)


class Watch(TrainerCallback):
    """Progress bar, time per step, and signals, which wait for the end of a step and a checkpoint."""

    def __init__(self, interrupts: Interrupts, name: str, total: int) -> None:
        self.interrupts, self.name, self.total = interrupts, name, total
        self.seconds = self._start = 0.0
        self._bar: Any = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = progress(self.total, f"training, {self.name}", state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self._start
        self._bar.update()
        control.should_evaluate |= state.global_step >= state.max_steps
        if self.interrupts.pending:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        kept = {key.removeprefix("eval_"): x for key, x in (logs or {}).items() if key == "loss" or "eval_" in key}
        self._shown |= {key: f"{x:.3f}" for key, x in kept.items() if key in ("loss", *metrics.NAMES)}
        self._bar.set_postfix(self._shown, refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
