"""``python -m tests.fuzz``: random configurations of the operator against the reference; the failures, one per line."""

from __future__ import annotations

import argparse
import os
import sys

import torch
from tqdm import tqdm

from .configurations import configuration
from .differential import EMULATED, fuzz


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first configuration (default 0)")
    parser.add_argument("--count", type=int, default=500, help="how many configurations (default 500)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="a single configuration, described")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if EMULATED:
        torch.ops.load_library(EMULATED)
        torch.ops.nystrom_simt.options(int(os.environ.get("NYSTROM_SIMT_SEED", "0")), 232448)
    numbers = range(options.first, options.first + options.count)
    if options.only is not None:
        numbers = range(options.only, options.only + 1)
        print(configuration(options.seed, options.only, small=EMULATED is not None))
    failed = 0
    for number in tqdm(numbers, unit=" configurations", disable=None):
        failure = fuzz(options.seed, number, options.device)
        if failure:
            failed += 1
            tqdm.write(failure)
    print(f"{len(numbers)} configurations, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
