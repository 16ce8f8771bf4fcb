"""The result of a command, which `main` prints as text or as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """The result of a command: ``text``, or with ``--json`` ``data`` as one line, goes to stdout; ``code`` is the exit
    code.

    Commands may print more on stdout themselves, such as tables; with ``--json`` that goes to stderr.
    """

    text: str
    data: Mapping[str, Any]
    code: int = 0

    def to_json(self) -> str:
        """Return ``data`` as one line of JSON. Numbers that are not finite become null."""
        return json.dumps(_plain(self.data), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else _text(value)


def _text(value: Any) -> str:
    return value.as_posix() if isinstance(value, Path) else str(value)
