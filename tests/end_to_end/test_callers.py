"""Every way of calling a compiled model: each stream equals FORA applied to that stream alone, bit for bit.

A stream is all calls of one origin. Module hooks on the plain model, which see the calls of one origin only, compute
the expected outputs: a value from another stream, or from another step, would make a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from dit_rewrite import RewrittenModule
from dit_rewrite.errors import StreamReason, TrajectoryReason
from tests.helpers import tiny
from tests.helpers.drawn import prepare
from tests.helpers.tiny import TinyDiT, calls, condition, rewritten, same
from tests.references.fora import ModuleCache

STEPS = 7
FORA_3 = "CRRCRRC"


@dataclass
class Call:
    """One call: its origin, its arguments, and the attributes of the model that are set before it."""

    origin: Hashable
    arguments: dict[str, Any]
    attributes: dict[str, Any] = field(default_factory=dict)

    def run(self, model: nn.Module) -> Tensor:
        for name, value in self.attributes.items():
            setattr(model, name, value)
        return model(**self.arguments).clone()  # type: ignore[no-any-return]


def path(seed: int, given: Tensor | None = None, tokens: int = 8) -> list[dict[str, Any]]:
    return calls(STEPS, seed, given, tokens)


def in_turn(*streams: tuple[Hashable, list[dict[str, Any]]], rotating: bool = False) -> list[Call]:
    """The calls of some streams, step by step; if they rotate, each stream goes first in turn."""
    steps = []
    for step in range(len(streams[0][1])):
        first = step % len(streams) if rotating else 0
        steps += [Call(origin, theirs[step]) for origin, theirs in (*streams[first:], *streams[:first])]
    return steps


def by_hooks(plain: TinyDiT, theirs: Sequence[Call], letters: str) -> list[Tensor]:
    """Outputs of the plain model when attentions and MLPs return, at each R, the value that they had at the last C."""
    found = []
    with ModuleCache(part for b in plain.blocks for part in (b.attn, b.mlp)) as cache:
        for letter, call in zip(letters, theirs, strict=True):
            cache.reuse = letter == "R"
            found.append(call.run(plain))
    return found


@torch.no_grad()
def sample(plain: TinyDiT, sequence: Sequence[Call], warm: bool = False) -> RewrittenModule:
    """Run the calls in one trajectory, and expect FORA for each stream.

    `warm` checks the second run, since Dynamo makes a graph dynamic when it meets a second size or number.
    """
    compiled = rewritten(plain)
    if warm:
        with compiled.trajectory(STEPS):
            for call in sequence:
                call.run(compiled)
    before = compiled.stats()
    with compiled.trajectory(STEPS):
        expect(compiled, plain, sequence, FORA_3)
    streams, stats = len({call.origin for call in sequence}), compiled.stats()
    done = stats.computed - before.computed, stats.reused - before.reused
    assert done == (3 * streams * tiny.SITES, 4 * streams * tiny.SITES)
    return compiled


@torch.no_grad()
def expect(compiled: RewrittenModule, plain: TinyDiT, sequence: Sequence[Call], letters: str) -> None:
    found = [call.run(compiled) for call in sequence]
    rows = tiny.row(compiled, len(sequence))
    for origin in {call.origin: None for call in sequence}:
        mine = [i for i, call in enumerate(sequence) if call.origin == origin]
        assert "".join(rows[i] for i in mine) == letters, origin
        assert same([found[i] for i in mine], by_hooks(plain, [sequence[i] for i in mine], letters)), origin


def made(kind: type[TinyDiT]) -> TinyDiT:
    model = kind()
    prepare(model, torch.float32)
    return model


# --- several calls of one conditioning in a step ----------------------------------------------------------------------


def test_windows_in_turn() -> None:
    given = condition()
    windows = in_turn(*((seed, path(seed, given)) for seed in range(3)), rotating=True)
    assert sample(tiny.build(), windows).stats().streams == {}


def test_tiles_of_two_sizes() -> None:
    """The tiles at the edge are smaller than the others."""
    given = condition()
    tiles = [((seed, tokens), path(seed, given, tokens)) for seed in range(2) for tokens in (8, 5)]
    sample(tiny.build(), in_turn(*tiles), warm=True)


def test_a_batch_in_two_halves() -> None:
    """The halves are views, created at each call, and so are their conditions, which are equal."""
    given, halves = condition()[:1], []
    for half in (slice(0, 1), slice(1, 2)):
        cut = [{name: tensor[half] for name, tensor in a.items()} for a in path(1)]
        halves.append((half.start, [{**a, "condition": given.clone()} for a in cut]))
    sample(tiny.build(), in_turn(*halves))


class Perturbed(TinyDiT):
    """A number and a switch of the module perturb the call."""

    weakened = False

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor, strength: float = 1.0) -> Tensor:
        condition = condition * (0.25 if self.weakened else 1.0)
        return super().forward(hidden_states, timestep, strength * condition)


def test_perturbed_by_a_number() -> None:
    both = path(1)
    sample(made(Perturbed), in_turn(("whole", both), ("perturbed", [{**a, "strength": 0.5} for a in both])), warm=True)


def test_perturbed_by_a_switch() -> None:
    """The arguments do not tell the two calls apart, on two windows that take turns."""
    windows, given = range(2), condition()
    of = [path(seed, given) for seed in windows]
    order = [(s, (w + s) % 2, weak) for s in range(STEPS) for w in windows for weak in (False, True)]
    sample(made(Perturbed), [Call((w, weak), of[w][s], {"weakened": weak}) for s, w, weak in order])


# --- conditions that are not tensors among the arguments --------------------------------------------------------------


@dataclass
class Prompt:
    """A condition inside an object of the caller."""

    vector: Tensor
    scale: float = 1.0


class Prompted(TinyDiT):
    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Prompt) -> Tensor:
        return super().forward(hidden_states, timestep, prompt.vector * prompt.scale)


def test_a_condition_in_a_dataclass() -> None:
    both = [{name: a[name] for name in ("hidden_states", "timestep")} for a in path(1)]
    vectors = {"cond": condition(1), "uncond": condition(2)}
    streams = [(name, [{**a, "prompt": Prompt(vector)} for a in both]) for name, vector in vectors.items()]
    sample(made(Prompted), in_turn(*streams))


class Ambient(TinyDiT):
    given: Tensor

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(hidden_states, timestep, self.given)


def test_a_condition_on_the_module() -> None:
    both = [{name: a[name] for name in ("hidden_states", "timestep")} for a in path(1)]
    model, given = made(Ambient), {"cond": condition(1), "uncond": condition(2)}
    model.given = given["cond"]
    sample(model, [Call(name, a, {"given": vector}) for a in both for name, vector in given.items()])


def test_ten_streams() -> None:
    compiled = sample(tiny.build(), in_turn(*((i, path(1, condition(i))) for i in range(10))))
    assert StreamReason.EVICTED not in compiled.stats().streams


# --- several runs in one context --------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", ["num_steps", "scheduler"])
def test_runs_in_one_context(told: str) -> None:
    """A warm-up call, two chunks of one prompt, a run that is cut short, and a run of another prompt."""
    scheduler = SimpleNamespace(timesteps=torch.stack([a["timestep"][0] for a in path(0)]))
    given = condition()
    plain = tiny.build()
    compiled = rewritten(plain)
    runs = [path(9, given)[:1], path(1, given), path(2, given), path(3, given)[:3], path(4)]
    with compiled.trajectory(STEPS) if told == "num_steps" else compiled.trajectory(scheduler=scheduler):
        for number, arguments in enumerate(runs):
            expect(compiled, plain, in_turn((number, arguments)), FORA_3[: len(arguments)])
    steps = [decision.step for decision in compiled.stats().decisions]
    assert steps == [step for arguments in runs for step in range(len(arguments))]
    assert compiled.stats().trajectories == {TrajectoryReason.TIMESTEP_TURNED: 3}


# --- inputs that move -------------------------------------------------------------------------------------------------


class Forced(TinyDiT):
    """Diffusion forcing: each frame has its own time."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        offsets = timestep.float().mean(dim=1)
        return super().forward(hidden_states, offsets, condition)


FRAMES = {
    "a time for each, each later than the next": lambda step: 900.0 - 100 * step - 10 * torch.arange(4.0),
    "frames that are given": lambda step: torch.tensor([0.0, 0.0, 900.0 - 100 * step, 900.0 - 100 * step]),
    "each begins when the last has gone a step": lambda step: 900.0 - 100 * (step - torch.arange(4.0)).clamp(min=0),
}


@pytest.mark.parametrize("told", ["num_steps", "scheduler"])
@pytest.mark.parametrize("frames", FRAMES)
@torch.no_grad()
def test_a_time_for_each_frame(frames: str, told: str) -> None:
    scheduler = SimpleNamespace(timesteps=torch.linspace(900, 300, STEPS))
    arguments = [{**a, "timestep": FRAMES[frames](step).expand(2, -1)} for step, a in enumerate(path(1))]
    plain = made(Forced)
    compiled = rewritten(plain)
    with compiled.trajectory(STEPS) if told == "num_steps" else compiled.trajectory(scheduler=scheduler):
        expect(compiled, plain, in_turn(("frames", arguments)), FORA_3)
    assert [decision.step for decision in compiled.stats().decisions] == list(range(STEPS))


class Sounding(TinyDiT):
    """A second latent beside the first one."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor, audio: Tensor) -> Tensor:
        return super().forward(hidden_states + audio.mean(), timestep, condition)


@torch.no_grad()
def moving(plain: TinyDiT, make: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]) -> None:
    """Two prompts on one latent, and a second path; the caller keeps no reference to their tensors."""
    compiled, letters = rewritten(plain), "CCRCRRC"  # the second step computes, since the tensor may be another prompt
    given = {name: condition(seed) for seed, name in enumerate(("cond", "uncond"))}

    def at(step: int, name: str) -> Call:
        return Call(name, make({**path(1)[step], "condition": given[name]}, path(2)[step]))

    with compiled.trajectory(STEPS):
        found = [at(step, name).run(compiled) for step in range(STEPS) for name in given]
    rows = tiny.row(compiled, 2 * STEPS)
    for i, name in enumerate(given):
        assert rows[i::2] == letters
        assert same(found[i::2], by_hooks(plain, [at(step, name) for step in range(STEPS)], letters))
    assert compiled.stats().streams == {StreamReason.MOVED_ONCE: len(given)}


def test_a_second_latent() -> None:
    moving(made(Sounding), lambda picture, sound: {**picture, "audio": sound["hidden_states"]})


class Listed(TinyDiT):
    """One latent per sample, in a list."""

    def forward(self, hidden_states: list[Tensor], timestep: Tensor, condition: Tensor) -> Tensor:
        return super().forward(torch.stack(hidden_states), timestep, condition)


def test_latents_in_a_list() -> None:
    moving(made(Listed), lambda picture, _: {**picture, "hidden_states": list(picture["hidden_states"].unbind())})


# --- schedules --------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
    "flow": diffusers.FlowMatchEulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "pndm": diffusers.PNDMScheduler,
}


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_schedules_entered_late(name: str) -> None:
    """Image to image at three strengths, as pipelines call it. A step is one timestep, with one or two calls."""
    plain = tiny.build()
    compiled = rewritten(plain)
    for strength in (0.3, 0.6, 1.0):
        scheduler = SCHEDULERS[name]()
        with compiled.trajectory(scheduler=scheduler):
            scheduler.set_timesteps(10)
            begin = len(scheduler.timesteps) - round(strength * len(scheduler.timesteps))
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(begin)
            times = scheduler.timesteps[begin:]
            arguments = calls(len(times), seed=1)
            found = []
            for t, a in zip(times, arguments, strict=True):
                a["timestep"] = t.expand(2)
                found.append(compiled(**a).clone())
                scheduler.step(found[-1], t, a["hidden_states"])
        steps = [int((times[:i] != times[1 : i + 1]).sum()) for i in range(len(times))]
        assert [decision.step for decision in compiled.stats().decisions[-len(times) :]] == steps
        letters = "".join("RC"[step % 3 == 0] for step in steps)
        assert tiny.row(compiled, len(times)) == letters
        assert same(found, by_hooks(plain, [Call(0, a) for a in arguments], letters))
