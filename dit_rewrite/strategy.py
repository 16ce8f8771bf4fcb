"""Strategies: what a site does, instead of computing, at a step where its rule applies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
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


@dataclass(frozen=True)
class WindowResidual:
    """Attend within a window, and add what the last full attention had beyond it (DiTFastAttn's WA-RS, section 3.2).

    `window` is how far a token sees on each side: a share of the tokens, 1/8 in the paper's code, or a number of them;
    with `grid`, (H, W) or (T, H, W) of the image's or video's tokens, a number or share for each axis. Text tokens that
    a joint attention puts before or behind the image see all, and are seen by all. The residual is kept at the steps
    after which it is read; with ``residual=False`` it is taken as zero, which is window attention alone. Raises
    BadParameter.
    """

    window: float | tuple[float, ...] = 0.125
    grid: tuple[int, ...] | None = None
    residual: bool = True

    def __post_init__(self) -> None:
        reach = self.window if isinstance(self.window, tuple) else (self.window,)
        good = all(isinstance(w, int | float) and not isinstance(w, bool) and 0 <= w < math.inf for w in reach)
        if not good or any(isinstance(w, float) and w >= 1 for w in reach):
            raise BadParameter("WindowResidual", "window", self.window, "shares below 1, or whole numbers of tokens")
        if self.grid is not None and not _is_grid(self.grid):
            raise BadParameter("WindowResidual", "grid", self.grid, "(H, W), (T, H, W), or None for a sequence")
        axes = 1 if self.grid is None else len(self.grid)
        if isinstance(self.window, tuple) and len(self.window) not in (1, axes):
            allowed = f"one number, or a tuple of {axes}: one for each axis of grid={self.grid}"
            raise BadParameter("WindowResidual", "window", self.window, allowed)

    def reach(self, tokens: int) -> tuple[int, ...]:
        """Tokens on each side, along each axis of the grid, of a sequence of that many."""
        sizes = (tokens,) if self.grid is None else self.grid
        window = self.window if isinstance(self.window, tuple) else (self.window,) * len(sizes)
        return tuple(
            int(w * size) if isinstance(w, float) else w for w, size in zip(window, sizes, strict=len(window) > 1)
        )


def is_number(value: object) -> bool:
    """Whether it is a real number; True is none, though Python counts it among the integers."""
    return isinstance(value, Real) and type(value) is not bool


def _is_grid(grid: object) -> bool:
    """Numbers of tokens along one to three axes."""
    axes = grid if isinstance(grid, tuple) else ()
    return 1 <= len(axes) <= 3 and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in axes)


@dataclass(frozen=True)
class ShareGuidance:
    """Compute an attention branch for the condition alone, and use it without the condition too (DiTFastAttn's ASC,
    section 3.4).

    `conditional` is the half of a guided batch that has the condition, "first" (diffusers' DiT pipeline) or "second"
    (PixArt's); or, where guidance takes two calls, the name of the conditional stream, which must be called first, as
    ``cache_context`` tells it. Raises BadParameter.
    """

    conditional: str

    def __post_init__(self) -> None:
        if not isinstance(self.conditional, str) or not self.conditional:
            raise BadParameter("ShareGuidance", "conditional", self.conditional, '"first", "second", or a stream')

    @property
    def half(self) -> Literal[0, 1] | None:
        """The half of the batch; None where it is a stream."""
        return 0 if self.conditional == "first" else 1 if self.conditional == "second" else None

    @property
    def stream(self) -> str | None:
        """The stream whose values are used; None where it is a half of the batch."""
        return self.conditional if self.half is None else None


@dataclass(frozen=True)
class BlockwiseReuse:
    """Recompute the blocks of keys whose scores may have changed by more than `threshold`, keep the others' partial
    results (CachedAttention, algorithms 1 and 2; kernels/blockwise_attention).

    `block` is a number of keys. `bound` says how the change is estimated: "paper" as printed (equation 14; it can be
    negative), "sound" never too low. Raises BadParameter.
    """

    threshold: float
    block: int = 64
    bound: Literal["paper", "sound"] = "sound"

    def __post_init__(self) -> None:
        if not is_number(self.threshold) or math.isnan(self.threshold):
            raise BadParameter("BlockwiseReuse", "threshold", self.threshold, "a number, inf or -inf")
        if not isinstance(self.block, int) or isinstance(self.block, bool) or self.block < 1:
            raise BadParameter("BlockwiseReuse", "block", self.block, "a number of keys >= 1")
        if self.bound not in ("paper", "sound"):
            raise BadParameter("BlockwiseReuse", "bound", self.bound, '"paper" or "sound"')


Core = WindowResidual | BlockwiseReuse  # what is done in the place of an attention op
Strategy = Compute | Reuse | ReuseKV | ShareGuidance | Core
_PARTS = {
    ReuseKV: frozenset({Part.KV}),
    ShareGuidance: frozenset({Part.GUIDANCE}),
    WindowResidual: frozenset({Part.CORE, Part.HELD}),
    BlockwiseReuse: frozenset({Part.CORE, Part.HELD}),
}


def parts(strategy: Strategy, span: bool) -> frozenset[Part]:
    """The parts of a place that a strategy replaces; none for computing."""
    if isinstance(strategy, Compute):
        return frozenset()
    return _PARTS.get(type(strategy), frozenset({Part.SPAN if span else Part.BRANCH}))
