"""``python -m tests.peers``: how closely nystrom_ext computes what other implementations compute, as a table.

The peer is the installed package where pip has one, else the formula in `formulas.py`. Numbers are the largest
differences relative to the largest value, in float64: of the fused operator, where compat uses it, and of compat's
PyTorch operators. Below, nystrom-attention's module as a whole, and what is wrong with the installed peers themselves,
measured.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from importlib.metadata import version

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nystrom_ext import compat

from . import formulas, installed, modules

BATCH, HEADS, WIDTH, TAPS, M = 2, 4, 16, 5, 16


@dataclass
class Case:
    """One row: ``name`` on n tokens, with a mask or without."""

    name: str
    n: int
    masked: bool = False
    m: int = M


CASES = [
    *(Case(name, n, masked) for name in ("official", "official_exact") for n, masked in ((256, False), (256, True))),
    *(Case("huggingface", *rest) for rest in ((256,), (256, True), (256, True, 256))),
    *(Case("lucidrains", *rest) for rest in ((256,), (250,), (250, True), (10,))),
    *(Case("t2t", n) for n in (256, 257, 250)),
    *(Case("xformers", *rest) for rest in ((256,), (257,), (250,), (250, True), (10,))),
    *(Case("flashnystrom", n) for n in (256, 257, 250)),
]


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def padding(n: int) -> Tensor:
    """(BATCH, n) bool, True = keep; the second sample is half as long."""
    return torch.arange(n) < torch.tensor([[n], [n - n // 2]])


def load(name: str, m: int, n: int) -> installed.Peer | None:
    try:
        return installed.PEERS[name](HEADS * WIDTH, HEADS, m, TAPS, n)
    except (KeyError, ImportError):
        return None


def row(case: Case) -> tuple[str, ...]:
    torch.manual_seed(0)
    name, n, m = case.name, case.n, case.m
    mask = padding(n) if case.masked else None
    peer = load(name, m, n)
    if peer is None:
        against = "formula"
        qkv = [torch.randn(BATCH, HEADS, n, WIDTH, dtype=torch.float64) for _ in range(3)]
        conv = torch.randn(HEADS, 1, TAPS, 1, dtype=torch.float64)
        expected = formulas.released(name, *qkv, m, conv, mask)
    else:
        against, conv = f"package {version(peer.package)}", peer.conv_weight
        x = torch.randn(BATCH, n, HEADS * WIDTH, dtype=torch.float64)
        qkv, expected = peer.project(x), peer.attend(x, mask)

    def difference(fused: bool) -> str:
        out = compat.attention(name, *qkv, mask, num_landmarks=m, conv_weight=conv, fused=fused)
        return f"{relative(out, expected):.0e}".replace("0e+00", "0")

    padded = n + (-n % m if name == "lucidrains" else 0)  # compat pads as lucidrains does, then asks for its preset
    try:
        compat.preset(name, num_landmarks=m, length=padded, masked=case.masked)
        fused = difference(True)
    except ValueError:
        fused = "–"
    return name, against, f"{n}", f"{m}", "padding" if case.masked else "", fused, difference(False)


def tokens(n: int) -> Tensor:
    """Large enough for attention weights far from uniform."""
    torch.manual_seed(0)
    return 5 * torch.randn(BATCH, n, HEADS * WIDTH, dtype=torch.float64)


def influence(peer: installed.Peer, x: Tensor) -> float:
    """Relative change of the first sample's result when the second sample of the batch is scaled by 4."""
    return relative(peer.attend(torch.cat([x[:1], 4 * x[1:]]), None)[0], peer.attend(x, None)[0])


def lucidrains_defects() -> list[str]:
    peer = load("lucidrains", M, 250)
    if peer is None:
        return ["nystrom-attention is not installed"]
    x, keep = tokens(250), torch.ones(BATCH, 250, dtype=torch.bool)
    masked = peer.attend(x, keep)
    padded = peer.attend(F.pad(x, (0, 0, 0, 250)), F.pad(keep, (0, 250)))[:, :, :250]
    return [
        f"{peer.title}: scaling the other sample of a batch by 4 changes a sample by {influence(peer, x):.0%}",
        f"{peer.title}: with 250 tokens, m = {M}, keeping all by a mask or without a mask differs by "
        f"{relative(masked, peer.attend(x, None)):.0%}",
        f"{peer.title}: padding from 250 to 500 tokens, masked, changes a sample by {relative(padded, masked):.0%}",
    ]


def huggingface_defects() -> list[str]:
    peer, longer = load("huggingface", M, 256), load("huggingface", M, 512)
    if peer is None or longer is None:
        return ["transformers is not installed"]
    from transformers import NystromformerConfig, NystromformerModel

    sizes = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    model = NystromformerModel(NystromformerConfig(**sizes, num_landmarks=M, segment_means_seq_len=256))
    try:
        model(torch.zeros(BATCH, 256, dtype=torch.long), attention_mask=padding(256).long())
        masks = "works"
    except RuntimeError as error:
        masks = f"fails: {str(error).splitlines()[0]}"
    default, x = NystromformerConfig(), tokens(256)
    return [
        f"{peer.title}: scaling the other sample of a batch by 4 changes a sample by {influence(peer, x):.0%}",
        f"{peer.title}: 256 tokens where 512 are configured are accepted; then scaling the other sample "
        f"changes a sample by {influence(longer, x):.0%}",
        f"{peer.title}: a padding mask with num_landmarks = {M} and 256 tokens {masks}",
        f"{peer.title}: by default num_landmarks = {default.num_landmarks} and segment_means_seq_len = "
        f"{default.segment_means_seq_len}, which is exact attention in O(n²)",
    ]


@torch.no_grad()
def main() -> None:
    console = Console()
    table = Table(title="Parity with other implementations (float64, largest relative difference)")
    for title in ("implementation", "compared with", "tokens", "m", "", "fused", "PyTorch"):
        table.add_column(title, justify="right" if title in ("tokens", "m", "fused", "PyTorch") else "left")
    previous = None
    for case in CASES:
        if previous not in (None, case.name):
            table.add_section()
        previous = case.name
        table.add_row(*row(case))
    console.print(table)
    console.print("fused –: the mathematics differ, so compat.attention uses PyTorch operators\n")
    with contextlib.suppress(ImportError):
        console.print(modules.table(), "")
    for line in lucidrains_defects() + huggingface_defects():
        console.print(f"• {line}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
