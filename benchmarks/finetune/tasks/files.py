"""Files of a data set, from a folder or from a tar archive that is read in place: nothing is ever unpacked to disk."""

from __future__ import annotations

import contextlib
import lzma
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from .. import UsageError

MAX_FILE = 2**30  # bytes; the largest file of these data sets has a tenth of it
MAX_TOTAL = 2**34  # of all files in an archive: beyond, it is taken for a decompression bomb


def members(path: Path, wanted: re.Pattern[str], globs: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files whose name, with slashes, ``wanted`` finds; ``globs``: where a folder has them."""
    if not path.exists():
        raise UsageError(f"--data-dir must exist, got {path}; name the folder or the tar archive of the data set")
    yield from _folder(path, wanted, globs) if path.is_dir() else _archive(path, wanted)


def decode(content: bytes, name: str) -> str:
    """UTF-8, with or without a byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} must be UTF-8, it is not at byte {error.start}; repair or remove it") from error


def rows(text: str) -> list[list[str]]:
    """Lines of tab-separated values. Quotes mean themselves, and only a line feed ends a line: texts hold others."""
    return [line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip()]


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when it is complete."""
    if folder.exists():
        raise UsageError(f"--write-data must name a new folder, {folder} exists; choose another name")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            root = Path(temporary, "complete")
            root.mkdir()
            yield root
            os.rename(root, folder)
    except OSError as error:
        raise UsageError(f"--write-data must be writable, {folder}: {error.strerror}; choose another") from error


def _folder(path: Path, wanted: re.Pattern[str], globs: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    for file in sorted({file for glob in globs for file in path.resolve().glob(glob)}):
        if wanted.search(file.as_posix()):
            try:
                if file.stat().st_size > MAX_FILE:
                    raise UsageError(f"a file must not exceed {MAX_FILE:,} bytes, {file} does; remove it")
                yield file.as_posix(), file.read_bytes()
            except OSError as error:
                raise UsageError(f"every file must be readable, {file}: {error.strerror}; repair it") from error


def _archive(path: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    total = 0
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                total += member.size
                _check(path, member, total)
                if member.isfile() and wanted.search(member.name):
                    stream = archive.extractfile(member)
                    assert stream is not None  # it is a regular file
                    yield member.name, stream.read()
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise UsageError(f"--data-dir must be a folder or an intact tar, {path}: {error}; get it again") from error


def _check(path: Path, member: tarfile.TarInfo, total: int) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise UsageError(f"an archive must not name files outside itself, {path} has {member.name}; get another copy")
    if member.size > MAX_FILE or total > MAX_TOTAL:
        raise UsageError(
            f"an archive must not unpack to more than {MAX_TOTAL:,} bytes or {MAX_FILE:,} in one file, {path} does at "
            f"{member.name}; unpack it yourself and name the folder if you trust it"
        )
