"""``python -m nystrom_ext.run``: programs that cannot be edited and know nothing of this package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

T = pytest.importorskip("transformers")
from huggingface import TEXT  # noqa: E402

ROOT = Path(__file__).parents[1]
PROGRAM = """
import os, sys, transformers
import helper
name = transformers.AutoModel.from_pretrained(os.path.dirname(__file__)).config._attn_implementation
options = transformers.AttentionInterface()[name].keywords["default_options"]
print(__name__, name, options.num_landmarks, options.window, options.self_attention, *sys.argv[1:])
"""


@pytest.fixture
def program(tmp_path):
    """A folder with a script, a module beside it, and a model whose config.json names its attention."""
    T.BertModel(T.BertConfig(**TEXT)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": "nystrom"}))
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "script.py").write_text(PROGRAM)
    return tmp_path


def run(*arguments, cwd=ROOT, status=0):
    """What it prints, or the last line of what it complains about."""
    command = [sys.executable, "-m", "nystrom_ext.run", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout.strip() if status == 0 else done.stderr.strip().splitlines()[-1]


def test_the_name_in_a_config(program):
    assert run(program / "script.py") == "__main__ nystrom 64 0 None"
    options = ("--num-landmarks", "128", "--window", "16", "--pinned", "1", "--self-attention", "true")
    assert run(*options, program / "script.py") == "__main__ nystrom 128 16 True"


def test_the_arguments_of_the_program_are_its_own(program):
    theirs = ("--window", "5", "-m", "x", "--", "-h")
    for ours in (("--window", "3", "script.py"), ("--window", "3", "-m", "script")):
        assert run(*ours, *theirs, cwd=program) == "__main__ nystrom 64 3 None --window 5 -m x -- -h"


def test_another_name(program):
    config = json.loads((program / "config.json").read_text())
    (program / "config.json").write_text(json.dumps(config | {"attn_implementation": "nystrom-32"}))
    options = ("--name", "nystrom-32", "--num-landmarks", "32")
    assert run(*options, program / "script.py") == "__main__ nystrom-32 32 0 None"
    assert "nystrom-32" in run(program / "script.py", status=1)  # transformers' own error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.py"], "there is no script 'nowhere.py'"),
        (["-m", "nowhere.at_all"], "there is no module 'nowhere.at_all'"),
        (["--num-landmarks", "0", "tests/small_models.py"], "num_landmarks must be an integer of at least 1, got 0"),
        (["--num-landmarks", "many", "tests/small_models.py"], "argument --num-landmarks: invalid int value: 'many'"),
        (["--self-attention", "maybe", "tests/small_models.py"], "must be true or false, got 'maybe'"),
        (["--name", "sdpa", "tests/small_models.py"], "must not be empty or contain"),
        (["--landmarks", "8", "tests/small_models.py"], "unrecognized arguments|required"),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    assert re.search(message, run(*arguments, status=2))
