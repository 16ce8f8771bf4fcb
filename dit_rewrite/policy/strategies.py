"""Strategies: what a site does, instead of computing, at a step where its rule applies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, get_args

from dit_rewrite.errors import BadParameter, DecisionReason, MissReason, Reason
from dit_rewrite.passes.analysis.sites import Part
from dit_rewrite.passes.rewrite.codec import FORMATS
from dit_rewrite.policy.bases import BASES, Basis
from dit_rewrite.runtime.decide import Computed, Moment, Past, Read, Weights, unmeasured

Store = Literal["bf16", "fp8", "int8"] | None
MOST = 8  # the highest order of a forecast: above, its weights grow beyond what fp32 can sum
COMPARABLE = (None, "bf16")  # stores whose numbers are the value's
LONGEST = 64  # computed values that a slot may keep


@dataclass(frozen=True)
class Compute:
    """Compute, whatever later rules say."""


def _check_store(strategy: object, store: object) -> None:
    if store is not None and store not in FORMATS:
        raise BadParameter(type(strategy).__name__, "store", store, f"None or one of {', '.join(FORMATS)}")


@dataclass(frozen=True)
class _Cached:
    store: Store = None

    def __post_init__(self) -> None:
        _check_store(self, self.store)


@dataclass(frozen=True)
class Reuse(_Cached):
    """Take the cached value: a branch's output, or a span's change of the stream.

    `store` is what the cache holds: None the value as it is, "bf16" it in that dtype, "int8" and "fp8" (e4m3) numbers
    of one byte with an absolute-maximum scale for each token. The step that computes uses the value itself.
    """


Over = Literal["step", "sigma", "log_snr"]
PLACES = {"step": "step", "sigma": "sigma", "log_snr": "snr"}  # and the symbol that each is made of


@dataclass(frozen=True)
class Forecast:
    """Take a weighted sum of the last computed values: a forecast of a branch's output, or of a span's change.

    `basis` says how the weights follow from where the values were computed (`dit_rewrite.policy.bases`): "taylor", the
    polynomial of `order` through the last ones; another name of `bases.BASES`; a basis with parameters of its own, such
    as `bases.Chebyshev(ridge=0.1)`; or a function of yours, from the places of the values, newest first, the place of
    this step and the order to the weights. `history` is how many values the slot keeps, by default as many as the basis
    reads; where fewer are there yet, the order falls, down to reuse. `over` says what a place is: the "step", the noise
    level "sigma", or "log_snr", the logarithm of the signal-to-noise ratio; the two need a scheduler that says it.
    `store` is as in `Reuse`. One compiled piece serves every order, basis and distance: the weights are an input of it.
    Raises BadParameter.
    """

    order: int = 1
    basis: str | Basis | Callable[[Sequence[float], float, int], Sequence[float]] = "taylor"
    history: int | None = None
    over: Over = "step"
    store: Store = None

    def __post_init__(self) -> None:
        order, basis, history, over = self.order, self.basis, self.history, self.over
        _check_store(self, self.store)
        self._require("order", is_count(order, 0) and order <= MOST, f"a whole number from 0 to {MOST}")
        named = basis in BASES if isinstance(basis, str) else isinstance(basis, Basis) or callable(basis)
        self._require("basis", named, f"one of {', '.join(BASES)}, a basis of dit_rewrite.bases, or a function")
        fits = history is None or (is_count(history, 1) and history <= LONGEST)
        self._require("history", fits, f"a whole number from 1 to {LONGEST}, or None")
        self._require("over", over in get_args(Over), " or ".join(f'"{name}"' for name in get_args(Over)))

    def _require(self, name: str, fits: object, allowed: str) -> None:
        if not fits:
            raise BadParameter(type(self).__name__, name, getattr(self, name), allowed)

    @property
    def depth(self) -> int:
        """How many computed values the slot keeps."""
        if self.history is not None:
            return self.history
        basis = _basis(self.basis)
        return basis.history(self.order) if isinstance(basis, Basis) else self.order + 1

    @property
    def measures(self) -> tuple[str, ...]:
        """The symbols of what its weights follow from, beside the places."""
        return tuple(getattr(_basis(self.basis), "measures", ()))

    def weights(self, past: Past, moment: Moment, read: Read = unmeasured) -> Weights | Reason:
        """The weights of the values that a slot holds, newest first; why there are none. `read` measures."""
        places = [self._place(computed) for computed in past.computed[: self.depth]]
        place = self._place(Computed(moment.step, moment.sigma, moment.snr))
        known = [p for p in places if p is not None]
        if place is None or len(known) < len(places):
            return MissReason.NOISE_UNKNOWN
        order = min(self.order, len(known) - 1)
        asked = self.measures if order else ()  # order 0 is reuse, which needs none
        measured = [value for name in asked if (value := read(name)) is not None]
        if len(measured) < len(asked):
            return DecisionReason.NOT_MEASURED
        found = self._weigh(known, place, order, measured)
        if not found or len(found) > len(known) or not all(map(math.isfinite, (*found, *measured))):
            return MissReason.NO_WEIGHTS
        return found + (0.0,) * (self.depth - len(found))

    def _weigh(self, places: Sequence[float], place: float, order: int, measured: Sequence[Any]) -> Weights:
        basis = _basis(self.basis)
        weigh = basis.weights if isinstance(basis, Basis) else basis
        try:
            return tuple(map(float, weigh(places, place, order, *measured)))
        except (ArithmeticError, ValueError):
            return ()

    def _place(self, computed: Computed) -> float | None:
        if self.over == "step":
            return float(computed.step)
        if self.over == "sigma":
            return computed.sigma
        return math.log(computed.snr) if computed.snr is not None and 0 < computed.snr < math.inf else None


@dataclass(frozen=True)
class Verify(Forecast):
    """Compute, and compare what that gives with this forecast: see `guards.forecast_error`.

    The step goes on with the computed value. What the slot holds stays as it is, and the step counts in `streak` and
    `age` as one that forecasts, so that the error is that of the sites which do. Raises BadParameter.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("store", self.store in COMPARABLE, 'None or "bf16"')


def _basis(basis: str | Basis | Callable[..., Any]) -> Basis | Callable[..., Any]:
    return BASES[basis]() if isinstance(basis, str) else basis


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


def is_count(value: object, least: int) -> bool:
    """Whether it is a whole number that is at least so large."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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
class GuidanceDelta:
    """Compute the model for the condition alone, and add to its output how the unconditional one differed before.

    `conditional` is as in `ShareGuidance`: in one batch of both halves only that half is computed; where guidance takes
    two calls, the other call runs nothing of the model. `do` says how the difference is had: the last one again, or a
    forecast of it. (FastVideo's CFG gate keeps the last one.) Its place is ``Where(span="output")``. Raises
    BadParameter.
    """

    conditional: str
    do: Reuse | Forecast = field(default_factory=Reuse)

    def __post_init__(self) -> None:
        if not isinstance(self.conditional, str) or not self.conditional:
            raise BadParameter("GuidanceDelta", "conditional", self.conditional, '"first", "second", or a stream')
        if not isinstance(self.do, Reuse | Forecast) or isinstance(self.do, Verify):
            raise BadParameter("GuidanceDelta", "do", self.do, "Reuse() or Forecast()")
        if self.half is None and self.do.store is not None:
            allowed = "one with store=None, where guidance takes two calls"
            raise BadParameter("GuidanceDelta", "do", self.do, allowed)

    @property
    def half(self) -> Literal[0, 1] | None:
        """The half of the batch; None where it is a stream."""
        return ShareGuidance(self.conditional).half

    @property
    def stream(self) -> str | None:
        """The stream that is always computed; None where it is a half of the batch."""
        return ShareGuidance(self.conditional).stream

    @property
    def depth(self) -> int:
        """How many values its reader takes: the differences and, of two calls, the conditional output."""
        return (self.do.depth if isinstance(self.do, Forecast) else 1) + (self.half is None)

    @property
    def measures(self) -> tuple[str, ...]:
        """The symbols of what its weights follow from."""
        return self.do.measures if isinstance(self.do, Forecast) else ()

    def weights(self, past: Past, moment: Moment, read: Read = unmeasured) -> Weights | Reason:
        """The weights of these values."""
        found = self.do.weights(past, moment, read) if isinstance(self.do, Forecast) else (1.0,)
        return found if isinstance(found, MissReason) or self.half is not None else (1.0, *found)


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
Strategy = Compute | Reuse | Forecast | ReuseKV | ShareGuidance | GuidanceDelta | Core
_PARTS = {
    ReuseKV: frozenset({Part.KV}),
    ShareGuidance: frozenset({Part.CFG_SHARED}),
    GuidanceDelta: frozenset({Part.DELTA}),
    WindowResidual: frozenset({Part.CORE, Part.CORE_STATE}),
    BlockwiseReuse: frozenset({Part.CORE, Part.CORE_STATE}),
}


def parts(strategy: Strategy, of: Part = Part.BRANCH) -> frozenset[Part]:
    """The parts of a place that a strategy replaces; none for computing."""
    if isinstance(strategy, Compute):
        return frozenset()
    return _PARTS.get(type(strategy), frozenset({of}))
