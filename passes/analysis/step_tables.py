"""Step tables: values that a step computes from its own inputs, the conditioning and weights, or reads from a table.

These are timestep embedders, AdaLN modulation and the final modulation: they depend on the timestep, perhaps on pooled
text, and never on the latent, so their values at each step of a schedule are known before the trajectory begins. This
analysis finds the values that a table would store, and the costs and savings of the table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import getitem

from torch import Tensor, fx

from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.graph import ancestors, aten, is_contraction, is_view, packet
from dit_rewrite.passes.analysis.trajectory_invariant import invariant_nodes, storage
from dit_rewrite.passes.analysis.unbacked import size_assertions
from dit_rewrite.passes.capture import module_paths

_PARTS = {aten.slice, aten.select, aten.narrow, aten.split, aten.split_with_sizes, aten.chunk, aten.unbind}


@dataclass(frozen=True)
class TableValue:
    """One value of a step table: a contraction's result, or a part of it.

    ``path`` is the module that it was traced in, ``bytes`` the size of one row, and ``vectors`` how many vectors a row
    holds: one for each sample, or one for each token. ``conditioning`` names the inputs of conditioning that it depends
    on; without any, its rows outlive the trajectory. ``read_in_reuse``: a step that reuses all sites reads it.
    """

    node: str
    path: str
    bytes: int
    vectors: int
    conditioning: tuple[str, ...]
    read_in_reuse: bool


@dataclass(frozen=True)
class StepTable:
    """The values of a graph's step table.

    ``flops`` are those that each step spends on them. ``released`` names the weights that nothing else reads, of
    ``released_bytes``; ``weight_bytes`` is the size of all weights of the graph.
    """

    values: tuple[TableValue, ...]
    flops: int
    released: tuple[str, ...]
    released_bytes: int
    weight_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, all values together."""
        return sum(value.bytes for value in self.values)

    @property
    def reuse_bytes(self) -> int:
        """Bytes that a step reads which reuses all sites."""
        return sum(value.bytes for value in self.values if value.read_in_reuse)

    @property
    def released_share(self) -> float:
        """The share of the weights that nothing but the table's values reads."""
        return self.released_bytes / self.weight_bytes if self.weight_bytes else 0.0


def step_table(
    graph: fx.Graph,
    weights: Collection[int],
    conditioning: Collection[int],
    step_inputs: Collection[int],
    reused: Iterable[str] = (),
    max_vectors: int | None = None,
) -> StepTable:
    """Find the values of the step table of a functional graph.

    The positions are those of the placeholders that hold weights, conditioning and the step's own inputs (timestep).
    `reused` names the nodes whose values a reusing step takes from the cache: those of all sites. Values of more than
    `max_vectors` vectors are left out, with all values computed from them: rows with a vector for each token are large.
    """
    moving = _moving_nodes(graph, {*weights, *conditioning}, step_inputs)
    if max_vectors is not None:
        moving = _without_large(moving, max_vectors)
    ends = [node for node in graph.nodes if node.op == "output" or _acts(node)]
    values = _frontier(moving, ancestors(ends))
    names = set(reused)
    needed = set(ends) - size_assertions(graph)  # a reusing step drops these
    reusing = ancestors(needed, [node for node in graph.nodes if node.name in names])
    places = {_place(node): node for node in values}
    read = {whole for piece in _frontier(moving, reusing) if (whole := _within(piece, places)) is not None}
    given = _at(graph, conditioning)
    table = tuple(_value(node, given, node in read) for node in values)
    return _priced(graph, table, moving, ancestors(ends, _twins(moving, values)), weights)


def table_columns(graph: fx.Graph, invariant: Iterable[int], step_inputs: Iterable[int]) -> dict[fx.Node, fx.Node]:
    """Map each node that a step may read from its table to the column that holds its value, in the order of the graph.

    `invariant` are the positions of weights and conditioning. A column is the result of a contraction, or a part of it;
    nodes that take the same part of the same result share the first one's column.
    """
    moving = _without_collectives(_moving_nodes(graph, invariant, step_inputs))
    first: dict[object, fx.Node] = {}
    pieces = (node for node in moving if isinstance(node.meta["val"], Tensor) and storage(node) is node)
    return {node: first.setdefault(_place(node), node) for node in pieces if _is_piece(node, moving)}


def containing_columns(column: fx.Node, columns: Collection[fx.Node]) -> frozenset[fx.Node]:
    """Return the columns that `column` is a part of."""
    return frozenset(base for base in _bases(column) if base in columns)


def _without_collectives(moving: dict[fx.Node, None]) -> dict[fx.Node, None]:
    """Return the moving nodes without collectives, and without the nodes that are computed from those.

    Ranks that fill their tables at different times would wait for each other.
    """
    left: set[fx.Node] = set()
    for node in moving:
        collective = "c10d" in str(getattr(node.target, "namespace", ""))
        if collective or any(argument in left for argument in node.all_input_nodes):
            left.add(node)
    return dict.fromkeys(node for node in moving if node not in left)


def _moving_nodes(graph: fx.Graph, invariant: Iterable[int], step_inputs: Iterable[int]) -> dict[fx.Node, None]:
    """Return the nodes that depend on a step input and on invariant inputs alone, in the order of the graph."""
    invariant = set(invariant)
    steady = invariant_nodes(graph, invariant)
    known = invariant_nodes(graph, invariant | set(step_inputs))
    return dict.fromkeys(node for node in known if node not in steady)


def _without_large(moving: dict[fx.Node, None], max_vectors: int) -> dict[fx.Node, None]:
    """The moving nodes less the contractions of more vectors, and less the nodes computed from those."""
    left: set[fx.Node] = set()
    for node in moving:
        large = is_contraction(node) and cost.vectors(node) > max_vectors
        if large or any(argument in left for argument in node.all_input_nodes):
            left.add(node)
    return dict.fromkeys(node for node in moving if node not in left)


def _acts(node: fx.Node) -> bool:
    return node.op == "call_function" and node.is_impure()


def _frontier(moving: dict[fx.Node, None], live: set[fx.Node]) -> dict[fx.Node, None]:
    """The results of contractions, or parts of them, that live nodes outside the moving ones are computed from.

    Elementwise ops between such a result and its reader stay in the step: they cost little, and many may share one
    result, as the blocks of PixArt and Wan do, each of which adds its own weights to the same modulation.
    """
    stack = [argument for node in live if node not in moving for argument in node.all_input_nodes]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in moving and node not in seen:
            seen.add(node)
            stack += () if _is_piece(node, moving) else node.all_input_nodes
    pieces = [storage(node) for node in moving if node in seen and _is_piece(node, moving)]
    first: dict[object, fx.Node] = {}
    for node in pieces:
        first.setdefault(_place(node), node)  # FLUX.2 splits one modulation anew in each block
    whole = dict.fromkeys(first.values())
    return {node: None for node in whole if not any(base in whole for base in _bases(node))}


def _is_piece(node: fx.Node, moving: Collection[fx.Node]) -> bool:
    """Whether a node is the result of a contraction that belongs to the step, a view of it, or a part of it."""
    while node in moving and not is_contraction(node):
        if not (is_view(node) or _is_part(node)):
            return False
        node = node.all_input_nodes[0]
    return node in moving


def _is_part(node: fx.Node) -> bool:
    """A slice of a tensor, or an op that splits it, or an item of the latter's result."""
    return packet(node) in _PARTS or (node.target is getitem and packet(node.all_input_nodes[0]) in _PARTS)


def _bases(node: fx.Node) -> list[fx.Node]:
    """The nodes that a part of a contraction's result is taken from, up to the result itself."""
    bases = []
    while not is_contraction(node):
        node = node.all_input_nodes[0]
        bases.append(node)
    return bases


def _place(node: fx.Node) -> object:
    """Which part of which contraction's result a piece is: equal for two nodes that take the same part."""
    if is_contraction(node):
        return node
    others = tuple(str(argument) for argument in node.args[1:])
    return _place(node.all_input_nodes[0]), node.target, others, str(node.kwargs)


def _twins(moving: dict[fx.Node, None], values: Collection[fx.Node]) -> list[fx.Node]:
    """The values, and the nodes that take the same part of the same result."""
    places = {_place(node) for node in values}
    return [node for node in moving if _is_piece(node, moving) and _place(node) in places]


def _within(piece: fx.Node, places: Mapping[object, fx.Node]) -> fx.Node | None:
    """The value of the table, by its place, that a piece is or is a part of."""
    around = map(_place, (piece, *_bases(piece)))
    return next((places[place] for place in around if place in places), None)


def _at(graph: fx.Graph, positions: Collection[int]) -> set[fx.Node]:
    """The placeholders at some positions."""
    return {node for i, node in enumerate(graph.find_nodes(op="placeholder")) if i in positions}


def _value(node: fx.Node, conditioning: set[fx.Node], read: bool) -> TableValue:
    origins = ancestors([node])
    names = tuple(sorted(origin.name for origin in conditioning & origins))
    path, size = module_paths.module_path(node), cost.tensor_bytes(node)
    return TableValue(node.name, path, size, cost.vectors(node), names, read)


def _priced(
    graph: fx.Graph,
    values: tuple[TableValue, ...],
    moving: dict[fx.Node, None],
    kept: set[fx.Node],
    weights: Collection[int],
) -> StepTable:
    """Return the table of these values; a step that reads them still needs the nodes `kept`."""
    known = _at(graph, weights)
    held = [node for node in graph.nodes if node in known]
    released = [node for node in held if node.users and node not in kept]
    return StepTable(
        values,
        cost.flops(node for node in moving if node not in kept),
        tuple(node.name for node in released),
        sum(map(cost.tensor_bytes, released)),
        sum(map(cost.tensor_bytes, held)),
    )
