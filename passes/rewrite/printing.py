"""Print graphs and their differences in a readable form. Dumps, reports and diffs all use this printer."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dit_rewrite.passes.analysis.graph import attribute, packet
from dit_rewrite.passes.capture import module_paths

_DTYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16",
    torch.int64: "i64", torch.int32: "i32", torch.bool: "b8", torch.uint8: "u8",
}  # fmt: skip


def readable(gm: fx.GraphModule, indent: str = "") -> str:
    """Return the graph as code: one line per node with dtype and shape, and a comment at the start of each module.

    A subgraph is indented below the node that refers to it.
    """
    return "\n".join(_lines(gm, indent))


def _lines(gm: fx.GraphModule, indent: str) -> Iterator[str]:
    path = ""
    for node in gm.graph.nodes:
        if node.op == "call_function" and (here := module_paths.module_path(node)) != path:
            path = here
            yield f"{indent}# {path or '(the model itself)'}"
        if node.op == "get_attr" and isinstance(body := attribute(gm, node), fx.GraphModule):
            yield f"{indent}def {node.name}({', '.join(n.name for n in body.graph.find_nodes(op='placeholder'))}):"
            yield from _lines(body, indent + "    ")
        elif node.op != "placeholder" or not indent:
            yield indent + _line(node)


def _line(node: fx.Node) -> str:
    kind = _kind(node.meta.get("val"))
    left = f"{node.name}: {kind}" if kind else node.name
    if node.op == "placeholder":
        return f"{left} = input"
    if node.op == "output":
        return f"return {_format(node.args[0])}"
    if node.op == "get_attr":
        return f"{left} = self.{node.target}"
    arguments = [_format(a) for a in node.args] + [f"{k}={_format(v)}" for k, v in node.kwargs.items()]
    return f"{left} = {op_name(node)}({', '.join(arguments)})"


def op_name(node: fx.Node) -> str:
    """Return the name of a node's op, such as ``aten.addmm``, or the plain name of any other target."""
    target = packet(node)
    if target is not None:
        return str(target).replace("::", ".")
    return getattr(node.target, "__name__", str(node.target))


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"
    return ""


def _format(argument: object) -> str:
    if isinstance(argument, (list, tuple)):
        inner = ", ".join(map(_format, argument))
        return f"[{inner}]" if isinstance(argument, list) else f"({inner}{',' * (len(argument) == 1)})"
    return argument.name if isinstance(argument, fx.Node) else repr(argument)


def op_counts(gm: fx.GraphModule) -> Counter[str]:
    """Return how often the graph and its subgraphs call each op."""
    modules = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return Counter(op_name(n) for m in modules for n in m.graph.nodes if n.op == "call_function")


@dataclass(frozen=True)
class Snapshot:
    """The text and the op counts of a graph at some time. A snapshot is needed if a pass changes the graph in place."""

    text: str
    ops: Counter[str]

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Snapshot:
        return cls(readable(gm), op_counts(gm))

    def diff(self, after: Snapshot, names: tuple[str, str]) -> str:
        """Return a unified diff from this graph to `after`, headed by the change of each op's count."""
        old, new = self.ops, after.ops
        changed = sorted((op for op in old | new if old[op] != new[op]), key=lambda op: (new[op] - old[op], op))
        head = [f"# nodes: {old.total()} -> {new.total()} ({new.total() - old.total():+d})"]
        head += [f"# {op}: {old[op]} -> {new[op]} ({new[op] - old[op]:+d})" for op in changed]
        lines = difflib.unified_diff(self.text.splitlines(), after.text.splitlines(), *names, lineterm="", n=2)
        return "\n".join([*head, "", *lines]) + "\n"


def diff(before: fx.GraphModule, after: fx.GraphModule, names: tuple[str, str] = ("before", "after")) -> str:
    """Return a unified diff of two graphs, headed by the change of each op's count."""
    return Snapshot.of(before).diff(Snapshot.of(after), names)
