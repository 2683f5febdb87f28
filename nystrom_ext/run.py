"""Run a program that cannot be edited with Nyström attention known to Hugging Face transformers.

    python -m nystrom_ext.run [--num-landmarks 128 --window 16 --pinned 1 ...] script.py arguments...
    python -m nystrom_ext.run [...] -m package.module arguments...

This imports the integration, without which transformers does not know the name, and runs the program as ``__main__``
with the arguments that follow it. Where the program asks for ``attn_implementation="nystrom"``, on its command line or
in a model's config.json, it gets Nyström attention with these options; ``--name`` makes them those of another name, and
leaves "nystrom" its defaults. The options are those of :func:`nystrom_ext.integrations.transformers.register`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
from dataclasses import fields

from ._options import Options

_BOOLEANS = {"true": True, "false": False}


def main() -> None:
    """As the program ends; status 2 for options, scripts and modules that do not exist."""
    parser = _parser()
    given = vars(parser.parse_args())
    name, as_module, program, arguments = (given.pop(key) for key in ("name", "m", "program", "arguments"))
    if not (_is_module(program) if as_module else os.path.exists(program)):
        parser.error(f"there is no {'module' if as_module else 'script'} {program!r}")
    try:
        options = Options.of(given)
        from .integrations import transformers  # takes seconds

        if name in transformers.REGISTERED:  # by the import, with defaults, and no model uses it yet
            transformers.set_options(name, options)
        else:
            transformers.register(name, **vars(options))
    except ValueError as error:
        parser.error(str(error))
    sys.argv = [program, *arguments]  # runpy puts the full path in the first place
    if as_module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return
    program = os.path.abspath(program)
    if not getattr(sys.flags, "safe_path", False):  # new in Python 3.11
        sys.path[0] = os.path.dirname(program)
    runpy.run_path(program, run_name="__main__")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nystrom_ext.run", allow_abbrev=False)
    parser.add_argument("--name", default="nystrom", help='what the program calls this attention (default "nystrom")')
    for option in fields(Options):
        kind = _boolean if option.default is None or isinstance(option.default, bool) else type(option.default)
        parser.add_argument(f"--{option.name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS)
    parser.add_argument("-m", action="store_true", help="the program is a module")
    parser.add_argument("program", help="script, or module with -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
    return parser


def _boolean(text: str) -> bool:
    if text not in _BOOLEANS:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return _BOOLEANS[text]


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a package around it
        return False


if __name__ == "__main__":
    main()
