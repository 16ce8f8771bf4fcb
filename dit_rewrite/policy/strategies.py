"""Strategies: how a site gets its value at the steps where a rule applies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dit_rewrite.errors import BadParameter, DecisionReason, MissReason, Reason
from dit_rewrite.passes.analysis.sites import Part
from dit_rewrite.passes.rewrite.codec import FORMATS
from dit_rewrite.policy.bases import BASES, Basis
from dit_rewrite.policy.core_strategies import BlockwiseReuse as BlockwiseReuse
from dit_rewrite.policy.core_strategies import Core, is_number
from dit_rewrite.policy.core_strategies import WindowResidual as WindowResidual
from dit_rewrite.policy.plan import is_whole
from dit_rewrite.runtime.decide import Read, Weights, unmeasured
from dit_rewrite.runtime.history import Computed, Moment, Past

Store = Literal["bf16", "fp8", "int8"] | None
MOST = 8  # maximum order of a forecast; the weights of higher orders are too large to sum in fp32
COMPARABLE = (None, "bf16")  # stores without scales, whose values can be compared with computed ones
LONGEST = 64  # maximum number of computed values in a slot


@dataclass(frozen=True)
class Compute:
    """Compute the site. Later rules do not apply."""


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
    """Use the cached value: a branch's output, or the change of the residual stream across a span.

    `store` is the format of cached values: None keeps them as they are, "bf16" casts them, "int8" and "fp8" (e4m3)
    quantise them with an absolute-maximum scale per token. The step that computes a value uses it unquantised.
    """


Over = Literal["step", "sigma", "log_snr"]
PLACES = {"step": "step", "sigma": "sigma", "log_snr": "snr"}  # the symbol that each is computed from


@dataclass(frozen=True)
class Forecast:
    """Forecast the value as a weighted sum of the last computed values of a branch's output or a span's change.

    `basis` maps the places of the computed values to weights (`dit_rewrite.bases`): "taylor", the polynomial of `order`
    through the last values; another name in `bases.BASES`; a basis with parameters, such as
    `bases.Chebyshev(ridge=0.1)`; or a function of the places (newest first), the place of the current step, and the
    order. `history` is the number of values that the slot keeps, by default the number that the basis reads. While
    there are fewer values, the order falls, down to reuse. `over` defines the places: the "step", the noise level
    "sigma", or "log_snr", the logarithm of the signal-to-noise ratio; the last two need a scheduler that provides them.
    `store` is as in `Reuse`. The weights are an input of the compiled code, so one segment serves every order, basis
    and distance. Raises BadParameter.
    """

    order: int = 1
    basis: str | Basis | Callable[[Sequence[float], float, int], Sequence[float]] = "taylor"
    history: int | None = None
    over: Over = "step"
    store: Store = None

    def __post_init__(self) -> None:
        order, basis, history, over = self.order, self.basis, self.history, self.over
        _check_store(self, self.store)
        self._require("order", is_whole(order, 0) and order <= MOST, f"a whole number from 0 to {MOST}")
        named = basis in BASES if isinstance(basis, str) else isinstance(basis, Basis) or callable(basis)
        self._require("basis", named, f"one of {', '.join(BASES)}, a basis of dit_rewrite.bases, or a function")
        fits = history is None or (is_whole(history, 1) and history <= LONGEST)
        self._require("history", fits, f"a whole number from 1 to {LONGEST}, or None")
        self._require("over", over in get_args(Over), " or ".join(f'"{name}"' for name in get_args(Over)))

    def _require(self, name: str, fits: object, allowed: str) -> None:
        if not fits:
            raise BadParameter(type(self).__name__, name, getattr(self, name), allowed)

    @property
    def depth(self) -> int:
        """The number of computed values that the slot keeps."""
        basis = _basis(self.basis)
        if isinstance(basis, Basis):
            return self.history or basis.history(self.order)
        return max(self.history or self.order + 1, 2)  # one value alone is read without its weight, which may not be 1

    @property
    def measures(self) -> tuple[str, ...]:
        """The symbols of the measurements that the weights depend on."""
        return tuple(getattr(_basis(self.basis), "measures", ()))

    def weights(self, past: Past, moment: Moment, read: Read = unmeasured) -> Weights | Reason:
        """Return the weights of the values in a slot, newest first, or the reason why there are none."""
        places = [self._place(computed) for computed in past.computed[: self.depth]]
        place = self._place(Computed(moment.step, moment.sigma, moment.snr))
        known = [p for p in places if p is not None]
        if place is None or len(known) < len(places):
            return MissReason.NOISE_UNKNOWN
        order = min(self.order, len(known) - 1)
        asked = self.measures if order else ()  # order 0 is reuse and needs no measurement
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
    """Compute the site and compare the result with this forecast: see `guards.forecast_error`.

    The step uses the computed value. The slot is not updated, and `streak` and `age` count the step as forecast, so
    that the error applies to the sites that are forecast. Raises BadParameter.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("store", self.store in COMPARABLE, 'None or "bf16"')


def _basis(basis: str | Basis | Callable[..., Any]) -> Basis | Callable[..., Any]:
    return BASES[basis]() if isinstance(basis, str) else basis


@dataclass(frozen=True)
class ReuseKV(_Cached):
    """Use the cached keys and values of an attention with the current queries (DQAR, section 3.1)."""


@dataclass(frozen=True)
class ShareGuidance:
    """Compute an attention branch for the conditional input only, and use the result for the unconditional one too
    (DiTFastAttn's ASC, section 3.4).

    `conditional` is the conditional half of a guided batch, "first" (diffusers' DiT pipeline) or "second" (PixArt's).
    If guidance takes two calls, it is the name of the conditional stream in ``cache_context``, which must be called
    first. Raises BadParameter.
    """

    conditional: str

    def __post_init__(self) -> None:
        if not isinstance(self.conditional, str) or not self.conditional:
            raise BadParameter("ShareGuidance", "conditional", self.conditional, '"first", "second", or a stream')

    @property
    def half(self) -> Literal[0, 1] | None:
        """The half of the batch; None if `conditional` is a stream."""
        return 0 if self.conditional == "first" else 1 if self.conditional == "second" else None

    @property
    def stream(self) -> str | None:
        """The stream whose values are used; None if `conditional` is a half of the batch."""
        return self.conditional if self.half is None else None


@dataclass(frozen=True)
class GuidanceDelta:
    """Compute the model for the conditional input only, and add to its output the cached difference between the
    unconditional and the conditional output.

    `conditional` is as in `ShareGuidance`. In a batch of both halves only that half is computed; if guidance takes two
    calls, the unconditional call runs nothing of the model. `do` says how to get the difference: `Reuse()` uses the
    last one, as FastVideo's CFG gate does, and `Forecast()` forecasts it. The rule needs ``Where(span="output")``.
    Raises BadParameter.
    """

    conditional: str
    do: Reuse | Forecast = field(default_factory=Reuse)

    def __post_init__(self) -> None:
        if not isinstance(self.conditional, str) or not self.conditional:
            raise BadParameter("GuidanceDelta", "conditional", self.conditional, '"first", "second", or a stream')
        if not isinstance(self.do, Reuse | Forecast) or isinstance(self.do, Verify):
            raise BadParameter("GuidanceDelta", "do", self.do, "Reuse() or Forecast()")
        if self.half is None and self.do.store is not None:
            allowed = "a strategy with store=None if guidance takes two calls"
            raise BadParameter("GuidanceDelta", "do", self.do, allowed)

    @property
    def half(self) -> Literal[0, 1] | None:
        """The half of the batch; None if `conditional` is a stream."""
        return ShareGuidance(self.conditional).half

    @property
    def stream(self) -> str | None:
        """The stream that is always computed; None if `conditional` is a half of the batch."""
        return ShareGuidance(self.conditional).stream

    @property
    def depth(self) -> int:
        """The number of values that a reusing step reads: differences and, with two calls, the conditional output."""
        return (self.do.depth if isinstance(self.do, Forecast) else 1) + (self.half is None)

    @property
    def measures(self) -> tuple[str, ...]:
        """The symbols of the measurements that the weights depend on."""
        return self.do.measures if isinstance(self.do, Forecast) else ()

    def weights(self, past: Past, moment: Moment, read: Read = unmeasured) -> Weights | Reason:
        """Return the weights of these values, or the reason why there are none."""
        found = self.do.weights(past, moment, read) if isinstance(self.do, Forecast) else (1.0,)
        return found if isinstance(found, MissReason) or self.half is not None else (1.0, *found)


@dataclass(frozen=True)
class ReuseTiles:
    """Recompute a share `refresh` of the tiles of a branch's tokens, and use the cached output for the others.

    A step computes the branch for a fixed number of tokens, from its norm to its output projection, so its FLOPs fall
    with the share. Each recomputed token is that of the full computation; with refresh=1 the branch is exact. Tiles
    have at most `tile` tokens, and are smaller if their number must divide the tokens.

    order="turns" takes the tiles in turn: with refresh=1/n, each is recomputed every n steps. order="change" takes
    those that are expected to have changed most: the change per step of the tile's output when it was last recomputed,
    times the steps since then. No tile waits longer than two rounds. The device chooses, and the samples of a batch
    share the choice, so an image may depend slightly on the others in its batch.

    Each token of the output must depend on the branch's input at the same token only, as in cross-attention, whose keys
    and values are those of a condition, or in an MLP. If the graph does not show that, as in self-attention, the
    strategy is refused. Raises BadParameter.
    """

    refresh: float = 0.25
    tile: int = 128
    order: Literal["turns", "change"] = "turns"

    def __post_init__(self) -> None:
        fits = is_number(self.refresh) and 0 < self.refresh <= 1
        for name, good, allowed in (
            ("refresh", fits, "the share of the tokens that a step recomputes, 0 < refresh <= 1"),
            ("tile", is_whole(self.tile, 1), "a number of tokens >= 1"),
            ("order", self.order in ("turns", "change"), '"turns" or "change"'),
        ):
            if not good:
                raise BadParameter("ReuseTiles", name, getattr(self, name), allowed)


Strategy = Compute | Reuse | Forecast | ReuseKV | ReuseTiles | ShareGuidance | GuidanceDelta | Core
_PARTS = {ReuseKV: Part.KV, ReuseTiles: Part.TILES, ShareGuidance: Part.CFG_SHARED, GuidanceDelta: Part.DELTA}


def parts(strategy: Strategy, of: Part = Part.BRANCH) -> frozenset[Part]:
    """Return the parts of a site that a strategy replaces; empty for `Compute`."""
    if isinstance(strategy, Core):
        return frozenset({Part.CORE, Part.CORE_STATE})
    return frozenset(() if isinstance(strategy, Compute) else {_PARTS.get(type(strategy), of)})
