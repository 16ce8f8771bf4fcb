"""Forecasts in a compiled model: against module hooks, at the start, across trajectories, and their memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sympy import Eq, Mod, Ne
from torch import Tensor, nn

from dit_rewrite import RewrittenModule, compile, verify
from dit_rewrite.errors import BadParameter, MissReason
from dit_rewrite.guards import step
from dit_rewrite.module import twin
from dit_rewrite.policy.bases import TaylorSeer
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import Forecast, Reuse, Strategy
from dit_rewrite.policy.where import Where
from tests.helpers.tiny import CHANNELS, WIDTH, TinyDiT, build

PLACES = {
    "branches": Where(),
    "stack": Where(span="stack"),
    "output": Where(span="output"),
    "output-latent": Where(span="output", minus="latent"),
}
LOWERED = [*((place, "variants") for place in PLACES), ("branches", "segments")]


def every(interval: int, do: Strategy, where: Where | None = None) -> Policy:
    return Policy((Rule(Ne(Mod(step, interval), 0), do, where or Where()),))


def rewritten(model: nn.Module, policy: Policy, **more: Any) -> RewrittenModule:
    return compile(twin(model), policy, backend="aot_eager", **more)


def inputs(seed: int = 0, batch: int = 2, tokens: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, tokens, CHANNELS, generator=generator),
        torch.randn(batch, WIDTH, generator=generator),
    )


@torch.no_grad()
def sample(model: Any, steps: int, given: tuple[Tensor, Tensor] | None = None, stop: int | None = None) -> list[Tensor]:
    """The model's output at each step of a small sampler."""
    latent, condition = given or inputs()
    outputs = []
    for i in range(steps if stop is None else stop):
        time = torch.full((len(latent),), 900.0 - 40 * i)
        outputs.append(model(latent, time, condition).clone())
        latent = latent - 0.05 * outputs[-1]
    return outputs


def told(model: RewrittenModule, steps: int, given: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
    with model.trajectory(num_steps=steps):
        return sample(model, steps, given)


# --- against an independent reference ---------------------------------------------------------------------------------


class Seer:
    """TaylorSeer on a module by a hook, as in its source: factors of the last computed step, over intervals."""

    def __init__(self, order: int, interval: int) -> None:
        self.order, self.interval, self.now, self.at = order, interval, 0, 0
        self.factors: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self.now % self.interval == 0:
            new, distance = [output], self.now - self.at
            for factor in self.factors[: self.order]:
                new.append((new[-1] - factor) / distance)
            self.factors, self.at = new, self.now
            self.now += 1
            return output
        total, ahead, factorial = torch.zeros_like(output), self.now - self.at, 1
        for i, factor in enumerate(self.factors):
            factorial *= max(i, 1)
            total = total + factor * ahead**i / factorial
        self.now += 1
        return total


@contextmanager
def hooked(model: TinyDiT, order: int, interval: int) -> Iterator[None]:
    branches = [part for block in model.blocks for part in (block.attn, block.mlp)]
    handles = [branch.register_forward_hook(Seer(order, interval)) for branch in branches]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("order", "interval", "lowering"),
    [(0, 2, "variants"), (1, 2, "segments"), (1, 4, "variants"), (2, 3, "variants"), (2, 3, "segments")],
)
def test_forecasts_are_taylorseers(order: int, interval: int, lowering: str) -> None:
    model = build()
    with hooked(model, order, interval):
        expected = sample(model, 10)
    found = told(rewritten(model, every(interval, Forecast(order, TaylorSeer())), lowering=lowering), 10)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[-1], sample(model, 10)[-1], atol=1e-3), "some steps forecast"


@pytest.mark.parametrize(("place", "lowering"), LOWERED)
def test_a_forecast_of_a_line_is_exact(place: str, lowering: str) -> None:
    """Branches and output are linear in the time, so a forecast of order 1 equals the computed value."""

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, latent: Tensor, timestep: Tensor) -> Tensor:
            h = latent * 0.0
            for block in self.blocks:
                h = h + block(h * 0.0 + 1.0) * 0.0 + block.weight @ torch.ones(4) * timestep + block(h)
            return h

    torch.manual_seed(0)
    model = Line().eval()
    latent = torch.randn(2, 3, 4)
    model = rewritten(model, every(3, Forecast(1), PLACES[place]), lowering=lowering)
    with torch.no_grad(), model.trajectory(num_steps=9):
        outputs = [model(latent, torch.tensor(float(t))).clone() for t in range(9)]
    assert model.stats().reused > 0
    for t in range(3, 9):
        line = outputs[0] + (outputs[3] - outputs[0]) * t / 3
        torch.testing.assert_close(outputs[t], line, rtol=1e-4, atol=1e-4)


# --- reuse is order 0 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "lowering"), LOWERED)
def test_order_0_and_reuse_are_the_same_bits(place: str, lowering: str) -> None:
    """With a history that is longer than needed too: the weights are (1, 0, 0)."""
    model = build()
    runs = [
        told(rewritten(model, every(3, do, PLACES[place]), lowering=lowering), 7)
        for do in (Reuse(), Forecast(0), Forecast(0, history=3))
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_a_slot_with_a_history_can_be_reused_too() -> None:
    """Reuse and a forecast on one site: reuse reads the newest value."""
    model = build()
    mixed = Policy((Rule(Eq(Mod(step, 3), 1), Reuse()), Rule(Eq(Mod(step, 3), 2), Forecast(2))))
    plain = Policy((Rule(Eq(Mod(step, 3), 1), Reuse()), Rule(Eq(Mod(step, 3), 2), Forecast(0))))
    ours, theirs = (rewritten(model, policy) for policy in (mixed, plain))
    a, b = told(ours, 3), told(theirs, 3)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), "before the second computed step both reuse"
    last = [d.strategies["blocks.0.attn"] for d in ours.stats().decisions]
    assert last == ["compute", "reuse", "forecast"]


# --- one segment for all ----------------------------------------------------------------------------------------------


def test_orders_bases_and_intervals_share_one_piece() -> None:
    """Two variants in all, one that computes and one that forecasts; nothing is compiled late or twice."""
    kinds = [
        Forecast(1, history=4),
        Forecast(3, history=4),
        Forecast(2, "taylorseer", history=4),
        Forecast(1, lambda places, place, order: [0.5] * len(places), history=4),
        Reuse(),
    ]
    ends = [5, 9, 14, 18, 40]
    rules = [
        Rule((step < end) & Ne(Mod(step, 2 + i), 0) & (step > 0), do)
        for i, (do, end) in enumerate(zip(kinds, ends, strict=True))
    ]
    model = rewritten(build(), Policy(tuple(rules)))
    told(model, 24)
    stats = model.stats()
    assert (stats.variants, stats.late_variants, stats.recompiles) == (2, 0, 0)
    assert stats.misses == {}
    assert {d.strategies["blocks.0.attn"] for d in stats.decisions} == {"compute", "forecast", "reuse"}


def test_a_function_of_ones_own() -> None:
    asked: list[tuple[Any, ...]] = []

    def mean(places: Sequence[float], place: float, order: int) -> list[float]:
        asked.append((tuple(places), place, order))
        return [1 / len(places)] * len(places)

    model = build()
    where = Where(span="output")
    outputs = told(rewritten(model, every(2, Forecast(1, mean), where)), 6)
    assert asked[-3:] == [((0.0,), 1.0, 0), ((2.0, 0.0), 3.0, 1), ((4.0, 2.0), 5.0, 1)], "after the plan was foreseen"
    torch.testing.assert_close(outputs[3], (outputs[2] + outputs[0]) / 2)


# --- where there is no forecast ---------------------------------------------------------------------------------------


def test_no_weights_no_forecast() -> None:
    """A basis that divides by zero, or gives NaN or too many weights: the site computes and reports the reason."""
    model = build()
    plain = sample(model, 4)
    bad = [lambda *_: [1 / 0], lambda *_: [float("nan")], lambda p, *_: [1.0] * (len(p) + 1), lambda *_: []]
    for basis in bad:
        ours = rewritten(model, every(2, Forecast(1, basis)))
        assert all(torch.equal(a, b) for a, b in zip(told(ours, 4), plain, strict=True))
        stats = ours.stats()
        assert (stats.reused, stats.misses[MissReason.NO_WEIGHTS]) == (0, 2 * 4)


def test_places_that_nobody_knows() -> None:
    """Places given by the noise level, without a scheduler: the policy is refused, or computes with the reason."""
    model = rewritten(build(), every(2, Forecast(1, over="sigma")))
    told(model, 4)
    assert model.stats().reused == 0
    assert model.stats().misses[MissReason.NOISE_UNKNOWN] == 2 * 4


def test_over_the_noise_level() -> None:
    """The places are sigmas: a forecast of order 1 is the line through the last two values."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    latent, condition = inputs()
    model = rewritten(build(), every(2, Forecast(1, over="sigma"), Where(span="output")))
    outputs = []
    with torch.no_grad(), model.trajectory(num_steps=6, scheduler=scheduler):
        for t in scheduler.timesteps:
            outputs.append(model(latent, t.expand(2), condition).clone())
            latent = latent - 0.05 * outputs[-1]
    s = scheduler.sigmas.tolist()
    share = (s[3] - s[2]) / (s[2] - s[0])
    torch.testing.assert_close(outputs[3], outputs[2] + (outputs[2] - outputs[0]) * share, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        {"order": -1},
        {"order": 1.0},
        {"order": True},
        {"order": 99},
        {"basis": "fourier"},
        {"basis": 3},
        {"history": 0},
        {"history": 1000},
        {"over": "time"},
        {"store": "int4"},
    ],
)
def test_parameters_out_of_range(given: dict[str, Any]) -> None:
    with pytest.raises(BadParameter, match=f"{next(iter(given))}="):
        Forecast(**given)


# --- histories of trajectories and streams ----------------------------------------------------------------------------


def test_histories_end_with_their_trajectory() -> None:
    """Trajectories A, B, A: the third equals the first bit for bit, also when B was cut short."""
    model = rewritten(build(), every(2, Forecast(2)))
    first = told(model, 6, inputs(1))
    with model.trajectory(num_steps=6):
        sample(model, 6, inputs(2), stop=3)
    assert all(torch.equal(a, b) for a, b in zip(told(model, 6, inputs(1)), first, strict=True))


def test_histories_of_streams_stay_apart() -> None:
    """Two images, step by step in one trajectory: each equals its own separate run."""
    model = rewritten(build(), every(3, Forecast(2)))
    pictures = [inputs(1), inputs(2)]
    alone = [told(model, 7, picture) for picture in pictures]
    latents = [latent for latent, _ in pictures]
    with torch.no_grad(), model.trajectory(num_steps=7):
        for i in range(7):
            for k, (_, condition) in enumerate(pictures):
                output = model(latents[k], torch.full((2,), 900.0 - 40 * i), condition)
                assert torch.equal(output, alone[k][i])
                latents[k] = latents[k] - 0.05 * output


def test_another_shape_starts_a_history_of_its_own() -> None:
    """When the number of tokens changes in mid-trajectory, no older value is read: the order falls to reuse."""
    model = rewritten(build(), every(2, Forecast(1), Where(span="output")))
    (start, condition), (move, _) = inputs(0), inputs(1)
    outputs = []
    with torch.no_grad(), model.trajectory(num_steps=8):
        for i in range(8):
            latent = (start + 0.1 * i * move)[:, : 8 if i < 4 else 6]
            outputs.append(model(latent, torch.full((2,), 900.0 - 40 * i), condition).clone())
    assert torch.equal(outputs[5], outputs[4]), "one value of this shape: reuse"
    torch.testing.assert_close(outputs[7], outputs[6] + (outputs[6] - outputs[4]) / 2)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "store"), [*((place, None) for place in PLACES), ("branches", "bf16")])
def test_k_values_take_k_times_the_bytes(place: str, store: Any) -> None:
    """`explain` predicts the peak that the run reaches."""
    held = {}
    for history in (1, 3):
        model = rewritten(build(), every(2, Forecast(0, history=history, store=store), PLACES[place]))
        told(model, 8)
        stats = model.stats()
        held[history] = stats.peak_bytes
        assert sum(p.bytes for p in model.explain().sites if p.reachable) == stats.peak_bytes
    assert held[3] == 3 * held[1]


def test_the_output_site_runs_nothing() -> None:
    """The only op of the reusing graph is the weighted sum; a step that computes has the plain model's bits."""
    model = build()
    ours = rewritten(model, every(2, Reuse(), Where(span="output")))
    found, plain = told(ours, 4), sample(model, 1)
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1], found[0])
    (graph,) = ours.explain().rewritten
    (reusing,) = [variant for (_, row), variant in graph.variants.items() if any(row)]
    assert [node for node in reusing.gm.graph.nodes if node.op == "call_function"] == []


def test_outputs_belong_to_the_caller() -> None:
    """A caller that changes an output in place does not change the cache."""
    model = rewritten(build(), every(2, Forecast(1), Where(span="output")))
    latent, condition = inputs()
    with torch.no_grad(), model.trajectory(num_steps=4):
        outputs = []
        for i in range(4):
            output = model(latent, torch.full((2,), 900.0 - 40 * i), condition)
            outputs.append(output.clone())
            output.fill_(float("nan"))
    torch.testing.assert_close(outputs[3], outputs[2] + (outputs[2] - outputs[0]) / 2)


@pytest.mark.parametrize(
    ("place", "store"), [*((place, None) for place in PLACES), ("branches", "int8"), ("output", "int8")]
)
def test_verify_replays_forecasts(place: str, store: Any) -> None:
    latent, condition = inputs()
    given = [
        {"hidden_states": latent * (1 - 0.1 * i), "timestep": torch.full((2,), 900.0 - 40 * i), "condition": condition}
        for i in range(7)
    ]
    result = verify(build(), given, every(3, Forecast(2, store=store), PLACES[place]), backend="aot_eager")
    assert result.exact and result.reused > 0
