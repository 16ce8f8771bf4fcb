"""Printed graphs: modules as comments, dtypes and shapes, indented subgraphs, and op counts above diffs."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx, nn

from dit_rewrite.passes.rewrite.guarded_graph import Guarded
from dit_rewrite.passes.rewrite.insert_guards import insert_guards
from dit_rewrite.passes.rewrite.printing import diff, op_counts, readable
from dit_rewrite.passes.rewrite.segments import whole
from dit_rewrite.passes.rewrite.specialise import specialise
from tests.helpers.toys import NESTED
from tests.helpers.tracing import Toy, linear, mlp, norm, tokens, trace


def block() -> Toy:
    return Toy(
        lambda m, x: x + m.gate * m.parts[1](m.parts[0](x)), parts=nn.Sequential(norm(), linear()), gate=tokens(1, 8)
    )


def test_readable() -> None:
    """The whole text of a small graph."""
    expected = """\
gate: f32[8] = input
inputs_0: f32[2, 4, 8] = input
parts_0_weight: f32[8] = input
parts_0_bias: f32[8] = input
parts_1_weight: f32[8, 8] = input
parts_1_bias: f32[8] = input
# parts.0
native_layer_norm = aten.native_layer_norm(inputs_0, [8], parts_0_weight, parts_0_bias, 1e-05)
getitem: f32[2, 4, 8] = getitem(native_layer_norm, 0)
# parts.1
view: f32[8, 8] = aten.view(getitem, [8, 8])
t: f32[8, 8] = aten.t(parts_1_weight)
addmm: f32[8, 8] = aten.addmm(parts_1_bias, view, t)
view_1: f32[2, 4, 8] = aten.view(addmm, [2, 4, 8])
# (the model itself)
mul: f32[2, 4, 8] = aten.mul(gate, view_1)
add: f32[2, 4, 8] = aten.add(inputs_0, mul)
return (add,)"""
    text = readable(trace(block(), (tokens(),)).gm)
    lines, expected_lines = text.splitlines(), expected.splitlines()
    inputs = [line for line in lines if line.endswith(" = input")]
    assert sorted(inputs) == sorted(expected_lines[:6])  # Dynamo determines their order
    assert lines[6:] == expected_lines[6:]


def test_dtypes_and_symbols() -> None:
    """Low-precision dtypes have short names, and symbolic sizes are printed as symbols."""
    model = Toy(lambda m, x: (x + m.ff(x)).float(), ff=linear()).bfloat16()
    lines = readable(trace(model, (tokens().bfloat16(),), dynamic=True).gm).splitlines()
    (cast,) = [line for line in lines if "aten._to_copy" in line]
    assert cast.startswith("_to_copy: f32[s")
    assert cast.endswith("dtype=torch.float32)")
    assert any(line.startswith("inputs_0: bf16[s") and line.endswith(", 8] = input") for line in lines)


def test_subgraphs_are_indented() -> None:
    """The subgraph of a site is printed below a `def`, indented once for each enclosing site."""
    text = readable(NESTED.rewritten().guarded.gm)
    depth = {len(line) - len(line.lstrip()) for line in text.splitlines() if line}
    assert depth == {0, 4, 8, 12}
    headers = [line for line in text.splitlines() if line.lstrip().startswith("def ")]
    assert [len(line) - len(line.lstrip()) for line in headers] == [0, 4, 8]
    calls = [line.strip() for line in text.splitlines() if "cache_or_compute(" in line]
    assert len(calls) == 3
    assert [text.count(f"guard='step > {i}'") for i in range(3)] == [1, 1, 1]
    addmms = [line for line in text.splitlines() if "aten.addmm(" in line]
    assert [len(line) - len(line.lstrip()) for line in addmms] == [4, 8, 12]


def test_op_counts() -> None:
    """Subgraphs are counted; inputs, attributes and the output are not."""
    traced = trace(block(), (tokens(),))
    expected = Counter({"aten.native_layer_norm": 1, "getitem": 1, "aten.view": 2, "aten.t": 1})
    expected += Counter({"aten.addmm": 1, "aten.mul": 1, "aten.add": 1})
    assert op_counts(traced.gm) == expected
    guarded = insert_guards(traced.gm, traced.sites().sites, [Guarded(0, "step > 0", "reuse")])
    assert op_counts(guarded.gm) == expected + Counter({"cache_or_compute": 1, "getitem": 1})


def test_diff() -> None:
    """A diff starts with the changes of op counts, largest decrease first."""
    traced = trace(block(), (tokens(),))
    sites = traced.sites().sites
    guarded = insert_guards(traced.gm, sites, [Guarded(0, "step > 0", "reuse")])
    text = diff(traced.gm, specialise(guarded, (True,), whole(traced.gm, sites)).gm, ("captured", "reusing"))
    assert text.splitlines()[:9] == [
        "# nodes: 8 -> 2 (-6)",
        "# aten.view: 2 -> 0 (-2)",
        "# aten.addmm: 1 -> 0 (-1)",
        "# aten.native_layer_norm: 1 -> 0 (-1)",
        "# aten.t: 1 -> 0 (-1)",
        "# getitem: 1 -> 0 (-1)",
        "",
        "--- captured",
        "+++ reusing",
    ]
    assert "-addmm: f32[8, 8] = aten.addmm(parts_1_bias, view, t)" in text
    assert "+mul: f32[2, 4, 8] = aten.mul(gate, cached_parts_1)" in text
    assert " add: f32[2, 4, 8] = aten.add(inputs_0, mul)" in text


def test_diff_of_the_same_graph() -> None:
    """The diff of a graph with itself is empty."""
    gm = trace(block(), (tokens(),)).gm
    assert diff(gm, gm) == "# nodes: 8 -> 8 (+0)\n\n"


def test_arguments() -> None:
    """Lists, tuples, keywords, text and attributes are printed as code."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    constant = graph.get_attr("constant")
    cat = graph.call_function(torch.ops.aten.cat.default, ([x, constant], -1))
    made = graph.call_function(torch.ops.aten.gelu.default, (cat,), {"approximate": "tanh"})
    graph.output(((made,), [x]))
    gm = fx.GraphModule({"constant": torch.ones(2)}, graph)
    lines = readable(gm).splitlines()
    assert lines == [
        "x = input",
        "constant = self.constant",
        f"{cat.name} = aten.cat([x, constant], -1)",
        f"{made.name} = aten.gelu({cat.name}, approximate='tanh')",
        f"return (({made.name},), [x])",
    ]


def test_repeated_modules_are_named_at_every_change() -> None:
    """A module that is entered again gets another comment."""

    def body(m: Toy, x: Tensor) -> Tensor:
        return m.ff(m.norm(m.ff(x)))

    comments = [
        line for line in readable(trace(Toy(body, ff=mlp(), norm=norm()), (tokens(),)).gm).splitlines() if "#" in line
    ]
    assert comments == ["# ff.0", "# ff.1", "# ff.2", "# norm", "# ff.0", "# ff.1", "# ff.2"]
