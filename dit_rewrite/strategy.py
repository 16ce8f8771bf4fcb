"""Strategies: what a site does, instead of computing, at a step where its rule applies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dit_rewrite.errors import BadParameter
from dit_rewrite.passes.sites import Part
from dit_rewrite.passes.store import STORES

Store = Literal["bf16", "fp8", "int8"] | None


@dataclass(frozen=True)
class Compute:
    """Compute, whatever later rules say."""


@dataclass(frozen=True)
class _Cached:
    store: Store = None

    def __post_init__(self) -> None:
        if self.store is not None and self.store not in STORES:
            raise BadParameter(type(self).__name__, "store", self.store, f"None or one of {', '.join(STORES)}")


@dataclass(frozen=True)
class Reuse(_Cached):
    """Take the cached value: a branch's output, or a span's change of the stream.

    `store` is what the cache holds: None the value as it is, "bf16" it in that dtype, "int8" and "fp8" (e4m3) numbers
    of one byte with an absolute-maximum scale for each token. The step that computes uses the value itself.
    """


@dataclass(frozen=True)
class ReuseKV(_Cached):
    """Take the cached keys and values of an attention, with this step's queries (DQAR, section 3.1)."""


Strategy = Compute | Reuse | ReuseKV


def part(strategy: Strategy, span: bool) -> Part | None:
    """The part of a place that a strategy replaces; None for computing."""
    if isinstance(strategy, Compute):
        return None
    if isinstance(strategy, ReuseKV):
        return Part.KV
    return Part.SPAN if span else Part.BRANCH
