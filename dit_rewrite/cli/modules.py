"""The factories that commands take as module:factory."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dit_rewrite.errors import BadModel, BadSampler


@contextmanager
def factory_of(text: str, sampler: bool = False) -> Iterator[Any]:
    """Provide the factory module:factory. Raises BadModel, or BadSampler for that of a `sampler`, if it cannot be
    imported, and for any error within."""
    module, _, name = text.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield getattr(importlib.import_module(module), name)
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise BadSampler(text, cause) if sampler else BadModel(text, cause) from error
    finally:
        sys.path.pop(0)
