"""``python -m benchmarks.finetune.study --data DIR``: the runs behind the published table, one process after another.

Finished runs are skipped and interrupted ones resumed, so the same command continues a study that was stopped.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from . import UsageError, compare
from .arguments import Parser

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# One run per setting and seed. Equal seeds begin with equal weights and see equal batches.
SETTINGS = {
    "softmax": "--attention softmax",
    "m64": "--attention nystrom --num-landmarks 64",
    "m32": "--attention nystrom --num-landmarks 32",
    "m64-w16-p1": "--attention nystrom --num-landmarks 64 --window 16 --pinned 1",
    "m32-w16-p1": "--attention nystrom --num-landmarks 32 --window 16 --pinned 1",
}
PUBLISHED = tuple(SETTINGS)
RATES = ("2e-5", "1e-4", "3e-4")
GUIDE = (*(f"{arm}-{rate}" for arm in ("softmax", "m32") for rate in RATES), "m32-late", "m32-cold", "m32-warm")
SETTINGS |= {
    "rivals": "--attention linformer performer reformer",
    "m64-no-convolution": SETTINGS["m64"] + " --conv-kernel-size 0",
    "m32-late": SETTINGS["m32"] + " --learning-rate 1e-4 --include '*.layer.[345].*'",
    "m32-cold": SETTINGS["m32"] + " --learning-rate 1e-4 --warmup-steps 0",
    "m32-warm": SETTINGS["m32"] + " --learning-rate 1e-4 --warmup-steps 0.3",
    **{f"{arm}-{rate}": f"{SETTINGS[arm]} --learning-rate {rate}" for arm in ("softmax", "m32") for rate in RATES},
}


@dataclass(frozen=True)
class Experiment:
    """``{glue}`` and ``{imdb}`` in ``options`` are the data sets; one run per setting and seed."""

    options: str
    settings: tuple[str, ...] = PUBLISHED


FROM_SCRATCH = ("softmax", "m64", "m64-w16-p1", "rivals")
PRETRAINED = "--model minilm --learning-rate 1e-4 --bf16"
# Without attention dropout: with it, softmax attention leaves torch's fused path.
IMDB_1024 = (
    f"--task imdb --data-dir {{imdb}} {PRETRAINED} --max-length 1024 --max-train 600 --max-test 400 --batch-size 8 "
    "--attention-dropout 0"
)
IMDB_256 = (
    "--task imdb --data-dir {imdb} --model minilm --bf16 --attention-dropout 0 --max-length 256 --max-train 1000 "
    "--max-test 1000 --batch-size 8"
)
TEXT = (
    "--task lra-text --data-dir {imdb} --max-length 1024 --max-train 8000 --max-test 1000 --max-steps 300 "
    "--batch-size 16 --learning-rate 1e-3 --dropout 0 --eval-steps 150"
)
EXPERIMENTS = {
    "mrpc": Experiment(f"--task mrpc --data-dir {{glue}} {PRETRAINED} --epochs 2 --batch-size 16"),
    "sst2": Experiment(f"--task sst2 --data-dir {{glue}} {PRETRAINED} --max-train 4000 --epochs 1 --batch-size 16"),
    "imdb-512": Experiment(
        f"--task imdb --data-dir {{imdb}} {PRETRAINED} --max-length 512 --max-train 1000 --max-test 1000 --batch-size 8"
    ),
    "imdb-1024": Experiment(IMDB_1024),
    # Why plain Nyström attention lacks more there than at 512 tokens: too few steps, the length, or the dropout?
    "imdb-1024-longer": Experiment(f"{IMDB_1024} --epochs 2", ("softmax", "m64", "m64-w16-p1")),
    "imdb-1024-cut": Experiment(f"{IMDB_1024} --max-length 512", ("softmax", "m64")),
    "imdb-1024-dropout": Experiment(f"{IMDB_1024} --attention-dropout 0.1", ("m64",)),
    "listops": Experiment(
        "--task lra-listops --max-train 6000 --max-test 500 --max-steps 750 --batch-size 8 "
        "--learning-rate 1e-3 --dropout 0 --eval-steps 250",
        (*FROM_SCRATCH, "m64-no-convolution"),
    ),
    "text": Experiment(TEXT, (*FROM_SCRATCH, "m64-no-convolution")),
    "synthetic": Experiment(
        "--task synthetic --max-length 2048 --max-train 2000 --max-test 400 --max-steps 400 "
        "--batch-size 8 --learning-rate 3e-3 --eval-steps 100",
        FROM_SCRATCH,
    ),
    # For the guide: the learning rate, warm-up and the first layers after a swap.
    "guide": Experiment(IMDB_256, GUIDE),
}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.finetune.study", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with glue.tar.xz or glue, and aclImdb.tar.xz or aclImdb")
    add("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    add("--settings", nargs="+", help="only these settings, for example softmax m32 m64")
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--threads", type=int, default=1)
    add("--output", type=Path, default=Path("runs/study"))
    add("--list", action="store_true", help="print the commands and stop")
    add("--extra", default="", help="options added to every run, for example '--max-steps 5' to try the study out")
    try:
        args = parser.parse_args(argv)
        plan = commands(args)
        if args.list:
            print("\n".join(shlex.join(["python", *words[1:]]) for words in plan.values()))
            return 0
        return run(args, plan)
    except UsageError as error:
        print("error:", error, file=sys.stderr)
        return 2


def commands(args: argparse.Namespace) -> dict[Path, list[str]]:
    """Folder of each run -> its command; the first seed of everything comes first."""
    data = {"glue": data_set(args.data, "glue"), "imdb": data_set(args.data, "aclImdb")}
    plan: dict[Path, list[str]] = {}
    for seed in args.seeds:
        for name in args.experiments:
            experiment = EXPERIMENTS[name]
            for setting in experiment.settings:
                if args.settings and setting not in args.settings:
                    continue
                folder = args.output / name / f"{setting}-seed{seed}"
                options = shlex.split(experiment.options.format(**data)) + shlex.split(SETTINGS[setting])
                options += ["--seed", str(seed), "--threads", str(args.threads), "--output-dir", str(folder)]
                plan[folder] = [sys.executable, "-m", "benchmarks.finetune", *options, *shlex.split(args.extra)]
    return plan


def run(args: argparse.Namespace, plan: dict[Path, list[str]]) -> int:
    """The exit status: 1 when a run failed. The others still run, and the table holds what is there."""
    failed = []
    for place, (folder, words) in enumerate(plan.items(), 1):
        if (folder / "results.json").exists():
            continue
        begun = any((folder / name).exists() for name in ("checkpoint.pt", "run.json"))
        print(f"[{place}/{len(plan)}] {time.strftime('%H:%M')} {folder.relative_to(args.output)}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "ab") as log:
            status = _call([*words, *(["--resume"] if begun else [])], log)
        number = -status if status < 0 else status - 128  # a signal ended the run, or the run says so
        if number in SIGNALS:
            print("interrupted; run the same command to continue", file=sys.stderr)
            return 128 + number
        if status:
            failed.append(folder)
            lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
            print(f"failed with status {status}: {lines[-1] if lines else 'no output'}", file=sys.stderr)
    if any((folder / "results.json").exists() for folder in plan):
        compare.main([str(args.output), "--output", str(args.output / "comparison")])
    return 1 if failed else 0


def _call(words: list[str], log: BinaryIO) -> int:
    """The exit status. Signals go on to the run, which saves a checkpoint, and are waited for."""
    # In a session of its own, or Ctrl-C would reach it twice, and the second signal does not wait for the step.
    process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    previous = [signal.signal(number, lambda number, frame: process.send_signal(number)) for number in SIGNALS]
    try:
        return process.wait()
    finally:
        for number, handler in zip(SIGNALS, previous, strict=True):
            signal.signal(number, handler)


def data_set(folder: Path, name: str) -> str:
    found = [path for path in (folder / name, folder / f"{name}.tar.xz", folder / f"{name}.tar.gz") if path.exists()]
    if not found:
        raise UsageError(f"--data must hold {name} or {name}.tar.xz, {folder} does not; get the data set")
    return str(found[0])


if __name__ == "__main__":
    sys.exit(main())
