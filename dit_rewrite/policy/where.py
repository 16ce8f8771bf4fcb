"""Where a rule applies: a selection of sites by kind, layer, name, span and stream."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import sympy
from sympy.logic.boolalg import Boolean

from dit_rewrite.errors import BadParameter, LayersOutside
from dit_rewrite.passes.analysis.sites import Kind, Part, Site
from dit_rewrite.passes.analysis.spans import Span
from dit_rewrite.passes.guards.symbols import layer, num_layers
from dit_rewrite.policy.core_strategies import is_number

FAMILIES = {
    "attention": frozenset({Kind.SELF, Kind.CROSS, Kind.JOINT}),
    "mlp": frozenset({Kind.MLP}),
    **{kind.value: frozenset({kind}) for kind in Kind if kind is not Kind.SPAN},
}


@dataclass(frozen=True)
class Where:
    """Selects the sites that satisfy all given conditions.

    kinds: "self", "cross", "joint", "parallel", "mlp", or "attention" for the first three. A parallel site computes
    attention and MLP in one branch; it is selected by "parallel", or by "mlp" together with an attention kind.
    layers: (first, end), the blocks from `first` up to, not including, `end` (None: all that follow), counted from 0;
    for spans, blocks of the stack. Negative numbers count from the end as in Python's slices: (8, -2).
    fraction: (from, to), the same in fractions of the number of blocks: (0, 0.5) is the first half.
    names: a shell-style pattern of the site's name: "transformer_blocks.*.attn2".
    span: selects spans of the residual stream instead of branches, so that `kinds` is ignored: "block" each selected
    block, "stack" all selected blocks of a stack as one span, "output" the output of the model. A stack is a chain of
    blocks over one residual stream. A step that reuses the output runs nothing of the model.
    minus: "latent" with span="output": cache the output minus the model's latent input.
    stack: a pattern of the path of the module list that contains the stack's blocks: "single_transformer_blocks". By
    default, and if the pattern matches several stacks, the one with most FLOPs.
    streams: names of the streams, as given to `cache_context`.

    Raises BadParameter for values that no model could have.
    """

    kinds: tuple[str, ...] = tuple(FAMILIES)
    layers: tuple[int, int | None] | None = None
    fraction: tuple[float, float] | None = None
    names: str | None = None
    span: Literal["block", "stack", "output"] | None = None
    streams: tuple[str, ...] | None = None
    stack: str | None = None
    minus: Literal["latent"] | None = None

    def __post_init__(self) -> None:
        for name in ("kinds", "layers", "fraction", "streams"):  # accept lists, but keep the object hashable
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        known = _are_texts(self.kinds) and all(kind in FAMILIES for kind in self.kinds)
        self._require("kinds", known, f"a tuple of names among {', '.join(FAMILIES)}")
        layers = self.layers is None or _is_range(self.layers)
        self._require("layers", layers, "(first, end) of a non-empty slice; end may be None")
        shares = self.fraction is None or _are_shares(self.fraction)
        self._require("fraction", shares, "(from, to) with 0 <= from < to <= 1")
        self._require("names", self.names is None or isinstance(self.names, str), "a pattern as text, or None")
        self._require("span", self.span in (None, "block", "stack", "output"), '"block", "stack", "output" or None')
        for name in ("layers", "fraction"):
            fits = self.span != "output" or getattr(self, name) is None
            self._require(name, fits, 'None with span="output", which is the whole model')
        fits = self.minus is None or (self.minus == "latent" and self.span == "output")
        self._require("minus", fits, '"latent" with span="output", or None')
        fits = self.stack is None or (self.part is Part.SPAN and isinstance(self.stack, str) and bool(self.stack))
        self._require("stack", fits, 'a pattern such as "transformer_blocks", with span=...')
        self._require("streams", self.streams is None or _are_texts(self.streams), "a tuple of names, or None")

    def _require(self, name: str, fits: bool, allowed: str) -> None:
        if not fits:
            raise BadParameter("Where", name, getattr(self, name), allowed)

    @property
    def part(self) -> Part:
        """The part of the model that reuse replaces."""
        return Part.BRANCH if self.span is None else Part.OUTPUT if self.span == "output" else Part.SPAN

    @property
    def is_all(self) -> bool:
        """Whether the output of the model is selected, without `minus`."""
        return self.part is Part.OUTPUT and self.minus is None

    @property
    def guard(self) -> Boolean:
        """The guard that holds for the selected layers."""
        guard = sympy.true
        if self.layers is not None:
            first, end = self.layers
            guard &= (layer >= _counted(first, num_layers)) if first else sympy.true
            guard &= (layer < _counted(end, num_layers)) if end is not None else sympy.true
        if self.fraction is not None:
            first, end = (sympy.Rational(str(share)) for share in self.fraction)
            guard &= (layer >= first * num_layers) & ((layer < end * num_layers) if end < 1 else sympy.true)
        return guard

    def selects(self, site: Site, spans: Collection[Span] = ()) -> bool:
        """Return whether the site is selected, not considering its layer. `spans` are the spans that are selected."""
        if self.names is not None and not fnmatchcase(site.place, self.names):
            return False
        if self.part is Part.OUTPUT or site.part in (Part.DELTA, Part.OUTPUT):
            here = site.part in (Part.DELTA, Part.OUTPUT) and self.part is Part.OUTPUT
            return here and bool(site.bases) == (self.minus is not None)
        if self.span is not None or site.part is Part.SPAN:
            return self.span is not None and site.span in spans
        kinds = frozenset[Kind]().union(*(FAMILIES[kind] for kind in self.kinds))
        both = bool(kinds & FAMILIES["attention"]) and Kind.MLP in kinds
        return site.kind in kinds or (site.kind is Kind.PARALLEL and both)

    def in_stream(self, stream: Hashable) -> bool:
        """Return whether calls of this stream are selected."""
        return self.streams is None or stream in self.streams

    def blocks(self, count: int) -> range:
        """Return the selected blocks of a stack or model with `count` blocks."""
        first, end = self.layers if self.layers is not None else (0, None)
        low, high = self.fraction if self.fraction is not None else (0.0, 1.0)
        first, end = _counted(first, count), count if end is None else _counted(end, count)
        if first < 0 or end > count:
            return range(0)
        return range(max(first, _ceil(low, count)), min(end, _ceil(high, count)))

    def check(self, count: int) -> None:
        """Raise LayersOutside if `layers` is outside a model with `count` blocks."""
        if self.layers is None:
            return
        first, end = self.layers
        if not 0 <= _counted(first, count) < (count if end is None else _counted(end, count)) <= count:
            raise LayersOutside(self.layers, count)

    @property
    def is_open(self) -> bool:
        """Whether the selection is defined without knowing how many blocks the stack has."""
        return self.fraction is None and (self.layers is None or (self.layers[0] >= 0 and self.layers[1] is None))

    def spans(self, stack: Sequence[int]) -> tuple[Span, ...]:
        """Return the selected spans of a stack with these blocks, as (first block, end block)."""
        blocks = self.blocks(len(stack))
        if self.part is not Part.SPAN or not blocks:
            return ()
        runs = [(b, b) for b in blocks] if self.span == "block" else [(blocks[0], blocks[-1])]
        return tuple((stack[first], stack[last] + 1) for first, last in runs)


def _are_texts(value: object) -> bool:
    """Return whether `value` is a tuple of strings, and not a string, which would be iterated by letters."""
    return isinstance(value, tuple) and all(isinstance(item, str) for item in value)


def _is_range(value: object) -> bool:
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    first, end = value
    whole = all(isinstance(block, int) and not isinstance(block, bool) for block in value if block is not None)
    return first is not None and whole and (end is None or (end != 0 and ((first < 0) != (end < 0) or first < end)))


def _counted(block: int, count: Any) -> Any:
    """Return the index of a block from 0; a negative `block` counts from the end."""
    return block + count if block < 0 else block


def _are_shares(value: object) -> bool:
    pair = value if isinstance(value, tuple) and len(value) == 2 else ()
    return len(pair) == 2 and all(map(is_number, pair)) and 0 <= pair[0] < pair[1] <= 1


def _ceil(share: float, count: int) -> int:
    """Return the first block at or after a fraction of the model."""
    return int(sympy.ceiling(sympy.Rational(str(share)) * count))
