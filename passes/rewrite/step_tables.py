"""Step tables: take the values that depend on the step and the conditioning alone out of the steps that reuse.

A reusing step reads these values from a table with a row for each step, so the timestep embedders and the modulation
are not computed in it. A computing step computes them, so reuse 0 is exact by construction.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from dit_rewrite.errors import TableReason
from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.graph import ancestors
from dit_rewrite.passes.analysis.liveness import owner, peak_bytes
from dit_rewrite.passes.analysis.step_tables import containing_columns, table_columns
from dit_rewrite.passes.capture import opaque_attention
from dit_rewrite.passes.rewrite.subgraph import subgraph


@dataclass(frozen=True)
class StepTables:
    """The step table of a graph. Columns are names of nodes in ``source``.

    columns: maps each node that may be read from the table to its column. within: maps a column to the columns that
    contain it. step: the positions of the inputs that hold the timestep; weights, conditioning, sizes: those of the
    other inputs that the columns are computed from. everywhere: computing steps read the table too. why: the reason why
    there is no table.
    """

    source: fx.GraphModule
    columns: Mapping[str, str] = field(default_factory=dict)
    within: Mapping[str, frozenset[str]] = field(default_factory=dict)
    step: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()
    conditioning: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    everywhere: bool = False
    why: TableReason | None = None

    def reads(self, row: Sequence[bool]) -> bool:
        """Return whether a segment reads the table in a step with these decisions."""
        return bool(self.columns) and (self.everywhere or any(row))

    def bytes_of(self, columns: Collection[str]) -> int:
        """Return the bytes of one row with these columns."""
        return sum(cost.tensor_bytes(node) for node in self.source.graph.nodes if node.name in columns)

    def peak_of(self, columns: Collection[str]) -> int:
        """Return the most bytes that each row takes while rows with these columns are computed at once.

        Only values that depend on the timestep have an element for each row. At the end the rows are copied.
        """
        values = [node for node in self.source.graph.nodes if node.name in columns]
        needed = ancestors(values)
        nodes = [node for node in self.source.graph.nodes if node in needed]
        moving = {node for i, node in enumerate(self.source.graph.find_nodes(op="placeholder")) if i in self.step}
        for node in nodes:
            moving |= {node} if any(argument in moving for argument in node.all_input_nodes) else set()
        finished = peak_bytes(list(dict.fromkeys(map(owner, values))), moving, values)
        return max(peak_bytes(nodes, moving, values), finished + self.bytes_of(columns))

    def program(self, columns: Collection[str]) -> tuple[fx.GraphModule, tuple[int, ...]]:
        """Return a graph that computes one row with these columns, and the positions of the inputs that it takes."""
        named = {node.name: node for node in self.source.graph.nodes}
        values = [named[name] for name in columns]
        needed = ancestors(values)
        placeholders = list(enumerate(self.source.graph.find_nodes(op="placeholder")))
        taken = [(i, node) for i, node in placeholders if node in needed]
        gm = subgraph(self.source, [node for _, node in taken], (), needed, values)
        opaque_attention.unmark(gm)
        gm.recompile()
        return gm, tuple(i for i, _ in taken)

    def describe(self) -> Iterator[str]:
        """Yield a line for each column with its bytes, or the reason why there is no table."""
        if self.why is not None:
            yield f"no table: {self.why}"
        for name in dict.fromkeys(self.columns.values()):
            yield f"{self.bytes_of((name,)):10d} bytes  {name}"


def tabulate(
    gm: fx.GraphModule,
    weights: Collection[int],
    conditioning: Collection[int],
    step: Collection[int],
    told: bool,
    readable: bool,
    everywhere: bool = False,
) -> StepTables:
    """Find the step table of a functional graph. Does not modify it.

    The positions are those of the inputs that hold weights, conditioning and the timestep. `told`: the timesteps of the
    trajectory are known ahead. `readable`: the timestep of a call is known without a device read. There is no table if
    every row would be read once only: the values depend on the conditioning, and the timesteps are not known ahead or
    are numbers, which have no batch.
    """
    columns = table_columns(gm.graph, {*weights, *conditioning}, step)
    distinct = dict.fromkeys(columns.values())
    needed = ancestors(distinct)
    inputs = [(i, node) for i, node in enumerate(gm.graph.find_nodes(op="placeholder")) if node in needed]
    read = [i for i, _ in inputs]
    conditioned = tuple(i for i in read if i in conditioning)
    steps = [node for i, node in inputs if i in step]
    batched = all(isinstance(node.meta["val"], Tensor) for node in steps)
    why = _refusal(bool(step), bool(columns), readable, batched or not conditioned, told or not conditioned)
    if why is not None:
        return StepTables(gm, why=why)
    known = {*weights, *conditioning, *step}
    return StepTables(
        gm,
        {node.name: column.name for node, column in columns.items()},
        {column.name: frozenset(c.name for c in containing_columns(column, distinct)) for column in distinct},
        tuple(i for i in read if i in step),
        tuple(i for i in read if i in weights),
        conditioned,
        tuple(i for i in read if i not in known),
        everywhere,
    )


def _refusal(has_step: bool, has_columns: bool, readable: bool, batched: bool, pays: bool) -> TableReason | None:
    checks = (
        (has_step, TableReason.NO_TIMESTEP),
        (has_columns, TableReason.NO_VALUES),
        (readable, TableReason.ON_DEVICE),
        (batched, TableReason.WHOLE_NUMBER),
        (pays, TableReason.NOT_TOLD),
    )
    return next((reason for holds, reason in checks if not holds), None)
