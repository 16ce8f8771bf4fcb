"""Where a rule applies: values out of range, selected sites, and the blocks and spans of a place."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_rewrite.errors import BadParameter, LayersOutside
from dit_rewrite.passes.analysis.site import Kind, Part, Site
from dit_rewrite.passes.guards.symbols import Predicate, layer, num_layers
from dit_rewrite.policy.where import FAMILIES, Where


def site(name: str = "blocks.1.attn", kind: Kind = Kind.SELF, part: Part = Part.BRANCH, **more: Any) -> Site:
    return Site(name, kind, ("value",), ("stream",), "blocks.1", 1, part=part, **more)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("kinds", value) for value in (("ff",), ("span",), ("hoisted",), ("self", "Self"), ("",))],
        *[("layers", value) for value in ((2, 2), (3, 2), (0, 0), (-1, 0), (-1, -1), (None, 2))],
        *[
            ("fraction", value)
            for value in ((-0.1, 0.5), (0.5, 0.5), (0.6, 0.5), (0, 1.01), (0, math.nan), (math.nan, 1))
        ],
        *[("span", value) for value in ("blocks", "", True, 1)],
        *[("stack", value) for value in ("blocks", "", 1)],  # without a span
    ],
)
def test_out_of_range(field: str, value: Any) -> None:
    """Values that fit no model are refused, by name and value."""
    with pytest.raises(BadParameter, match=f"Where: {field}="):
        Where(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("kinds", value) for value in ((), ("self",), tuple(FAMILIES), ("attention", "mlp"))],
        *[("layers", value) for value in ((0, 1), (0, None), (7, 9), (3, None))],
        *[("fraction", value) for value in ((0, 1), (0.5, 1), (0, 0.1), (0.25, 0.75))],
        *[("span", value) for value in ("block", "stack", None)],
        *[("names", value) for value in ("", "*", "blocks.[0-3].attn")],
        *[("streams", value) for value in ((), ("cond",), ("cond", "uncond"))],
    ],
)
def test_in_range(field: str, value: Any) -> None:
    assert getattr(Where(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        ("*", True),
        ("blocks.1.attn", True),
        ("blocks.*.attn", True),
        ("blocks.?.att[mn]", True),
        ("blocks.1", False),
        ("BLOCKS.*", False),
        ("", False),
        ("*.ff", False),
    ],
)
def test_names(pattern: str, selected: bool) -> None:
    """Patterns work as for file names; they are case-sensitive on every system."""
    assert Where(names=pattern).selects(site()) is selected
    assert Where(names=pattern, span="block").selects(site(part=Part.SPAN, span=(1, 2)), [(1, 2)]) is selected


def test_branches_and_their_keys() -> None:
    """A site of keys and values is selected by the kind of its branch."""
    for part in (Part.BRANCH, Part.KV):
        assert Where(("self",)).selects(site(part=part))
        assert not Where(("mlp", "cross")).selects(site(part=part))
    assert Where(("attention", "mlp")).selects(site(kind=Kind.PARALLEL))
    assert not Where(("attention",)).selects(site(kind=Kind.PARALLEL))


def test_spans_are_selected_as_what_they_are() -> None:
    """A place of branches selects no span, a place of spans no branch, and only its own spans."""
    span = site("blocks.1..blocks.3", Kind.SPAN, Part.SPAN, span=(1, 4))
    assert not Where().selects(span)
    assert not Where().selects(span, [(1, 4)])
    for kinds in (tuple(FAMILIES), ("mlp",)):  # kinds do not matter
        where = Where(kinds, span="stack")
        assert where.selects(span, [(0, 2), (1, 4)])
        assert not where.selects(span, [(0, 2)])
        assert not where.selects(span)
        assert not where.selects(site(), [(1, 4)])


@pytest.mark.parametrize(
    ("streams", "stream", "selected"),
    [
        (None, "cond", True),
        (None, None, True),
        (("cond",), "cond", True),
        (("cond",), "uncond", False),
        (("cond",), 0, False),
        (("cond",), None, False),
        ((), "cond", False),
    ],
)
def test_streams(streams: Any, stream: Any, selected: bool) -> None:
    """A call without a name belongs to no named stream."""
    assert Where(streams=streams).in_stream(stream) is selected


@pytest.mark.parametrize(
    ("where", "count", "blocks"),
    [
        (Where(), 4, [0, 1, 2, 3]),
        (Where(layers=(1, None)), 4, [1, 2, 3]),
        (Where(layers=(1, 3)), 4, [1, 2]),
        (Where(layers=(0, 4)), 4, [0, 1, 2, 3]),
        (Where(fraction=(0, 0.5)), 4, [0, 1]),
        (Where(fraction=(0.5, 1)), 4, [2, 3]),
        (Where(fraction=(0, 0.5)), 5, [0, 1, 2]),  # block 2 begins at 0.4
        (Where(fraction=(0.5, 1)), 5, [3, 4]),
        (Where(fraction=(0.1, 0.3)), 10, [1, 2]),  # in floating point 0.3 * 10 is no whole number
        (Where(fraction=(0.9, 1)), 4, []),
        (Where(layers=(1, None), fraction=(0, 0.5)), 4, [1]),
        (Where(layers=(1, -1)), 4, [1, 2]),
        (Where(layers=(-2, None)), 4, [2, 3]),
        (Where(layers=(-3, -1)), 4, [1, 2]),
        (Where(layers=(-3, 3)), 5, [2]),
    ],
)
def test_blocks(where: Where, count: int, blocks: list[int]) -> None:
    """As a range, and the same by its guard."""
    assert list(where.blocks(count)) == blocks
    assert [i for i in range(count) if holds(where, i, count)] == blocks


def holds(where: Where, i: int, count: int) -> bool:
    return Predicate.of(where.guard).holds({"layer": i, "num_layers": count})


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 20), st.integers(1, 20), st.integers(0, 20), st.integers(1, 20), st.integers(1, 60))
def test_shares_of_any_model(a: int, b: int, c: int, d: int, count: int) -> None:
    """Consecutive shares split the blocks; the guard and the range always agree."""
    first, last = sorted((min(a / b, 1.0), min(c / d, 1.0)))
    parts = [(x, y) for x, y in ((0.0, first), (first, last), (last, 1.0)) if x < y]
    places = [Where(fraction=part) for part in parts]
    assert [i for where in places for i in where.blocks(count)] == list(range(count))
    for where in places:
        assert [i for i in range(count) if holds(where, i, count)] == list(where.blocks(count))


@pytest.mark.parametrize("layers", [(4, None), (5, 6), (0, 5), (3, 9), (2, -2), (-5, None), (1, -4), (-1, 3)])
def test_layers_outside(layers: Any) -> None:
    """Blocks that the model does not have give an error with the number of blocks."""
    with pytest.raises(LayersOutside, match=r"is outside the model, which has 4 blocks.*end <= 4"):
        Where(layers=layers).check(4)
    assert Where(layers=layers, span="stack").spans(range(4)) == (), "of a stack that is not all of the model"


@pytest.mark.parametrize(
    ("where", "spans"),
    [
        (Where(), ()),
        (Where(span="block"), ((0, 1), (1, 2), (2, 3), (3, 4))),
        (Where(span="stack"), ((0, 4),)),
        (Where(span="stack", layers=(1, None)), ((1, 4),)),
        (Where(span="block", layers=(1, 3)), ((1, 2), (2, 3))),
        (Where(span="stack", layers=(1, -1)), ((1, 3),)),
        (Where(span="block", layers=(-1, None)), ((3, 4),)),
        (Where(span="stack", fraction=(0.25, 0.75)), ((1, 3),)),
        (Where(span="stack", fraction=(0.9, 1)), ()),
        (Where(span="block", fraction=(0.9, 1)), ()),
    ],
)
def test_spans(where: Where, spans: Any) -> None:
    assert where.spans(range(4)) == spans


def test_spans_of_a_stack_among_others() -> None:
    """Layers and shares count the blocks of the stack, and the names of spans those of the model."""
    stack = (1, 3, 5, 7)
    assert Where(span="block", layers=(1, 3)).spans(stack) == ((3, 4), (5, 6))
    assert Where(span="stack", layers=(1, None)).spans(stack) == ((3, 8),)
    assert Where(span="stack", fraction=(0, 0.5)).spans(stack) == ((1, 4),)
    assert Where(span="stack").spans(()) == ()


def test_what_is_open() -> None:
    """A part of a model does not know its last block: numbers from the end, and shares, select nothing there."""
    known = {layers: Where(layers=layers).is_open for layers in [(1, None), (1, 3), (1, -1), (-2, None)]}
    assert known == {(1, None): True, (1, 3): False, (1, -1): False, (-2, None): False}


def test_the_guard_of_everything() -> None:
    """A place that selects all blocks adds nothing to a guard, and a place that selects some adds its condition."""
    for where in (Where(), Where(layers=(0, None)), Where(fraction=(0, 1))):
        assert where.guard == sympy.true
    assert Where(layers=(2, None)).guard == (layer >= 2)
    assert Where(layers=(0, 3)).guard == (layer < 3)
    assert Where(fraction=(0, 0.5)).guard.free_symbols == {layer, num_layers}


def test_places_are_values() -> None:
    """Equal places are one dictionary key."""
    assert {Where(): 1}[Where()] == 1
    assert replace(Where(), span="block") == Where(span="block") != Where()
