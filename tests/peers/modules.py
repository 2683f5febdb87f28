"""nystrom-attention's class beside compat's class of that name and beside itself after ``convert_``, as a table."""

from __future__ import annotations

import copy
from importlib.metadata import version

import torch
from rich.table import Table
from torch import Tensor, nn

from nystrom_ext import convert_
from nystrom_ext.compat.lucidrains import NystromAttention

DIM, HEADS, WIDTH, M = 32, 4, 16, 16


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def checkpoints(ours: nn.Module, theirs: nn.Module) -> str:
    """Loads strictly both ways."""
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    same = list(ours.state_dict()) == list(theirs.state_dict())
    return "both ways" if same else "other names"


def row(name: str, n: int, masked: bool) -> tuple[str, ...]:
    """Largest relative differences of a module's output, of all gradients, of the first token's row."""
    from nystrom_attention import NystromAttention as Package

    torch.manual_seed(0)
    theirs = Package(DIM, WIDTH, HEADS, num_landmarks=M).double()
    if name == "convert_":
        ours = copy.deepcopy(theirs)
        convert_(ours)
    else:
        ours = NystromAttention(DIM, WIDTH, HEADS, num_landmarks=M).double()
    loading = checkpoints(ours, theirs)
    x = (3 * torch.randn(2, n, DIM, dtype=torch.float64)).requires_grad_()
    mask = torch.rand(2, n) < 0.8 if masked else None
    results = []
    for module in (ours, theirs):
        out = module(x, mask=mask)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append((out, *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()])))
    out, *gradients = (relative(a, b) for a, b in zip(*results, strict=True))
    first = theirs(x, mask=mask, return_attn=True)[1][:, :, -n, -n:]
    found = relative(ours.attention_rows(x, [0], mask=mask)[:, :, 0], first)
    numbers = (f"{difference:.0e}".replace("0e+00", "0") for difference in (out, max(gradients), found))
    return name, f"{n}", "mask" if masked else "", *numbers, loading


@torch.enable_grad()
@torch.random.fork_rng(devices=[])
def table() -> Table:
    """ImportError without the package."""
    title = f"nystrom-attention {version('nystrom-attention')}'s module (float64, largest relative difference)"
    made = Table(title=title)
    for column in ("ours", "tokens", "", "output", "gradients", "first row", "state_dict"):
        made.add_column(column, justify="left" if column in ("ours", "", "state_dict") else "right")
    for name in ("compat", "convert_"):
        for n, masked in ((256, False), (250, False), (250, True), (10, False)):
            made.add_row(*row(name, n, masked))
        made.add_section()
    return made
