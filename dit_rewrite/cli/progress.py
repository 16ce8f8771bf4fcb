"""A progress bar for work that takes more than two seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE = 2.0  # seconds without a bar


@contextlib.contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each of `total` parts of the work.

    A bar appears on stderr once the work has taken two seconds, if that is a terminal and rich is installed.
    """
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        bar: Any = None
        task: Any = None
        done = 0

        def tick() -> None:
            nonlocal bar, task, done
            done += 1
            if bar is None and time.monotonic() - began > PATIENCE and (made := _bar()) is not None:
                bar = stack.enter_context(made)
                task = bar.add_task(text, total=total)
            if bar is not None:
                bar.update(task, completed=done)

        yield tick


def _bar() -> Any:
    """Return a bar, or None without a terminal or without rich."""
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return None
    return Progress(console=Console(stderr=True), transient=True)
