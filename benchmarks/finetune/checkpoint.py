"""Files that are there whole or not at all, and the checkpoint made of one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from . import UsageError

NAME = "checkpoint.pt"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """``write`` gets the open temporary file. A crash at any point leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: os.replace must not copy
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"{path} must be writable: {error.strerror}; free space or change --output-dir") from error
    finally:
        temporary.unlink(missing_ok=True)


def prepare(folder: Path) -> None:
    """Make ``--output-dir`` and write to it: what can fail early must not fail late."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output-dir must be writable, {folder}: {error.strerror}; choose another") from error
    write_atomically(folder / ".writable", lambda file: None)
    (folder / ".writable").unlink()


def save(folder: Path, state: dict[str, Any]) -> None:
    write_atomically(folder / NAME, lambda file: torch.save(state, file))


def load(folder: Path, config: dict[str, object], fingerprint: str) -> dict[str, Any]:
    """The state that was saved, after a check that it belongs to this configuration and these data."""
    path = folder / NAME
    if not path.exists():
        raise UsageError(f"--resume needs a checkpoint, {path} does not exist; leave out --resume to start one")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        theirs, data, _ = state["config"], state["fingerprint"], state["arms"]
    except Exception as error:  # a damaged file fails in many ways
        raise UsageError(f"{path} must be a checkpoint of this program, it is damaged; leave out --resume") from error
    check_same(theirs, config, data == fingerprint)
    return state


def check_same(theirs: dict[str, object], config: dict[str, object], same_data: bool) -> None:
    """Whether a run may be resumed with this configuration."""
    names = sorted(name for name in {*theirs, *config} if theirs.get(name) != config.get(name))
    if names:
        changed = ", ".join(f"{name} was {theirs.get(name)}, is {config.get(name)}" for name in names)
        raise UsageError(f"--resume needs the options of the first run: {changed}; restore them")
    if not same_data:
        raise UsageError("--resume needs the data of the first run, they were others; restore them")


def begin(args: argparse.Namespace, header: dict[str, Any], arms: Sequence[Any]) -> Callable[[], None]:
    """Puts the arms where the checkpoint left them if ``args.resume`` asks for it; -> what writes the next one."""
    if args.resume:
        state = load(args.output_dir, header["config"], header["fingerprint"])
        for arm in arms:
            arm.restore(state["arms"][arm.name])
        print(f"resuming after step {len(arms[0].losses)}")
    elif (args.output_dir / NAME).exists():
        print(f"starting afresh: replaces the checkpoint in {args.output_dir} (--resume continues from it)")

    def write() -> None:
        save(args.output_dir, {**header, "arms": {arm.name: arm.state() for arm in arms}})

    return write
