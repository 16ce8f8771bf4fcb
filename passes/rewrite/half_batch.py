"""Compute a branch for one half of a guided batch and use it for both (ASC: attention sharing across CFG, DiTFastAttn).

A guided batch has a conditional and an unconditional half. If a branch gives nearly the same result for both, it is
computed for one half, and the result is repeated. Because the graph of the branch has constant sizes, it is rewritten
for half of the batch. batch.py proves that samples do not mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem
from typing import Any, Literal, cast

from torch import Tensor, fx

from dit_rewrite import torch_compat
from dit_rewrite.passes.analysis.graph import aten, attribute, needed, packet
from dit_rewrite.passes.rewrite.batch import Batch, Flow, batch_labels
from dit_rewrite.passes.rewrite.fake import evaluate

__all__ = ["Batch", "batch_labels", "halve"]

_SIZES = {  # the arguments that give the size of dim 0
    aten.view: "size", aten._unsafe_view: "size", aten.reshape: "shape", aten.expand: "size",
    aten.native_group_norm: "N",
}  # fmt: skip
_COPIED_META = ("position", "home", "values", "nn_module_stack", "stack_trace")


def halve(body: fx.GraphModule, labels: Sequence[Batch], batch: int, half: Literal[0, 1]) -> fx.GraphModule | None:
    """Return a graph with the inputs of `body` that computes one half of the batch and repeats it in its outputs.

    `labels` are the labels of the placeholders. Half 0 is samples 0 .. batch/2 - 1. The other half is never read,
    because LEADING placeholders are narrowed first. Returns None if samples mix, the batch is odd, or a LEADING output
    is not a tensor. If the nodes of `body` have a ``position``, a new node gets one next to that of the node that it
    was made for, whose position becomes its ``home`` (insert_guards.py). A copy that computes one half of the rows has
    the number of that ``half``.
    """
    if batch < 2 or batch % 2:
        return None
    flow = Flow(body.graph, labels, batch)
    results: Any = body.graph.output_node().args[0]
    computed = [node for node in needed(body.graph, ()) if node.op not in ("placeholder", "output")]
    if Batch.MIXED in map(flow.of, (*computed, *results)):
        return None
    if any(flow.of(r) is Batch.LEADING and not isinstance(r.meta["val"], Tensor) for r in results):
        return None
    return _Halver(body, flow, half).run(list(map(flow.of, results)))


def half_of(graph: fx.Graph, whole: fx.Node, half: Literal[0, 1]) -> fx.Node:
    """Write a node with one half of the rows of another node."""
    count = whole.meta["val"].shape[0] // 2
    rows = graph.call_function(aten.slice.Tensor, (whole, 0, half * count, (half + 1) * count))
    rows.meta = {"val": whole.meta["val"].narrow(0, half * count, count)}
    return rows


class _Halver:
    """Writes a graph for half of the batch. Inputs have the whole batch and outputs are repeated, but not in a subgraph
    of it (`inner`).

    ``whole`` and ``halves`` map nodes of the old graph to nodes with all rows, or with the rows of one half.
    """

    def __init__(self, gm: fx.GraphModule, flow: Flow, half: int, inner: bool = False) -> None:
        self.gm, self.flow, self.half, self.inner = gm, flow, half, inner
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.whole: dict[fx.Node, fx.Node] = {}
        self.halves: dict[fx.Node, fx.Node] = {}
        self.mode = torch_compat.detect_fake_mode([node.meta.get("val") for node in gm.graph.nodes])

    def run(self, wanted: Sequence[Batch]) -> fx.GraphModule:
        """Return the graph. An output whose label in `wanted` is LEADING has half of the rows."""
        used = needed(self.gm.graph, ())
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self._input(node)
            elif node in self.flow.results and node in used:
                self._call(node)
            elif node.op == "get_attr" and node in used and node not in self.flow.inner:
                self._attribute(node)
            elif node.op == "call_function" and node in used:
                self._copy(node)
        results: Any = self.gm.graph.output_node().args[0]
        self.graph.output(tuple(self._output(r, label) for r, label in zip(results, wanted, strict=True)))
        return fx.GraphModule(self.attributes, self.graph)

    def _input(self, node: fx.Node) -> None:
        """Copy an input. In a subgraph, a LEADING input already has half of the rows."""
        new = self.whole[node] = self.graph.node_copy(node)
        if self.inner and self.flow.labels[node] is Batch.LEADING:
            new.meta["val"] = evaluate(self.mode, aten.slice.Tensor, (new, 0, 0, node.meta["val"].shape[0] // 2), {})
            self.halves[node] = self.whole.pop(node)

    def _attribute(self, node: fx.Node) -> None:
        new = self.whole[node] = self.graph.node_copy(node)
        value = self.attributes[str(node.target)] = attribute(self.gm, node)
        if isinstance(value, Tensor):
            new.meta.setdefault("val", value if self.mode is None else self.mode.from_tensor(value))

    def _copy(self, node: fx.Node) -> None:
        """Copy a node, for half of the batch if it is LEADING."""
        if self.flow.labels[node] is not Batch.LEADING:
            self.whole[node] = self.graph.node_copy(node, self.whole.__getitem__)
            return
        if node.target is getitem and node.args[0] not in self.halves:  # an input tuple cannot be narrowed
            self.whole[node] = self.graph.node_copy(node, self.whole.__getitem__)
            return
        leading = self.flow.leading_operands.get(node, frozenset(node.all_input_nodes))  # default: a site's result
        both = (node.args, node.kwargs) if node.target is getitem else _with_half_size(node)
        args, kwargs = fx.map_arg(both, lambda n: self._half(n) if n in leading else self.whole[n])
        self.halves[node] = self._write(node.name, node.target, args, kwargs, {**_copied_meta(node), "half": self.half})
        assert _is_half(self.halves[node].meta["val"], node.meta["val"]), node.format_node()

    def _call(self, node: fx.Node) -> None:
        """Copy a cache_or_compute node with its subgraphs for half of the batch."""
        reuse, cached, compute, live_ins = cast("tuple[Any, ...]", node.args)
        wanted = self.flow.results[node]
        bodies: dict[Any, fx.Node] = {}
        for body, flow in ((body, self.flow.inner[body]) for body in node.all_input_nodes if body in self.flow.inner):
            self.attributes[str(body.target)] = _Halver(attribute(self.gm, body), flow, self.half, inner=True).run(
                wanted
            )
            bodies[body] = self.graph.get_attr(str(body.target))
        instead = node.kwargs.get("instead")
        slots = tuple(map(self._either, cached, wanted if instead is None else (Batch.SAME,) * len(cached)))
        args = self._either(reuse), slots, bodies[compute], tuple(map(self._either, live_ins))
        kwargs = {**node.kwargs, **({} if instead is None else {"instead": bodies[instead]})}
        new = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        results: Any = self.attributes[str(compute.target)].graph.output_node().args[0]
        new.meta = {**_copied_meta(node), "val": fx.map_arg(results, lambda n: n.meta["val"])}
        self.whole[node] = self.halves[node] = new  # its results may be of either kind

    def _either(self, argument: Any, wanted: Batch = Batch.SAME) -> Any:
        """Return the new argument: half of the rows if it is, or is wanted, LEADING, else all of them."""
        if not isinstance(argument, fx.Node):
            return argument
        is_half = Batch.LEADING in (self.flow.labels[argument], wanted)
        return self._half(argument) if is_half else self.whole[argument]

    def _half(self, node: fx.Node) -> fx.Node:
        """Return the half of a node's value. The half of an input or of an EQUAL value is sliced once."""
        if node not in self.halves:
            count = node.meta["val"].shape[0] // 2
            start = count if self.half and not self.inner and self.flow.labels[node] is Batch.LEADING else 0
            rows, meta = (self.whole[node], 0, start, start + count), _before_readers(node)
            self.halves[node] = self._write(f"{node.name}_half", aten.slice.Tensor, rows, {}, meta)
        return self.halves[node]

    def _output(self, result: Any, label: Batch) -> Any:
        value = self._either(result, label)
        if self.inner or label is not Batch.LEADING:
            return value
        return self._both(result, value)

    def _both(self, result: fx.Node, value: fx.Node) -> fx.Node:
        """Repeat the half of a result, with the memory order of the result, because readers of a slot rely on it."""
        strides = result.meta["val"].stride()
        order = sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim))
        back = [order.index(dim) for dim in range(len(order))]
        name, place = f"{result.name}_both", _place(result)
        if order == sorted(order):
            return self._write(name, aten.cat.default, ([value, value], 0), {}, _beside(place, _NEXT))
        laid = self._write(f"{name}_laid", aten.permute.default, (value, order), {}, _beside(place, _NEXT))
        twice = self._write(f"{name}_twice", aten.cat.default, ([laid, laid], back[0]), {}, _beside(place, 2 * _NEXT))
        return self._write(name, aten.permute.default, (twice, back), {}, _beside(place, 3 * _NEXT))

    def _write(
        self, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], meta: dict[str, Any]
    ) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        node.meta = {**meta, "val": evaluate(self.mode, target, args, kwargs)}
        return node


def _with_half_size(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call, with the size of dim 0 halved if one of them gives it."""
    args, kwargs = list(node.args), dict(node.kwargs)
    name = _SIZES.get(packet(node))
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    if name in names:
        where: Any = (args, names.index(name)) if names.index(name) < len(args) else (kwargs, name)
        where[0][where[1]] = _halved(where[0][where[1]])
    return tuple(args), kwargs


def _halved(size: Any) -> Any:
    """Return half of a size, or sizes with the first one halved. -1 stays, because torch infers it."""
    if isinstance(size, (list, tuple)):
        return [_halved(size[0]), *size[1:]]
    return size if size == -1 else size // 2


def _is_half(new: Any, old: Any) -> bool:
    """Return whether `new` has half of the rows of `old`, and otherwise the same shape and dtype."""
    if isinstance(old, Tensor):
        return new.dtype == old.dtype and (2 * new.shape[0], *new.shape[1:]) == tuple(old.shape)
    return all(map(_is_half, new, old))


def _copied_meta(node: fx.Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in _COPIED_META if key in node.meta}


# --- the positions of the new nodes in a straight-line graph (specialise.py) ------------------------------------------

_Place = tuple[float, int]  # position and home
_NEXT = 2.0**-10  # right after a node, before the nodes that encode it for a slot (codec.py)


def _place(node: fx.Node) -> _Place | None:
    """Return the place of a node. The place of a site's result is that of the node that computes it in the subgraph."""
    if "position" in node.meta:
        return node.meta["position"], int(node.meta.get("home", node.meta["position"]))
    if node.target is getitem and "values" in node.args[0].meta:  # type: ignore[union-attr]
        call, k = node.args
        (body, *_) = _bodies(call)  # type: ignore[arg-type]
        result = body.output_node().args[0][k]  # type: ignore[index, call-overload]
        return _place(result)  # type: ignore[arg-type]
    return None


def _bodies(call: fx.Node) -> list[fx.Graph]:
    """Return the subgraphs of a cache_or_compute node, `compute` first."""
    nodes = filter(None, (call.args[2], call.kwargs.get("instead")))
    return [attribute(call.graph.owning_module, node).graph for node in nodes]  # type: ignore[arg-type]


def _places(node: fx.Node) -> list[_Place]:
    """Return the place of a node, or the places of the nodes in the subgraphs of a site."""
    if "values" in node.meta:
        inside = (n for body in _bodies(node) for n in body.nodes if n.op == "call_function")
        return [place for n in inside for place in _places(n)]
    place = _place(node)
    return [] if place is None else [place]


def _beside(place: _Place | None, distance: float) -> dict[str, Any]:
    return {} if place is None else {"position": place[0] + distance, "home": place[1]}


def _before_readers(node: fx.Node) -> dict[str, Any]:
    """Return the meta of a place after `node` and before its first reader."""
    reader = min((place for user in node.users for place in _places(user)), default=None)
    own = _place(node)
    if own is None or reader is None:
        return _beside(reader, -0.5)
    return {"position": (own[0] + reader[0]) / 2, "home": reader[1]}
