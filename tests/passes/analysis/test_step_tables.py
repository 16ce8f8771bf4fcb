"""Step tables: which values a table would hold, what they cost, and which weights they free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dit_rewrite.passes.analysis.sites import find_sites
from dit_rewrite.passes.analysis.step_tables import StepTable, step_table
from dit_rewrite.passes.capture.capture import Captured, Runner, capture, one_graph
from dit_rewrite.passes.rewrite.guarded_graph import Guarded
from dit_rewrite.passes.rewrite.insert_guards import insert_guards
from dit_rewrite.passes.rewrite.segments import whole
from dit_rewrite.passes.rewrite.specialise import specialise
from dit_rewrite.runtime.inputs import Reader
from tests.helpers import tiny
from tests.helpers.models import MODELS
from tests.helpers.tracing import WIDTH, Toy, linear, mlp, norm, tokens

BATCH = 2
VECTOR = BATCH * WIDTH * 4  # bytes of one vector for each sample
SQUARE = WIDTH * WIDTH * 4 + WIDTH * 4  # bytes of a projection and its bias


def captured(model: nn.Module, *calls: dict[str, Any]) -> Captured:
    """The graph of the last call, which knows that call's conditioning and timestep; it has to be one graph."""
    inputs = Reader(model.forward).read((), calls[-1])
    caught: list[Captured] = []

    def then(graph: Captured) -> Runner:
        caught.append(graph)
        return lambda arguments: graph.gm(*arguments)

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        told = inputs.conditioning, inputs.tensors, inputs.timestep, inputs.number
        return capture(gm, example_inputs, then, *told)

    torch.compiler.reset()
    with torch.no_grad(), one_graph(inputs.number):
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for call in calls:
            compiled(**call)
    return caught[-1]


def table_of(graph: Captured, max_vectors: int | None = None) -> StepTable:
    """The table of a captured graph."""
    found = find_sites(graph.gm, graph.static, graph.conditioning)
    reused = [value for site in found.sites for value in site.values]
    return step_table(graph.gm.graph, graph.static, graph.conditioning, graph.step, reused, max_vectors)


class Denoiser(Toy):
    """A toy that is called with a latent, a timestep and perhaps a condition."""

    def forward(self, x: Tensor, timestep: Any, condition: Tensor | None = None) -> Tensor:
        return self.body(self, x, timestep, condition)


def table(
    body: Callable[..., Tensor],
    condition: Tensor | None = None,
    timestep: Any = None,
    max_vectors: int | None = None,
    **parts: nn.Module | Tensor,
) -> StepTable:
    """The table of a toy; its timestep is a vector for each sample unless another one is given."""
    timestep = tokens(1, BATCH, WIDTH) if timestep is None else timestep
    call = {"x": tokens(0, BATCH, 4, WIDTH), "timestep": timestep, "condition": condition}
    return table_of(captured(Denoiser(body, **parts), call), max_vectors)


def test_a_projection_of_the_timestep() -> None:
    """The table holds the last projection before the latent; the first one's weights are free as well."""
    found = table(lambda m, x, t, c: x * m.b(F.silu(m.a(t)))[:, None], a=linear(), b=linear())
    (value,) = found.values
    assert (value.path, value.bytes, value.vectors, value.conditioning) == ("b", VECTOR, BATCH, ())
    assert found.flops == 2 * (2 * BATCH * WIDTH * WIDTH)
    assert found.released_bytes == found.weight_bytes == 2 * SQUARE
    assert found.released_share == 1.0


def test_what_depends_on_the_latent_is_no_value() -> None:
    """Modulation by the mean of the latent beside modulation by the timestep."""

    def body(m: Toy, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return x * m.a(t)[:, None] + m.b(t + x.mean(1))[:, None]

    found = table(body, a=linear(), b=linear())
    assert [value.path for value in found.values] == ["a"]
    assert found.released_bytes == SQUARE
    assert found.weight_bytes == 2 * SQUARE


@pytest.mark.parametrize("project", [True, False])
def test_elementwise_values_are_none(project: bool) -> None:
    """They are computed in each step: neither `sin` of the timestep alone, nor what is added to a projection."""

    def body(m: Toy, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return x * (1 + (m.a(t) if project else t).sin())[:, None] @ m.a.weight

    found = table(body, a=linear())
    assert [value.path for value in found.values] == (["a"] if project else [])
    assert found.row_bytes == (VECTOR if project else 0)


def test_a_weight_that_another_reader_uses_is_not_free() -> None:
    """`a` projects the latent too. The table holds its value all the same, and its FLOPs are saved."""

    def body(m: Toy, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return m.a(x) * m.a(t)[:, None] * m.b(t)[:, None]

    found = table(body, a=linear(), b=linear())
    assert len(found.values) == 2
    assert found.flops == 2 * (2 * BATCH * WIDTH * WIDTH)
    assert found.released_bytes == SQUARE
    assert all("b" in name for name in found.released)


def test_pooled_text() -> None:
    """The modulation depends on the text; what depends on the text alone is hoisted, and no value of the table."""

    def body(m: Toy, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return x * m.mod(m.time(t) + m.text(c))[:, None] + m.shift(t)[:, None] + m.text(c)[:, None]

    found = table(body, tokens(2, BATCH, WIDTH), mod=linear(), time=linear(), text=linear(), shift=linear())
    depends = {value.path: value.conditioning for value in found.values}
    assert depends == {"mod": ("condition",), "shift": ()}
    assert found.released_bytes == 3 * SQUARE, "the text's projection is read for the prologue"


def test_what_is_not_known_to_stay_is_no_conditioning() -> None:
    """A tensor that is neither conditioning nor the timestep may be another one in each step."""
    model = Denoiser(lambda m, x, t, c: x * m.a(t + c)[:, None], a=linear())
    call = {"x": tokens(0), "timestep": tokens(1, BATCH, WIDTH), "condition": tokens(2, BATCH, WIDTH)}
    graph = captured(model, call)
    positions = (graph.gm.graph, graph.static, graph.conditioning, graph.step)
    assert len(step_table(*positions).values) == 1
    assert step_table(graph.gm.graph, graph.static, (), graph.step).values == ()
    assert step_table(graph.gm.graph, graph.static, graph.conditioning, ()).values == ()


def modulated(m: Toy, x: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
    shift, scale, gate = m.mod(F.silu(t))[:, None].chunk(3, dim=-1)
    return x + gate * m.ff(m.norm(x) * (1 + scale) + shift)


def test_parts_of_one_projection() -> None:
    """Three values; a step that reuses the branch reads the gate alone."""
    found = table(modulated, norm=norm(), ff=mlp(), mod=linear(outer=3 * WIDTH))
    assert [value.bytes for value in found.values] == [VECTOR] * 3
    assert sum(value.read_in_reuse for value in found.values) == 1
    assert (found.row_bytes, found.reuse_bytes) == (3 * VECTOR, VECTOR)


def test_parts_taken_twice_are_one_value() -> None:
    """Two blocks split one modulation, each for itself: three values, and the projection is still not needed."""

    def body(m: Toy, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        signal = m.mod(t)
        for _ in range(2):
            shift, scale, gate = signal[:, None].chunk(3, dim=-1)
            x = x + gate * m.ff(m.norm(x) * (1 + scale) + shift)
        return x

    found = table(body, norm=norm(), ff=mlp(), mod=linear(outer=3 * WIDTH))
    assert [value.bytes for value in found.values] == [VECTOR] * 3
    assert found.released_bytes == 3 * SQUARE
    assert found.reuse_bytes == VECTOR


def test_a_part_of_what_is_read_whole_is_no_value_of_its_own() -> None:
    """One reader takes the whole vector, another half of it."""

    def body(m: Toy, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        signal = m.a(t)[:, None]
        return (x * signal).tanh() + torch.cat([x[..., : WIDTH // 2] * signal[..., : WIDTH // 2]] * 2, -1)

    (value,) = table(body, a=linear()).values
    assert value.bytes == VECTOR


@pytest.mark.parametrize("shared", [True, False])
def test_what_blocks_add_to_one_projection_stays_in_the_step(shared: bool) -> None:
    """PixArt's blocks add their own weights to one modulation, which is held once; DiT's project for themselves."""

    def body(m: Toy, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        first = m.a(t)
        second = first if shared else m.b(t)
        return (x * (first + m.table1)[:, None]).tanh() * (second + m.table2)[:, None]

    found = table(body, a=linear(), b=linear(), table1=tokens(3, WIDTH), table2=tokens(4, WIDTH))
    assert found.row_bytes == (1 if shared else 2) * VECTOR


def test_values_with_a_vector_for_each_token() -> None:
    """Text that is modulated and projected before it meets the latent; left out, the modulation is what is held."""

    def body(m: Toy, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return x + m.k(c * m.mod(t)[:, None]).mean(1, keepdim=True)

    text = tokens(2, BATCH, 5, WIDTH)
    parts = {"k": linear(), "mod": linear()}
    (value,) = table(body, text, **parts).values
    assert (value.path, value.vectors, value.conditioning) == ("k", 5 * BATCH, ("condition",))
    (value,) = table(body, text, max_vectors=BATCH, **parts).values
    assert (value.path, value.vectors, value.conditioning) == ("mod", BATCH, ())


@pytest.mark.parametrize(
    "timesteps",
    [(7,), (0.5, 0.25), (torch.full((BATCH,), 0.5),)],  # of a float Dynamo makes a constant until it sees another one
    ids=["int", "float", "tensor"],
)
def test_the_timestep_may_be_a_number(timesteps: tuple[Any, ...]) -> None:
    """Its position is known either way, and that of a condition beside it is not taken for it."""

    def body(m: Toy, x: Tensor, t: Any, c: Tensor) -> Tensor:
        return x * m.a((t if isinstance(t, Tensor) else torch.tensor([t]))[:, None] * c)[:, None]

    model = Denoiser(body, a=linear())
    x, condition = tokens(0), tokens(2, BATCH, WIDTH)
    graph = captured(model, *({"x": x, "timestep": t, "condition": condition} for t in timesteps))
    assert [graph.placeholders[i].name for i in graph.step] == ["timestep"]
    assert [graph.placeholders[i].name for i in graph.conditioning] == ["condition"]
    (value,) = table_of(graph).values
    assert (value.path, value.conditioning) == ("a", ("condition",))


@pytest.mark.parametrize("added", [0, 1])
def test_a_local_variable_of_the_same_name(added: int) -> None:
    """Behind a graph break `timestep` is the call's number, or another one."""

    class Broken(Denoiser):
        def forward(self, x: Tensor, timestep: Any, condition: Tensor | None = None) -> Tensor:
            x = x * timestep
            timestep = timestep + added
            torch._dynamo.graph_break()
            return x * torch.full_like(x, timestep)

    steps: list[int] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        def then(graph: Captured) -> Runner:
            steps.append(len(graph.step))
            return lambda arguments: graph.gm(*arguments)

        return capture(gm, example_inputs, then, timestep=7, number="timestep")

    torch.compiler.reset()
    with torch.no_grad(), one_graph("timestep"):
        torch.compile(Broken(modulated), backend=backend)(tokens(0), 7)
    assert steps == [1, 1 - added]


@torch.no_grad()
def test_the_backend_knows_the_timestep() -> None:
    """The modulation of both tiny blocks; it depends on the condition, which is added to the time."""
    model = tiny.rewritten(tiny.build())
    with model.trajectory(num_steps=2):
        tiny.outputs(model, tiny.calls(2))
    (rewritten,) = model._backend.rewritten
    values = table_of(rewritten.captured).values
    assert [value.path for value in values] == ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]
    assert all(value.conditioning == ("condition",) and value.read_in_reuse for value in values)


# values, of them read in full reuse, and of them with a vector for each token; toy models have three blocks or two
COUNTS = {
    # 6 parts of modulation in each of 3 blocks, of them 2 gates; shift and scale at the end
    "dit": (6 * 3 + 2, 2 * 3 + 2, 0),
    # one modulation for all blocks, and the embedding that is added at the end
    "pixart_sigma": (2, 2, 0),
    # image: 6 parts in each of 3 blocks; text: 4 parts behind the attention of the first, whose q, k and v are the
    # table's, 6 of the second, 2 of the third, which drops its text; shift and scale at the end
    "sd3": (6 * 3 + 4 + 6 + 2 + 2 + 3, 2 * 3 + 2, 3),
    "wan": (2, 2, 0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_toy_models(name: str) -> None:
    """Exact counts; and the values that a reusing step reads are those that its straight-line graph computes."""
    case = MODELS[name]
    graph = captured(case.build(), case.inputs(1)[0])
    found = table_of(graph)
    read = {value.node for value in found.values if value.read_in_reuse}
    per_token = sum(value.vectors > BATCH for value in found.values)
    assert (len(found.values), len(read), per_token) == COUNTS[name]
    sites = find_sites(graph.gm, graph.static, graph.conditioning).sites
    guarded = insert_guards(graph.gm, sites, [Guarded(i, "", "") for i in range(len(sites))])
    reusing = specialise(guarded, [True] * len(sites), whole(guarded.source, sites)).gm
    assert read == {value.node for value in found.values} & {node.name for node in reusing.graph.nodes if node.users}
