"""No leaks: a thousand calls, forward and backward, leave the process as large as they found it. And too little
memory is an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# In a process of its own, whose heap nothing else moves; on two threads, because each has scratch of its own.
SCRIPT = """
import gc, json, resource
import torch
from nystrom_ext import nystrom_attention

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def calls(n, dtype, masked, taps, options):
    x = torch.randn(2, 2, 40, 8, dtype=dtype, requires_grad=True)
    mask = torch.arange(40) >= torch.tensor([[40], [25]]) if masked else None
    weight = torch.randn(2, taps, dtype=dtype, requires_grad=True) if taps else None
    for _ in range(n):
        out = nystrom_attention(x, x, x, mask, query_padding_mask=mask, conv_weight=weight, **options)
        torch.autograd.grad(out.sum(), x)

torch.set_num_threads(2)
growth = {}
for name, arguments in {
    "plain": (torch.float32, False, 0, {"num_landmarks": 8}),
    "masked, convolution": (torch.float16, True, 5, {"num_landmarks": 8}),
    "exact": (torch.float64, True, 0, {"num_landmarks": 64}),
    "window, dropout": (torch.bfloat16, True, 0, {"num_landmarks": 8, "window": 5, "pinned": 2, "dropout_p": 0.1}),
    "global": (torch.float64, False, 3, {"num_landmarks": 8, "coefficient": "global"}),
}.items():
    calls(300, *arguments)  # the allocator's pools, the threads' arenas
    before = resident()
    calls(1000, *arguments)
    growth[name] = (resident() - before) / 2**20
print(json.dumps(growth))
"""


linux = pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="the size of a process is read from Linux's /proc"
)


@linux
def test_memory_does_not_grow() -> None:
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # idle threads leave the cores to other tests
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr
    megabytes = json.loads(result.stdout)
    assert all(growth < 1 for growth in megabytes.values()), f"MB more after a thousand calls: {megabytes}"


OUT_OF_MEMORY = """
import resource
import torch
from nystrom_ext import nystrom_attention

torch.set_num_threads(1)
x = torch.randn(1, 1, 600, 8, requires_grad=True)
nystrom_attention(x, x, x, num_landmarks=8).sum().backward()
out = nystrom_attention(x, x, x, num_landmarks=512).sum()
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**24,) * 2)  # the scratch is 38 MB
try:
    out.backward()
except RuntimeError as error:
    print(error)
"""


@linux
def test_too_little_memory_for_the_scratch_is_an_error() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "nystrom_attention: not enough memory for" in done.stdout and "lower them or" in done.stdout
