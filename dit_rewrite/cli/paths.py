"""The paths that a command is given: outputs are checked before the work, and errors of files name their option."""

from __future__ import annotations

import argparse
import errno
import os
from pathlib import Path
from typing import Any

from dit_rewrite.errors import BadPath

REMEDIES: dict[type[OSError], str] = {
    FileNotFoundError: "Give a path that exists, or for an output one that can be made",
    IsADirectoryError: "Give the path of a file",
    NotADirectoryError: "Give a path in which only the last name may be that of a file",
    FileExistsError: "Give the path of a folder",
    PermissionError: "Give a path whose permissions allow this",
}
OTHERWISE = "Check the path and its disk"


def add_output(parser: argparse.ArgumentParser, option: str, *, folder: bool = False, **settings: Any) -> None:
    """Add an option for the path of an output file, or of a folder of output files, which `check_outputs` checks."""
    action = parser.add_argument(option, type=Path, **settings)
    parser.set_defaults(outputs={**(parser.get_default("outputs") or {}), action.dest: folder})


def check_outputs(arguments: argparse.Namespace) -> None:
    """Raise OSError if an output could not be written, so that no work is lost. Missing folders are made later."""
    for name, folder in getattr(arguments, "outputs", {}).items():
        path: Path | None = getattr(arguments, name)
        if path is not None:
            _check(path, folder)


def _check(path: Path, folder: bool) -> None:
    if path.is_dir() and not folder:
        raise _error(errno.EISDIR, path)
    within = path if folder else path.parent
    existing = next(each for each in (within, *within.parents) if each.exists())
    if not existing.is_dir():
        raise _error(errno.ENOTDIR, path)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _error(errno.EACCES, path)


def _error(code: int, path: Path) -> OSError:
    return OSError(code, os.strerror(code), str(path))


def explained(error: Exception, arguments: argparse.Namespace) -> Exception:
    """Return an error of a file that an option names as one of the catalogue, and any other error unchanged."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str | os.PathLike):
        return error
    path = Path(error.filename)
    option = next((name for name, value in vars(arguments).items() if _names(value, path)), None)
    if option is None:
        return error
    problem = (error.strerror or type(error).__name__).lower()
    remedy = next((text for kind, text in REMEDIES.items() if isinstance(error, kind)), OTHERWISE)
    return BadPath(f"--{option.replace('_', '-')}", path, problem, remedy)


def _names(value: Any, path: Path) -> bool:
    """Return whether the value of an option is this path, or one of them is within the other.

    A file beside an output has its name with a suffix. Text, such as that of a storage, may be no path at all.
    """
    if isinstance(value, list | tuple):
        return any(_names(each, path) for each in value)
    if not isinstance(value, Path):
        return isinstance(value, str) and (value == str(path) or path in Path(value).parents)
    return value == path or value in path.parents or path in value.parents or str(path).startswith(str(value))
