"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: readers, also after a crash, see either the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def check_writable(path: Path) -> None:
    """Make the folder of a file that `write_whole` will write. Raises OSError if it cannot be written there."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "It is a folder; give a file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _unfinished(path).touch()
    _unfinished(path).unlink()


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.writing")
