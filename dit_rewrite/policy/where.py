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
from dit_rewrite.policy.strategies import is_number

FAMILIES = {
    "attention": frozenset({Kind.SELF, Kind.CROSS, Kind.JOINT}),
    "mlp": frozenset({Kind.MLP}),
    **{kind.value: frozenset({kind}) for kind in Kind if kind is not Kind.SPAN},
}


@dataclass(frozen=True)
class Where:
    """Selects the sites that meet all that is given.

    kinds: "self", "cross", "joint", "parallel", "mlp", or "attention" for the first three. A parallel site is attention
    and MLP at once, so it is selected where both are.
    layers: blocks from the first number up to, not including, the second (None: to the end), counted from 0; for a span
    those of its stack. Negative numbers count from the end, as in Python's slices: (8, -2) is up to the last two.
    fraction: the same as shares of the number of blocks: (0, 0.5) is the first half.
    names: a pattern of the site's name, as of file names: "transformer_blocks.*.attn2".
    span: "block" or "stack": instead of branches each selected block of a stack, or all of them as one; `kinds` has no
    say then. A stack is a chain of blocks over one residual stream. Or "output", all that the model returns: where that
    is not computed nothing of the model runs.
    minus: "latent" with span="output": what is held is the output less the model's latent input.
    stack: which one, by a pattern of the path of the list that holds its blocks: "single_transformer_blocks". Without
    it, the one with most FLOPs of the model; of the blocks that have such a path, otherwise.
    streams: the calls' streams by name, as `cache_context` tells them.

    Raises BadParameter for what no model could have.
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
        for name in ("kinds", "layers", "fraction", "streams"):  # a list means the tuple: a place must be hashable
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        known = _are_texts(self.kinds) and all(kind in FAMILIES for kind in self.kinds)
        self._require("kinds", known, f"a tuple of names among {', '.join(FAMILIES)}")
        layers = self.layers is None or _is_range(self.layers)
        self._require("layers", layers, "(first, end) of a slice that is not empty, or end None")
        shares = self.fraction is None or _are_shares(self.fraction)
        self._require("fraction", shares, "(from, to) with 0 <= from < to <= 1")
        self._require("names", self.names is None or isinstance(self.names, str), "a pattern as text, or None")
        self._require("span", self.span in (None, "block", "stack", "output"), '"block", "stack", "output" or None')
        for name in ("layers", "fraction"):
            fits = self.span != "output" or getattr(self, name) is None
            self._require(name, fits, 'None beside span="output", which is all of the model')
        fits = self.minus is None or (self.minus == "latent" and self.span == "output")
        self._require("minus", fits, '"latent" beside span="output", or None')
        fits = self.stack is None or (self.part is Part.SPAN and isinstance(self.stack, str) and bool(self.stack))
        self._require("stack", fits, 'a pattern such as "transformer_blocks", beside span=...')
        self._require("streams", self.streams is None or _are_texts(self.streams), "a tuple of names, or None")

    def _require(self, name: str, fits: bool, allowed: str) -> None:
        if not fits:
            raise BadParameter("Where", name, getattr(self, name), allowed)

    @property
    def part(self) -> Part:
        """The part of a model that reuse replaces here."""
        return Part.BRANCH if self.span is None else Part.OUTPUT if self.span == "output" else Part.SPAN

    @property
    def is_all(self) -> bool:
        """Whether it is what the model returns, as it is."""
        return self.part is Part.OUTPUT and self.minus is None

    @property
    def guard(self) -> Boolean:
        """The layers that are selected, in the language of guards."""
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
        """Whether a rule of this place speaks of the site, its layer left aside; `spans` are the blocks it means."""
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
        """Whether a call of this stream is meant."""
        return self.streams is None or stream in self.streams

    def blocks(self, count: int) -> range:
        """The selected blocks of a stack, or of a model, that has `count`."""
        first, end = self.layers if self.layers is not None else (0, None)
        low, high = self.fraction if self.fraction is not None else (0.0, 1.0)
        first, end = _counted(first, count), count if end is None else _counted(end, count)
        if first < 0 or end > count:
            return range(0)
        return range(max(first, _ceil(low, count)), min(end, _ceil(high, count)))

    def check(self, count: int) -> None:
        """Raises LayersOutside where a model of `count` blocks has not all that are meant."""
        if self.layers is None:
            return
        first, end = self.layers
        if not 0 <= _counted(first, count) < (count if end is None else _counted(end, count)) <= count:
            raise LayersOutside(self.layers, count)

    @property
    def is_open(self) -> bool:
        """Whether it is known which blocks are meant of a stack that may go on."""
        return self.fraction is None and (self.layers is None or (self.layers[0] >= 0 and self.layers[1] is None))

    def spans(self, stack: Sequence[int]) -> tuple[Span, ...]:
        """The spans that are meant of a stack of these blocks: from a block up to another."""
        blocks = self.blocks(len(stack))
        if self.part is not Part.SPAN or not blocks:
            return ()
        runs = [(b, b) for b in blocks] if self.span == "block" else [(blocks[0], blocks[-1])]
        return tuple((stack[first], stack[last] + 1) for first, last in runs)


def _are_texts(value: object) -> bool:
    """A tuple of texts; a text itself would be taken for its letters."""
    return isinstance(value, tuple) and all(isinstance(item, str) for item in value)


def _is_range(value: object) -> bool:
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    first, end = value
    whole = all(isinstance(block, int) and not isinstance(block, bool) for block in value if block is not None)
    return first is not None and whole and (end is None or (end != 0 and ((first < 0) != (end < 0) or first < end)))


def _counted(block: int, count: Any) -> Any:
    """The number of a block from 0, where a negative one counts from the end."""
    return block + count if block < 0 else block


def _are_shares(value: object) -> bool:
    pair = value if isinstance(value, tuple) and len(value) == 2 else ()
    return len(pair) == 2 and all(map(is_number, pair)) and 0 <= pair[0] < pair[1] <= 1


def _ceil(share: float, count: int) -> int:
    """The first block that lies at or behind a share of the model."""
    return int(sympy.ceiling(sympy.Rational(str(share)) * count))
