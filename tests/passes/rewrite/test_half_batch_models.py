"""Half of a batch in found branches: of toys, of guarded and converted ones, and of every model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from dit_rewrite.passes.analysis.site import Site
from dit_rewrite.passes.analysis.sites import find_sites
from dit_rewrite.passes.capture.capture import Captured, capture, one_graph
from dit_rewrite.passes.rewrite.batch import Batch, batch_labels
from dit_rewrite.passes.rewrite.cache_or_compute import cache_or_compute
from dit_rewrite.passes.rewrite.codec import ValueCodec
from dit_rewrite.passes.rewrite.guarded_graph import Guarded
from dit_rewrite.passes.rewrite.half_batch import halve
from dit_rewrite.passes.rewrite.insert_guards import insert_guards
from tests.helpers.batches import BATCH, Recorded, check
from tests.helpers.models import MODELS, Case
from tests.helpers.toys import AROUND_A_JOINT, BLOCKS, JOINT, NESTED, SIBLINGS, Example


def branch(gm: fx.GraphModule, site: Site) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Return the closure of a site as a graph, and the nodes that it reads."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inside = [node for node in gm.graph.nodes if node.name in site.closure]
    read = list(dict.fromkeys(a for node in inside for a in node.all_input_nodes if a.name not in site.closure))
    for node in read:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in inside:
        env[node] = graph.node_copy(node, env.__getitem__)
    values = [env[node] for node in inside if node.name in site.values]
    graph.output(tuple(values))
    return fx.GraphModule({}, graph), read


def halvable(captured: Captured, arguments: Sequence[Any], checked: Callable[[Site], bool]) -> dict[str, int]:
    """Return the number of sites of each kind that can be halved, and check the results of those in `checked`."""
    labels = batch_labels(captured.gm.graph, BATCH, captured.static)
    seen = Recorded(captured.gm, *arguments).seen
    count: dict[str, int] = {}
    for site in find_sites(captured.gm, captured.static).sites:
        body, read = branch(captured.gm, site)
        given = [labels[node] for node in read]
        if halve(body, given, BATCH, 0) is None:
            continue
        count[str(site.kind)] = count.get(str(site.kind), 0) + 1
        if checked(site):
            check(body, given, [seen[node] for node in read])
    return count


def graphs(case: Case) -> list[tuple[Captured, list[Any]]]:
    """Return the captured graphs of a model with the arguments of their calls."""
    caught: list[tuple[Captured, list[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def then(captured: Captured) -> Callable[[list[Any]], Sequence[Any]]:
            def run(arguments: list[Any]) -> Sequence[Any]:
                caught.append((captured, [a.clone() if isinstance(a, Tensor) else a for a in arguments]))
                return captured.gm(*arguments)

            return run

        return capture(gm, example_inputs, then)

    dtype = torch.float32 if case.name == "omnigen" else torch.float64  # OmniGen's mask is NaN in float64
    model = torch.compile(case.build(dtype), backend=backend)
    with torch.no_grad(), one_graph():
        model(**case.inputs(1, dtype)[0])
    return caught


@pytest.mark.parametrize("example", [BLOCKS, JOINT, SIBLINGS, AROUND_A_JOINT], ids=operator.attrgetter("name"))
def test_toys(example: Example) -> None:
    """Every branch of the toys, joint and nested ones included."""
    traced = example.traced()
    assert sum(halvable(traced.captured, traced.arguments[0], lambda site: True).values()) == example.sites


@pytest.mark.parametrize("format", [None, "int8"])
@pytest.mark.parametrize("example", [NESTED, SIBLINGS], ids=operator.attrgetter("name"))
def test_guarded(example: Example, format: str | None) -> None:
    """Subgraphs of nested guarded sites with slots; every new node has a position and a home."""
    traced = example.traced()
    sites = traced.sites().sites
    with traced.captured.fake_mode:
        guarded = insert_guards(
            traced.gm, sites, [Guarded(i, "step > 0", "reuse", ValueCodec(format)) for i in range(len(sites))]
        )
    labels = {node.name: label for node, label in batch_labels(traced.gm.graph, BATCH, traced.captured.static).items()}
    seen = {node.name: value for node, value in Recorded(traced.gm, *traced.arguments[0]).seen.items()}
    calls = [node for node in guarded.gm.graph.nodes if node.target is cache_or_compute]
    assert calls
    for call in calls:
        body = guarded.gm.get_submodule(call.args[2].target)
        inputs = body.graph.find_nodes(op="placeholder")
        given = [Batch.SAME if n.name.startswith("reuse") else labels.get(n.name, Batch.LEADING) for n in inputs]
        for reuse in (False, True):
            check(body, given, [seen[n.name] if n.name in seen else slot_input(n, reuse) for n in inputs])
        halved = halve(body, given, BATCH, 0)
        assert halved is not None
        assert_in_place(halved)


def slot_input(node: fx.Node, reuse: bool) -> Any:
    """Return a decision, or a slot tensor."""
    value = node.meta.get("val")
    if value is None:
        return reuse
    rows = torch.arange(value.numel(), dtype=torch.float32).view(value.shape)
    return rows.remainder(7).add(1).to(value.dtype)


def assert_in_place(gm: fx.GraphModule) -> None:
    """Assert that nodes, sorted by position, come after their operands, and that new nodes have a home."""
    calls = [node for node in gm.graph.nodes if node.op == "call_function" and "position" in node.meta]
    for node in calls:
        placed = [a.meta["position"] for a in node.all_input_nodes if "position" in a.meta]
        assert all(position < node.meta["position"] for position in placed)
    new = [node for node in calls if node.name.endswith(("_half", "_both"))]
    assert new
    assert all(isinstance(node.meta["home"], int) for node in new)


FAST = ("dit", "sd3", "stdit")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_models(name: str) -> None:
    """Every branch of every model keeps samples apart, except in Mochi.

    Mochi attends to one sample at a time and joins slices of the batch again, which mixes all later values.
    """
    case = MODELS[name]
    count: dict[str, int] = {}
    for captured, arguments in graphs(case):
        for kind, number in halvable(captured, arguments, lambda site: str(site.kind) != "mlp").items():
            count[kind] = count.get(kind, 0) + number
    assert count == ({} if name == "mochi" else case.sites)
