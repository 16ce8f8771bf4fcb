"""GuidanceDelta: the unconditional output as the conditional one plus a stored difference, in one call or two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sympy import Mod, Ne
from torch import Tensor

from dit_rewrite import RewrittenModule, compile, verify
from dit_rewrite.errors import BadParameter, MissReason
from dit_rewrite.guards import step
from dit_rewrite.module import twin
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import Forecast, GuidanceDelta, Reuse
from dit_rewrite.policy.where import Where
from tests.helpers.tiny import CHANNELS, WIDTH, build

STEPS = 7
OUTPUT = Where(span="output")
LATENT = torch.randn(2, 8, CHANNELS, generator=torch.Generator().manual_seed(0))
CONDITIONS = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
SCALE = 2.0


def policy(conditional: str, do: Any = None, interval: int = 3) -> Policy:
    return Policy((Rule(Ne(Mod(step, interval), 0), GuidanceDelta(conditional, do or Reuse()), OUTPUT),))


def rewritten(conditional: str, do: Any = None, interval: int = 3, **more: Any) -> RewrittenModule:
    return compile(twin(build()), policy(conditional, do, interval), backend="aot_eager", **more)


def time(i: int, batch: int) -> Tensor:
    return torch.full((batch,), 900.0 - 40 * i)


def guided(halves: list[Tensor], conditional: int) -> Tensor:
    on, off = halves[conditional], halves[1 - conditional]
    return off + SCALE * (on - off)


class Kept:
    """A naive reference: the last two differences, and the unconditional output that they give."""

    def __init__(self, order: int, interval: int) -> None:
        self.order, self.interval = order, interval
        self.known: list[tuple[int, Tensor]] = []

    def __call__(self, i: int, on: Tensor, off: Tensor) -> Tensor:
        """The unconditional output, where `on` and `off` are what the model computes for the two sides."""
        if i % self.interval == 0:
            self.known = [(i, off - on), *self.known][:2]
            return off
        (at, newest), *older = self.known
        if self.order == 0 or not older:
            return on + newest
        before, old = older[0]
        return on + newest + (newest - old) * (i - at) / (at - before)


@torch.no_grad()
def one_call(model: Any, first: int, kept: Kept | None = None) -> list[Tensor]:
    """Outputs of a sampler with both halves in one batch; `kept` replaces the unconditional half."""
    latent, outputs = LATENT, []
    for i in range(STEPS):
        both = model(torch.cat([latent, latent]), time(i, 4), CONDITIONS).clone()
        halves = list(both.chunk(2))
        if kept is not None:
            halves[1 - first] = kept(i, halves[first], halves[1 - first])
        outputs.append(torch.cat(halves))
        latent = latent - 0.05 * guided(halves, first)
    return outputs


@torch.no_grad()
def two_calls(model: Any, kept: Kept | None = None) -> list[Tensor]:
    """The same by two calls, the conditional one first; one tensor with both outputs per step."""
    latent, outputs = LATENT, []
    for i in range(STEPS):
        halves = []
        for name, condition in zip(("cond", "uncond"), CONDITIONS.chunk(2), strict=True):
            if kept is None:
                with model.cache_context(name):
                    halves.append(model(latent, time(i, 2), condition).clone())
            else:
                halves.append(model(latent, time(i, 2), condition).clone())
        if kept is not None:
            halves[1] = kept(i, *halves)
        outputs.append(torch.cat(halves))
        latent = latent - 0.05 * guided(halves, 0)
    return outputs


@pytest.mark.parametrize(
    ("conditional", "first", "order", "lowering"),
    [
        ("first", 0, 0, "variants"),
        ("first", 0, 1, "segments"),
        ("second", 1, 0, "segments"),
        ("second", 1, 1, "variants"),
    ],
)
def test_one_call(conditional: str, first: int, order: int, lowering: str) -> None:
    model = rewritten(conditional, Forecast(order), lowering=lowering)
    with model.trajectory(num_steps=STEPS):
        found = one_call(model, first)
    expected = one_call(build(), first, Kept(order, 3))
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        if i == 0:
            assert torch.equal(ours, theirs), "a step that computes has the plain model's bits"
    stats = model.stats()
    assert (stats.computed, stats.reused, stats.recompiles, stats.misses) == (3, 4, 0, {})
    assert stats.peak_bytes == LATENT.nbytes * (1 + order), "half of the batch for each difference"


def test_half_of_the_work_is_gone() -> None:
    """Every contraction of the reusing graph has half of the batch's rows."""
    model = rewritten("first")
    with model.trajectory(num_steps=STEPS):
        one_call(model, 0)
    (graph,) = model.explain().rewritten
    rows = {True: set[int](), False: set[int]()}
    for (_, row), variant in graph.variants.items():
        for node in variant.gm.graph.nodes:
            if node.op == "call_function" and "mm" in str(node.target):
                rows[any(row)].add(node.meta["val"].shape[0])
    assert rows[True] and {2 * n for n in rows[True]} == rows[False]


@pytest.mark.parametrize("lowering", ["variants", "segments"])
@pytest.mark.parametrize("order", [0, 1])
def test_two_calls(order: int, lowering: str) -> None:
    """The unconditional call of a reusing step runs only the sum."""
    model = rewritten("cond", Forecast(order), lowering=lowering)
    with model.trajectory(num_steps=STEPS):
        found = two_calls(model)
    expected = two_calls(build(), Kept(order, 3))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    did = [d.strategies["output.delta"] for d in model.stats().decisions]
    assert did == [what for i in range(STEPS) for what in ("compute", "forecast" if i % 3 else "compute")]
    (graph,) = model.explain().rewritten
    reusing = [variant for (_, row), variant in graph.variants.items() if any(row)]
    ops = {str(n.target) for variant in reusing for n in variant.gm.graph.nodes if n.op == "call_function"}
    assert not any(name in op for op in ops for name in ("mm", "attention", "softmax", "gelu"))


def test_the_unconditional_call_alone_computes() -> None:
    """Guidance that calls in the opposite order, or without the conditional call: everything computes."""
    model = rewritten("cond")
    plain = build()
    with torch.no_grad(), model.trajectory(num_steps=STEPS):
        for i in range(STEPS):
            with model.cache_context("uncond"):
                output = model(LATENT, time(i, 2), CONDITIONS[2:])
            assert torch.equal(output, plain(LATENT, time(i, 2), CONDITIONS[2:]))
    assert model.stats().reused == 0
    assert set(model.stats().misses) == {MissReason.EMPTY}


@pytest.mark.parametrize("do", [Reuse(), Forecast(1), Forecast(1, store="int8")])
def test_verify_replays_one_call(do: Any) -> None:
    given = [
        {
            "hidden_states": torch.cat([LATENT, LATENT]) * (1 - 0.1 * i),
            "timestep": time(i, 4),
            "condition": CONDITIONS,
        }
        for i in range(STEPS)
    ]
    result = verify(build(), given, policy("first", do), backend="aot_eager")
    assert result.reuse0.exact and result.passed and result.reused > 0
    assert result.max_abs_error < 1e-5, "half the rows of a matrix product may round differently"


def test_verify_replays_two_calls() -> None:
    given = [
        {"hidden_states": LATENT * (1 - 0.1 * i), "timestep": time(i, 2), "condition": condition}
        for i in range(STEPS)
        for condition in CONDITIONS.chunk(2)
    ]
    streams = ["cond", "uncond"] * STEPS
    result = verify(build(), given, policy("cond", Forecast(1)), backend="aot_eager", streams=streams)
    assert result.exact and result.reused > 0


@pytest.mark.parametrize(
    "given", [{"conditional": ""}, {"conditional": None}, {"conditional": "first", "do": GuidanceDelta("first")}]
)
def test_parameters_out_of_range(given: dict[str, Any]) -> None:
    with pytest.raises(BadParameter):
        GuidanceDelta(**given)


def test_where_it_has_no_meaning() -> None:
    """It applies to the output only; a store is refused where the difference is taken outside the graph."""
    with pytest.raises(BadParameter, match='span="output"'):
        Rule(step > 0, GuidanceDelta("first"))
    with pytest.raises(BadParameter, match="two calls"):
        GuidanceDelta("cond", Reuse("int8"))
