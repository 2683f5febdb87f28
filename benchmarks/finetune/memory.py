"""Peak memory, of a training step in the first place, measured in a fresh process so that nothing else is counted."""

from __future__ import annotations

import argparse
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

LABEL = (
    "rise of the resident memory during two training steps on a full batch at full length, in a process of its own "
    "(CUDA: peak allocated memory)"
)


def exhausted(error: BaseException) -> bool:
    """Whether the error says that memory did not suffice."""
    import torch

    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def measure(args: argparse.Namespace, attention: str, vocab: int, labels: int, dual: bool) -> int | None:
    """Bytes, or None where the system does not tell or the process dies."""
    return peak(args.device, _training, args, attention, vocab, labels, dual)


def peak(device: str, prepare: Callable[..., Callable[[], object]], *args: object) -> int | None:
    """Bytes by which memory rises while the function that ``prepare(*args)`` returns runs, in a fresh process.

    None where the system does not tell or the process dies.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, device, prepare, args))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: on Ctrl-C the child must not print a traceback
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    sender.close()
    try:
        result: int | None = receiver.recv()
    except EOFError:
        result = None
    finally:
        process.kill()  # it is done, or this process was interrupted
        process.join()
    return result


def _child(
    sender: Connection, device: str, prepare: Callable[..., Callable[[], object]], args: tuple[object, ...]
) -> None:
    run = prepare(*args)
    before = _start(device)
    kept = run()  # what it returns is memory too
    sender.send(None if before is None else _peak(device) - before)
    del kept


def _training(args: argparse.Namespace, attention: str, vocab: int, labels: int, dual: bool) -> Callable[[], None]:
    import torch

    from .model import build
    from .training import Arm, train_step

    if args.threads:
        torch.set_num_threads(args.threads)
    arm = Arm.create(attention, build(args, attention, vocab, labels, dual), args)
    shape = (args.batch_size, *([2] if dual else []), args.max_length)
    ids = torch.randint(1, vocab, shape, dtype=torch.int32)
    targets = torch.zeros(args.batch_size, dtype=torch.long if labels > 1 else torch.float)
    # Gradients of a tiny batch load the libraries, which are not memory of the step.
    arm.loss(ids[:1, ..., :8], targets[:1]).backward()
    arm.optimizer.zero_grad()

    def steps() -> None:
        for step in range(2):
            train_step(arm, ids, targets, step, args)

    return steps


def _start(device: str) -> int | None:
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # restarts VmHWM from the present size
        return _status("VmRSS")
    except OSError:
        return None


def _peak(device: str) -> int:
    import torch

    # Not getrusage: its ru_maxrss also remembers the process that started this one.
    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field}")
