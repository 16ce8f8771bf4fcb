"""Arguments that an op does not take."""

from __future__ import annotations

from dit_rewrite.errors.base import DitRewriteError


class KernelError(DitRewriteError, ValueError):
    """A call of an op that cannot be run."""


class BadOpArgument(KernelError):
    template = "{where}: {name}={value!r} is out of range. Give {name} as {allowed}."
