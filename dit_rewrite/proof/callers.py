"""Functions of the caller, such as samplers and metrics: an error in one says which it was, and for which run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from dit_rewrite.errors import DitRewriteError, FunctionFailed


@contextmanager
def calling(function: object, run: str, *others: type[Exception]) -> Iterator[None]:
    """Raise FunctionFailed for an exception of a function of the caller, with `run` as text.

    Errors of the catalogue, which may come from the model that the function calls, and `others` are passed on.
    """
    passed: tuple[type[Exception], ...] = (DitRewriteError, *others)
    try:
        yield
    except passed:
        raise
    except Exception as error:
        raise FunctionFailed(name_of(function), run, error) from error


def name_of(function: object) -> str:
    """Return the module and the name of a function, or of the class of another object."""
    if callable(function):
        function = inspect.unwrap(function)
    if isinstance(function, functools.partial):
        return name_of(function.func)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
