"""Errors of custom ops: invalid arguments."""

from __future__ import annotations

from dit_rewrite.errors.base import DitRewriteError


class KernelError(DitRewriteError, ValueError):
    """An op was called with invalid arguments."""


class BadOpArgument(KernelError):
    template = "{where}: {name}={value!r} is out of range. Give {name} as {allowed}."
