"""The command line. Names follow run_glue.py and TrainingArguments where these have the option."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

from . import UsageError
from .data import TASKS
from .model import ATTENTIONS

# For a model from scratch; PRETRAINED and TASK_DEFAULTS say where others differ.
DEFAULTS: dict[str, Any] = {
    "task": None, "data_dir": None, "train_file": None, "validation_file": None, "test_file": None,
    "dataset_name": None, "dataset_config_name": None, "max_train": None, "max_test": None, "max_length": 1024,
    "vocab_size": 8192, "write_data": None,
    "model": "scratch", "attention": ["softmax", "nystrom"], "num_landmarks": 64, "window": 0, "pinned": 0,
    "include": None, "exclude": None, "extend_positions": "tile",
    "d_model": 64, "layers": 2, "heads": 2, "feedforward": 128, "dropout": 0.0, "max_positions": 4096,
    "conv_kernel_size": None, "linformer_k": 256, "performer_features": 256, "reformer_hashes": 2,
    "epochs": 1, "max_steps": None, "batch_size": 16, "eval_batch_size": 16, "learning_rate": 3e-3,
    "weight_decay": 0.01, "warmup_steps": 0.1, "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
    "attention_dropout": None, "bf16": False, "seed": 0, "threads": None, "device": "cpu",
    "output_dir": Path("runs/finetune"), "checkpoint_every": 50, "eval_steps": None, "resume": False,
    "report_to": "none", "dry_run": False, "do_predict": False, "save_model": False,
}  # fmt: skip
# run_glue.py's usual values.
PRETRAINED = {"max_length": 128, "epochs": 3, "batch_size": 32, "eval_batch_size": 32, "learning_rate": 2e-5}
# Long-Range Arena: the Nyströmformer paper's settings, warm-up as a share of the steps.
_LRA = {"dropout": 0.1, "learning_rate": 1e-4, "weight_decay": 0.0, "conv_kernel_size": 35, "batch_size": 32}
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "lra-listops": _LRA | {"max_length": 2000, "max_steps": 5000, "warmup_steps": 0.2},
    "lra-text": _LRA | {"max_length": 4000, "max_steps": 20000, "warmup_steps": 0.4},
    "lra-retrieval": _LRA | {"max_length": 4000, "max_steps": 30000, "warmup_steps": 0.8 / 30},
    "lra-image": _LRA | {"max_length": 1024, "max_steps": 35000, "warmup_steps": 0.005, "batch_size": 256},
    "lra-pathfinder": _LRA | {"max_length": 1024, "max_steps": 62400, "warmup_steps": 0.005, "batch_size": 256},
}
PRETRAINED_TASKS = {"imdb": {"max_length": 512, "batch_size": 16, "epochs": 1}}

POSITIVE = (
    "num_landmarks", "max_length", "max_positions", "epochs", "max_steps", "batch_size", "eval_batch_size",
    "learning_rate", "d_model", "layers", "heads", "feedforward", "vocab_size", "threads", "checkpoint_every",
    "max_train", "max_test", "linformer_k", "performer_features", "reformer_hashes",
    "gradient_accumulation_steps", "eval_steps",
)  # fmt: skip
NOT_NEGATIVE = ("conv_kernel_size", "window", "pinned", "weight_decay", "warmup_steps")
# What may differ between an interrupted run and the run that resumes it.
FREE = (
    "data_dir", "output_dir", "resume", "checkpoint_every", "eval_batch_size", "write_data", "report_to", "dry_run",
    "do_predict", "save_model",
)  # fmt: skip
SCRATCH_ONLY = (
    "d_model", "layers", "heads", "feedforward", "dropout", "max_positions", "vocab_size", "conv_kernel_size",
    "linformer_k", "performer_features", "reformer_hashes",
)  # fmt: skip
PRETRAINED_ONLY = (
    "extend_positions", "gradient_accumulation_steps", "gradient_checkpointing", "bf16", "save_model",
    "attention_dropout",
)  # fmt: skip
GENERATED = ("synthetic", "lra-listops")  # tasks that need no data


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of ending the program."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the options")


class _Formatter(argparse.HelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = DEFAULTS.get(action.dest)
        if default is None or default is False:
            return action.help
        changed = "" if PRETRAINED.get(action.dest, default) == default else f", pretrained: {PRETRAINED[action.dest]}"
        return f"{action.help} (default: {' '.join(default) if isinstance(default, list) else default}{changed})"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check; raises UsageError on bad values."""
    given = vars(_build().parse_args(normalised(sys.argv[1:] if argv is None else argv)))
    if "task" not in given:
        given["task"] = (
            "hub" if "dataset_name" in given
            else "files" if "train_file" in given
            else "imdb" if "data_dir" in given
            else "synthetic"
        )  # fmt: skip
    args = argparse.Namespace(**_defaults(given["task"], given.get("model", "scratch")) | given)
    _check(args, given)
    return args


def config(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide the result; all of them plain values."""
    values = {name: value for name, value in sorted(vars(args).items()) if name not in FREE}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def command_line(args: argparse.Namespace) -> str:
    """Arguments that give the same results; the place of the data is left to the reader."""
    words: list[str] = []
    defaults = _defaults(args.task, args.model)
    for name, value in config(args).items():
        if value != defaults[name]:
            words += [
                _flag(name),
                *(map(str, value) if isinstance(value, list) else [] if value is True else [str(value)]),
            ]
    if args.data_dir is not None:
        words += ["--data-dir", args.data_dir.name]
    return shlex.join(words)


def _defaults(task: str, model: str) -> dict[str, Any]:
    if model == "scratch":
        return DEFAULTS | TASK_DEFAULTS.get(task, {})
    return DEFAULTS | PRETRAINED | PRETRAINED_TASKS.get(task, {})


def _build() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks.finetune",
        description="Train and evaluate a text classifier with softmax and with Nyström attention, side by side.",
        formatter_class=_Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument_group("data").add_argument
    add("--task", "--task-name", choices=sorted(TASKS), help="default: imdb with --data-dir, synthetic without")
    add("--data-dir", type=Path, help="data set folder, or a tar archive of it (read in place)")
    add(
        "--train-file",
        type=Path,
        help="CSV, TSV, JSON or parquet, for --task files: column label, and one or two texts",
    )
    add("--validation-file", type=Path, help="as --train-file")
    add("--test-file", type=Path, help="as --train-file; without labels it is what --do-predict predicts")
    add("--dataset-name", help="a data set of the Hub or the local cache, for --task hub")
    add("--dataset-config-name", help="its configuration")
    add("--max-train", "--max-train-samples", type=int, help="use a random subset of this size, classes in proportion")
    add("--max-test", "--max-eval-samples", type=int, help="as --max-train, for what the model is evaluated on")
    add("--max-length", "--max-seq-length", type=int, help="tokens kept of each text")
    add("--vocab-size", type=int, help="words the tokenizer learns from the training texts")
    add("--write-data", "--write-synthetic", dest="write_data", type=Path, metavar="DIR",
        help="write what --task synthetic or lra-listops generates in its usual file format, and stop")  # fmt: skip

    add = parser.add_argument_group("model").add_argument
    add("--model", "--model-name-or-path", help="scratch, minilm, or a Hugging Face model: folder, or name on the Hub")
    add("--attention", nargs="+", choices=ATTENTIONS, help="arms to compare")
    add("--num-landmarks", type=int, help="landmarks of the Nyström arm")
    add("--window", type=int, help="exact window of the Nyström arm")
    add("--pinned", type=int, help="pinned tokens of the Nyström arm")
    add("--include", nargs="+", metavar="GLOB", help="names of the attention modules to convert; others stay exact")
    add("--exclude", nargs="+", metavar="GLOB", help="names of the attention modules to leave exact")
    add("--extend-positions", choices=("tile", "interpolate"), help="when --max-length exceeds a pretrained table")
    add("--d-model", type=int, help="features per token")
    add("--layers", type=int, help="encoder layers")
    add("--heads", type=int, help="attention heads")
    add("--feedforward", type=int, help="hidden features of the feed-forward block")
    add("--dropout", type=float, help="dropout probability")
    add("--max-positions", type=int, help="rows of the position table, the limit for --max-length")
    add("--conv-kernel-size", type=int, help="taps of the Nyström arm's convolution; 35 in Long-Range Arena tasks")
    add("--linformer-k", type=int, help="projected length of the Linformer arm")
    add("--performer-features", type=int, help="random features of the Performer arm")
    add("--reformer-hashes", type=int, help="hashing rounds of the Reformer arm")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", "--num-train-epochs", type=int, help="passes over the training texts")
    add("--max-steps", type=int, help="optimizer steps; overrides --epochs")
    add("--batch-size", "--per-device-train-batch-size", type=int, help="texts per step")
    add("--eval-batch-size", "--per-device-eval-batch-size", type=int, help="texts per evaluation batch")
    add("--learning-rate", type=float, help="peak of the schedule: linear warm-up, linear decay")
    add("--weight-decay", type=float, help="AdamW weight decay")
    add("--warmup-steps", type=float, help="steps, or below 1 the share of the steps, in which the learning rate rises")
    add("--gradient-accumulation-steps", type=int, help="batches per optimizer step")
    add("--gradient-checkpointing", action="store_true", help="compute activations twice to save memory")
    add("--attention-dropout", type=float, help="the model's own if left out; 0 lets softmax run fused")
    add("--bf16", action="store_true", help="bfloat16 autocast")
    add("--seed", type=int, help="decides data, initial values, batches and dropout")
    add("--threads", type=int, help="CPU threads; default: torch's choice")
    add("--device", help="cpu, cuda, cuda:1, ...")

    add = parser.add_argument_group("output").add_argument
    add("--output-dir", type=Path, help="gets results, figure, tokenizer, checkpoint")
    add("--checkpoint-every", "--save-steps", type=int, help="steps between checkpoints")
    add("--eval-steps", type=int, help="steps between evaluations on dev; default: an epoch")
    add("--resume", action="store_true", help="continue from the checkpoint in --output-dir")
    add("--report-to", choices=("none", "tensorboard"), help="a live log besides the progress bar")
    add("--do-predict", action="store_true", help="write predictions for the unlabelled test split")
    add("--save-model", action="store_true", help="keep the fine-tuned models, for from_pretrained")
    add("--dry-run", action="store_true", help="read everything, time one step on the longest texts, write nothing")
    return parser


def _check(args: argparse.Namespace, given: dict[str, Any]) -> None:
    for name in (*POSITIVE, *NOT_NEGATIVE):
        value = getattr(args, name)
        if name in POSITIVE and value is not None and not value > 0:
            raise UsageError(f"{_flag(name)} must be greater than 0, got {value}; leave it out for the default")
        if name in NOT_NEGATIVE and value is not None and not value >= 0:
            raise UsageError(f"{_flag(name)} must not be negative, got {value}; leave it out for the default")
    scratch = args.model == "scratch"
    for name in PRETRAINED_ONLY if scratch else SCRATCH_ONLY:
        if name in given:
            way = "a Hugging Face --model" if scratch else "--model scratch"
            raise UsageError(f"{_flag(name)} needs {way}, got --model {args.model}; leave one of them out")
    if scratch and args.max_length > args.max_positions:
        raise UsageError(
            f"--max-length must not exceed the position table, got {args.max_length} > {args.max_positions}; "
            "lower --max-length or raise --max-positions"
        )
    if args.d_model % args.heads:
        raise UsageError(f"--d-model must be divisible by --heads, got {args.d_model} and {args.heads}; change one")
    for name in ("dropout", "attention_dropout"):
        if (p := getattr(args, name)) is not None and not 0 <= p < 1:
            raise UsageError(f"{_flag(name)} must be in [0, 1), got {p}; 0 switches it off")
    if args.warmup_steps >= 1 and not args.warmup_steps.is_integer():
        raise UsageError(f"--warmup-steps must be whole or a share below 1, got {args.warmup_steps}; round it")
    if not 0 <= args.seed < 2**31:
        raise UsageError(f"--seed must be in [0, 2**31), got {args.seed}; choose a smaller one")
    if len(set(args.attention)) < len(args.attention):
        raise UsageError(f"--attention must not repeat, got {' '.join(args.attention)}; name each once")
    others = sorted({*args.attention} - {"softmax", "nystrom"})
    if others and not scratch:
        raise UsageError(f"--attention {others[0]} needs --model scratch, got --model {args.model}; leave it out")
    if not scratch and args.device not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu or cuda for a Hugging Face model, got {args.device}; change one")
    if args.task.startswith("lra-") and not scratch:
        raise UsageError(f"--task {args.task} needs --model scratch, whose tokens are its own; leave --model out")
    if args.write_data and args.task not in GENERATED:
        raise UsageError(f"--write-data needs --task {' or '.join(GENERATED)}, got {args.task}; change one")
    _check_source(args)


def _check_source(args: argparse.Namespace) -> None:
    source = {"files": "train_file", "hub": "dataset_name"}.get(args.task, "data_dir")
    for name in ("data_dir", "train_file", "dataset_name"):
        there = getattr(args, name) is not None
        optional = name == source and args.task == "lra-listops"
        if not optional and there != (name == source and args.task != "synthetic"):
            rule = "takes no" if there else "needs"
            raise UsageError(f"--task {args.task} {rule} {_flag(name)}, got {getattr(args, name)}; change one")


def normalised(argv: list[str]) -> list[str]:
    """``--max_train_samples`` is ``--max-train-samples``, as for Hugging Face's scripts."""
    return [re.sub(r"^--[^=]*", lambda found: found[0].replace("_", "-"), argument) for argument in argv]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
