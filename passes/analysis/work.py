"""The work of a straight-line graph as a compiler schedules it: a kernel for each contraction, and for each tensor that
elementwise ops make for one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import getitem
from typing import NamedTuple

from torch import Tensor, fx

from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.dimension_rules import SPLITS
from dit_rewrite.passes.analysis.graph import aten, is_contraction, is_view, packet


class Work(NamedTuple):
    """The floating-point operations of a kernel's contraction, and the bytes that it reads and writes."""

    flops: int
    bytes: int


def kernels(graph: fx.Graph) -> Iterator[tuple[fx.Node, Work]]:
    """Yield the kernels of a graph, each by the node that it makes.

    Elementwise ops, norms and views are fused with the op that reads them: only tensors that a contraction reads, or
    that the graph returns, are written to memory.
    """
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if is_contraction(node):
            yield node, Work(cost.flops([node]), _bytes({node, *map(_source, node.all_input_nodes)}))
        elif _is_written(node):
            yield node, Work(0, _bytes({node, *_read(node)}))


def _bytes(nodes: Iterable[fx.Node]) -> int:
    return sum(cost.tensor_bytes(node) for node in nodes if isinstance(node.meta.get("val"), Tensor))


def _is_part(node: fx.Node) -> bool:
    """Return whether a node is a view, of all elements or of some, or a tuple of such views."""
    return is_view(node) or packet(node) in _PARTS or (node.target is getitem and _is_part(node.all_input_nodes[0]))


_PARTS = {*SPLITS, aten.slice, aten.select}


def _source(node: fx.Node) -> fx.Node:
    """Return the tensor in memory that a view reads."""
    while node.op == "call_function" and _is_part(node):
        node = node.all_input_nodes[0]
    return node


def _is_written(node: fx.Node) -> bool:
    """Return whether a tensor that elementwise ops make is read by a contraction, or is an output."""
    if not isinstance(node.meta.get("val"), Tensor) or _source(node) is not node:
        return False
    readers, seen = [*node.users], set[fx.Node]()
    while readers:
        reader = readers.pop()
        if reader.op == "output" or is_contraction(reader):
            return True
        if reader not in seen and _is_part(reader):
            seen.add(reader)
            readers += reader.users
    return False


def _read(node: fx.Node) -> set[fx.Node]:
    """Return the tensors in memory that a fused elementwise kernel reads: those of inputs, and of other kernels."""
    found, todo = set[fx.Node](), [*node.all_input_nodes]
    seen = set(todo)
    while todo:
        source = todo.pop()
        if source.op != "call_function" or is_contraction(source) or _is_written(source):
            found.add(source)
            continue
        fresh = [each for each in source.all_input_nodes if each not in seen]
        seen.update(fresh)
        todo += fresh
    return found
