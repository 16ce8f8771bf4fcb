"""The base class of all errors. It formats the message from a template and the values that the error is raised with."""

from __future__ import annotations

import re
from string import Formatter
from typing import Any, ClassVar


class DitRewriteError(Exception):
    """Base of all errors of this package.

    ``template`` is the message of a class: what happened, where, and what to do. The values for its fields are passed
    by name, or by position in the order in which the fields first occur.
    """

    template: ClassVar[str] = ""
    during: str | None = None  # the name of the pass that raised the error, if any

    def __init__(self, *values: object, **named: object) -> None:
        free = [field for field in self.fields() if field not in named]
        if len(free) != len(values) or not named.keys() <= set(self.fields()):
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.fields()) or 'no values'}")
        super().__init__(self.template.format(**named, **dict(zip(free, values, strict=True))))

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.during is None else f"{text} (in the pass {self.during})"

    @classmethod
    def fields(cls) -> list[str]:
        """Return the names of the template's fields, in order."""
        names = (re.split(r"[.\[]", name)[0] for _, name, _, _ in Formatter().parse(cls.template) if name)
        return list(dict.fromkeys(names))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the message and not the values, because guards and models may not pickle."""
        return _with_message, (type(self), *self.args), self.__dict__


def _with_message(kind: type[DitRewriteError], *message: str) -> DitRewriteError:
    error = kind.__new__(kind)
    super(DitRewriteError, error).__init__(*message)
    return error


def joined(items: Any, empty: str = "none") -> str:
    """Join strings by commas; return `empty` if there are none."""
    return ", ".join(items) or empty
