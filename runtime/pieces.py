"""The compiled pieces of a graph, the wires that run between them, and how one is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Row = tuple[bool, ...]


@dataclass(frozen=True)
class Executable:
    """A compiled variant: it takes the wires ``inputs`` and the slots at ``cached`` (pairs of site and index), and
    returns the wires ``outputs``, then the contents of the slots ``fresh``.

    ``admits`` is set where compiling assumed something of the sizes that Dynamo does not check.
    """

    run: Callable[..., Sequence[Any]]
    inputs: tuple[int, ...]
    cached: tuple[tuple[int, int], ...]
    outputs: tuple[int, ...]
    fresh: tuple[tuple[int, int], ...]
    admits: Callable[[Sequence[Any]], bool] | None = None


@dataclass
class Piece:
    """A segment of the graph, or all of it: its code for each row of the decisions that it depends on.

    ``sites`` are those decisions' sites, ``spent`` the wires that nothing behind it reads. None among ``variants``:
    under that row it has nothing to do.
    """

    sites: tuple[int, ...]
    spent: tuple[int, ...] = ()
    variants: dict[Row, Executable | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Wiring:
    """The wires of a graph.

    Wires below ``num_inputs`` are its inputs: the arguments of the call, then ``num_hoisted`` hoisted values.
    ``outputs`` has a wire for each value that the graph returns, or a constant in a tuple of its own. ``static``,
    ``steady`` and ``ambient`` are inputs: weights, the call's conditioning, and attributes of the model.
    """

    num_wires: int
    num_inputs: int
    outputs: tuple[int | tuple[Any], ...]
    static: frozenset[int] = frozenset()
    steady: frozenset[int] = frozenset()
    ambient: frozenset[int] = frozenset()
    num_hoisted: int = 0


class Unadmitted(Exception):
    """A piece was compiled for other sizes."""


def execute(
    executable: Executable, wires: list[Any], slots: Sequence[tuple[Tensor, ...] | None]
) -> list[tuple[tuple[int, int], Tensor]]:
    """Run a variant on the wires, and put its outputs on them; what it made for the slots."""
    cached = [slots[site][k] for site, k in executable.cached]  # type: ignore[index]
    results = executable.run(*[wires[i] for i in executable.inputs], *cached)
    for wire, value in zip(executable.outputs, results, strict=False):
        wires[wire] = value
    return list(zip(executable.fresh, results[len(executable.outputs) :], strict=True))
