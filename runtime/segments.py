"""Compiled segments of a graph, and the wires that carry values between them.

A wire is an index into the list of a call's values: first the graph inputs, then the values that segments export.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any

from torch import Tensor

from dit_rewrite.decision_row import DecisionRow
from dit_rewrite.errors import GraphReason


@dataclass(frozen=True)
class Executable:
    """The compiled code of one variant of a segment.

    ``run`` takes the wires ``inputs`` and the cached tensors at ``cached``, pairs of site and index in its slot. It
    returns the wires ``outputs``, followed by the new tensors of the slots at ``fresh``. If compilation specialised on
    sizes that Dynamo does not guard, ``admits`` returns whether the graph's inputs have these sizes. The last inputs of
    ``run`` are the values of the step table in ``columns``. ``uncapturable``: why no CUDA graph can be captured of it.
    """

    run: Callable[..., Sequence[Any]]
    inputs: tuple[int, ...]
    cached: tuple[tuple[int, int], ...]
    outputs: tuple[int, ...]
    fresh: tuple[tuple[int, int], ...]
    admits: Callable[[Sequence[Any]], bool] | None = None
    columns: tuple[str, ...] = ()
    uncapturable: GraphReason | None = None

    @cached_property
    def take(self) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        """Returns the wires that ``run`` takes."""
        return chosen(self.inputs)


@dataclass
class Segment:
    """The part of a graph between two cuts of the residual stream (the whole graph if there are none).

    ``variants`` maps a row of the decisions for ``sites`` to the compiled code, or to None if nothing is left to run.
    ``spent`` are the wires that no later segment reads.
    """

    sites: tuple[int, ...]
    spent: tuple[int, ...] = ()
    variants: dict[DecisionRow, Executable | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Wiring:
    """The wires of a graph. Wires below ``num_inputs`` are its inputs, the last ``num_hoisted`` of them hoisted.

    ``outputs`` has an entry for each result: a wire, or a 1-tuple with a constant. Among the inputs, ``static`` are
    weights, ``steady`` trajectory-invariant conditioning, ``ambient`` tensor attributes of the model, ``unknown``
    tensors that are none of these, no other argument and no result of an earlier graph, and ``unread`` numbers that no
    op reads.
    """

    num_wires: int
    num_inputs: int
    outputs: tuple[int | tuple[Any], ...]
    static: frozenset[int] = frozenset()
    steady: frozenset[int] = frozenset()
    ambient: frozenset[int] = frozenset()
    unknown: frozenset[int] = frozenset()
    num_hoisted: int = 0
    unread: frozenset[int] = frozenset()


class SizesNotCompiled(Exception):
    """Raised if a segment was compiled for other input sizes."""


def chosen(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Return a function that takes the items at `positions` from a sequence. It is fast for many positions."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda items: tuple([items[i] for i in positions])


def gather(
    executable: Executable, wires: Sequence[Any], slots: Sequence[tuple[Tensor, ...] | None], table: Sequence[Tensor]
) -> list[Any]:
    """Return the inputs of a variant, in the order of its parameters."""
    cached = [slots[site][k] for site, k in executable.cached]  # type: ignore[index]
    return [*executable.take(wires), *cached, *table]


def execute(
    executable: Executable,
    wires: list[Any],
    slots: Sequence[tuple[Tensor, ...] | None],
    table: Sequence[Tensor] = (),
) -> list[tuple[tuple[int, int], Tensor]]:
    """Run a variant and write its outputs to `wires`. `table` has the values of its columns.

    Returns its new slot tensors as ((site, index), tensor) pairs.
    """
    results = executable.run(*gather(executable, wires, slots, table))
    for wire, value in zip(executable.outputs, results, strict=False):
        wires[wire] = value
    return list(zip(executable.fresh, results[len(executable.outputs) :], strict=True))
