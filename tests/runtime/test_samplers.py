"""Random samplers against an oracle: no call gets the stream of another, and provable streams are recognised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from dit_rewrite.runtime.inputs import Inputs
from dit_rewrite.runtime.trajectory import Clock, ExplicitTrajectory, InferredTrajectory, Named

BATCH = 2
SCHEDULED = ("view", "value", "scaled", "step_index")  # with a scheduler: how the timestep reaches the model
COUNTED = ("float", "unknown", "device", "index")  # only the number of steps is known
KEPT, ANEW = "kept", "made anew at each call"


@dataclass(frozen=True)
class Sampler:
    """A sampler. In each step it calls each of its streams: every prompt on every window, `twins` times."""

    time: str = "view"
    pictures: tuple[int, ...] = (4,)  # number of timesteps of each picture
    steps: int = 4
    contexts: bool = False  # one trajectory() for each picture
    reset: bool = False  # set_timesteps is called for each picture
    prompts: int = 1
    windows: int = 1
    twins: int = 1
    rotates: bool = False  # the order of the windows rotates
    prompts_first: bool = False  # all windows of the first prompt before those of the second
    named: bool = False
    conditioning: str = KEPT
    same_prompts: bool = True  # in all pictures
    varying: str = ""  # an argument with a new tensor in each "step" or in each "call"
    steady: bool = False  # an additional tensor that never changes
    evaluations: int = 1  # 2: a second evaluation at all timesteps except the first
    unguided_from: int = 9  # from this step on, only the first prompt is called, once
    replaced_at: int = 9  # from this step on, all prompts are different ones
    rising: bool = False
    marked: bool = True

    @property
    def scheduled(self) -> bool:
        return self.time in SCHEDULED

    @property
    def knows_time(self) -> bool:
        return self.time not in ("unknown", "device")


@dataclass
class Seen:
    """A call: its true origin, and its time."""

    picture: int
    origin: tuple[int, ...]  # prompt, window, twin, number of earlier prompts
    step: int
    evaluation: int
    inputs: Inputs
    named: Named


@dataclass
class Run:
    """A running sampler; `clock` and `scheduler` are those of the current context."""

    sampler: Sampler
    generator: Generator = field(default_factory=lambda: Generator().manual_seed(0))
    scheduler: Any = None

    def noise(self) -> Tensor:
        return torch.randn(1, 64, generator=self.generator)

    def times(self) -> list[float]:
        """Return the timesteps of a picture, one for each evaluation."""
        sampler = self.sampler
        falling = [900.0 - 100 * i for i in range(sampler.steps)]
        distinct = falling[::-1] if sampler.rising else falling
        return [t for i, t in enumerate(distinct) for _ in range(sampler.evaluations if i else 1)]

    def set_timesteps(self) -> None:
        if self.scheduler is None:
            self.scheduler = SimpleNamespace(config={"num_train_timesteps": 1000})
        self.scheduler.timesteps = torch.tensor(self.times())
        self.scheduler.step_index = None

    def timestep(self, entry: int) -> Any:
        time = self.sampler.time
        value = self.times()[entry]
        if time in ("view", "step_index"):
            view = self.scheduler.timesteps[entry].expand(BATCH)
            return view if time == "view" else view.clone().to("meta")
        if time in ("value", "index"):
            return torch.tensor([value] * BATCH)
        if time == "scaled":
            return torch.tensor([value] * BATCH) / 1000
        return {"float": value, "unknown": None, "device": torch.empty(BATCH, device="meta")}[time]

    def order(self, step: int) -> Iterator[tuple[int, int, int]]:
        """Return the streams of a step as (prompt, window, twin)."""
        sampler = self.sampler
        guided = step < sampler.unguided_from
        windows = list(range(sampler.windows))
        turn = step % sampler.windows if sampler.rotates else 0
        windows = windows[turn:] + windows[:turn]
        prompts = range(sampler.prompts if guided else 1)
        pairs = [(p, w) for w in windows for p in prompts]
        pairs = sorted(pairs, key=lambda pair: pair[0]) if sampler.prompts_first else pairs
        return ((p, w, twin) for p, w in pairs for twin in range(sampler.twins if guided else 1))

    def calls(self, picture: int, prompts: list[list[Tensor]], steady: Tensor) -> Iterator[Seen]:
        sampler = self.sampler
        latents = [self.noise() for _ in range(sampler.windows)]
        done, times = sampler.pictures[picture], self.times()
        step = evaluation = 0
        for entry, time in enumerate(times):
            if entry:
                again = time == times[entry - 1]
                step, evaluation = (step, evaluation + 1) if again else (step + 1, 0)
            if step == done:
                return
            for call in self.calls_of(step, latents, prompts[step >= sampler.replaced_at], steady, entry):
                yield replace(call, picture=picture, evaluation=evaluation)
            share = 0.05 + 0.15 * float(torch.rand((), generator=self.generator))
            latents = [x + share * x.norm() * (n := self.noise()) / n.norm() for x in latents]
            if self.scheduler is not None and sampler.time == "step_index":
                self.scheduler.step_index = entry + 1

    def calls_of(
        self, step: int, latents: list[Tensor], prompts: list[Tensor], steady: Tensor, entry: int
    ) -> Iterator[Seen]:
        sampler = self.sampler
        now = self.noise()
        replaced = int(step >= sampler.replaced_at)
        for prompt, window, twin in self.order(step):
            tensors = [prompts[prompt] if sampler.conditioning == KEPT else prompts[prompt].clone()]
            tensors += [now if sampler.varying == "step" else self.noise()] if sampler.varying else []
            tensors += [steady] if sampler.steady else []
            name = f"prompt {prompt}" if sampler.named else None
            named = Named(name, step_index=step if sampler.time == "index" else None)
            inputs = Inputs(latents[window], self.timestep(entry), tuple(tensors))
            yield Seen(0, (prompt, window, twin, replaced), step, 0, inputs, named)
            del tensors, inputs  # so that the sampler does not keep them alive


@dataclass(eq=False)
class Tag:
    """Marks the caches of a stream with the call that filled them."""

    origin: tuple[Any, ...]
    bytes: int = 0


@dataclass
class Verdict:
    """The result of comparing a run with the oracle."""

    unsound: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong_steps: list[str] = field(default_factory=list)
    calls: int = 0


def follow(sampler: Sampler) -> Verdict:
    """Run a sampler and compare the place of each call with its true origin."""
    run, verdict = Run(sampler), Verdict()
    prompts: list[list[Tensor]] = []
    steady = torch.ones(2)
    place: Any = None
    for picture in range(len(sampler.pictures)):
        if not prompts or not sampler.same_prompts:
            prompts = [[run.noise() for _ in range(sampler.prompts)] for _ in range(2)]
        if sampler.scheduled and (picture == 0 or sampler.reset or sampler.time == "step_index"):
            run.set_timesteps()
        if place is None or (sampler.contexts and sampler.marked):
            clock = Clock(None if sampler.scheduled else sampler.steps, run.scheduler)
            place = (ExplicitTrajectory(clock) if sampler.marked else InferredTrajectory()).place
        before: dict[Any, Any] = {}
        for seen in run.calls(picture, prompts, steady):
            judge(sampler, seen, place(seen.inputs, seen.named), before, verdict)
    return verdict


def judge(sampler: Sampler, seen: Seen, found: Any, before: dict[Any, Any], verdict: Verdict) -> None:
    verdict.calls += 1
    stream, origin = found.stream, (seen.picture, *seen.origin)
    at = f"picture {seen.picture}, step {seen.step}.{seen.evaluation}, stream {seen.origin}: "
    tag = stream.caches.setdefault((0, 0), Tag(origin))
    if tag.origin != origin:
        verdict.unsound.append(f"{at}has values of {tag.origin}")
    last = before.get(origin)
    if last is not None and last is not stream and provable(sampler, seen):
        verdict.lost.append(f"{at}{found.why}")
    before[origin] = stream
    if sampler.marked and sampler.knows_time and found.trajectory.step != seen.step:
        verdict.wrong_steps.append(f"{at}said to be {found.trajectory.step}")


def provable(sampler: Sampler, seen: Seen) -> bool:
    """Return whether a call that is not the first of its stream can be recognised as such.

    It cannot if its tensors differ in each call of a step with several calls on one latent, or if such a step is
    evaluated twice without a timestep that shows it, or ends unmarked.
    """
    if not sampler.marked:
        cut = sampler.varying and 1 in sampler.pictures[: seen.picture] and (seen.step == 1 or sampler.evaluations > 1)
        cut = cut or (sampler.evaluations > 1 and sampler.replaced_at < sampler.steps)  # the pair may be two pictures
        return (
            not cut
            and sampler.twins == sampler.windows == 1
            and sampler.conditioning == KEPT
            and sampler.time != "unknown"
        )
    if sampler.evaluations > 1 and sampler.varying and sampler.replaced_at < sampler.steps:
        return False  # both evaluations are in the first step of the streams
    if sampler.twins > 1:
        ends = sampler.unguided_from < sampler.steps and (sampler.windows > 1 or not sampler.knows_time)
        once = sampler.evaluations == 1 or (sampler.time in ("view", "step_index") and not sampler.varying)
        return sampler.varying != "call" and once and not ends
    return True


@st.composite
def samplers(draw: st.DrawFn, marked: bool) -> Sampler:
    steps = draw(st.integers(3, 5))
    pictures = draw(st.lists(st.sampled_from([steps, steps, 1, 2]), min_size=1, max_size=3))
    prompts = draw(st.integers(1, 2))
    windows = draw(st.integers(1, 4 // prompts))
    time = draw(st.sampled_from((*SCHEDULED, *COUNTED) if marked else ("value", "float", "scaled", "index")))
    return Sampler(
        time=time,
        pictures=tuple(pictures),
        steps=steps,
        contexts=marked and draw(st.booleans()),
        reset=draw(st.booleans()),
        prompts=prompts,
        windows=windows,
        twins=draw(st.integers(1, 4 // prompts // windows)),
        rotates=draw(st.booleans()),
        prompts_first=draw(st.booleans()),
        named=draw(st.booleans()),
        conditioning=draw(st.sampled_from([KEPT, ANEW])),
        same_prompts=draw(st.booleans()),
        varying=draw(st.sampled_from(["", "", "step", "call"])),
        steady=draw(st.booleans()),
        evaluations=draw(st.sampled_from([1, 1, 2])),
        unguided_from=draw(st.integers(1, 9)),
        replaced_at=draw(st.sampled_from([1, 2, 9, 9])),
        rising=draw(st.booleans()),
        marked=marked,
    )


@settings(max_examples=150, deadline=None)
@given(samplers(marked=True))
def test_marked(sampler: Sampler) -> None:
    verdict = follow(sampler)
    assert (verdict.unsound, verdict.lost, verdict.wrong_steps) == ([], [], [])


@settings(max_examples=100, deadline=None)
@given(samplers(marked=False))
def test_inferred(sampler: Sampler) -> None:
    verdict = follow(sampler)
    assert (verdict.unsound, verdict.lost) == ([], [])


HARD = {
    "the scheduler's step_index is None at the first call": Sampler("step_index"),
    "varying inputs of one prompt on two windows": Sampler(windows=2, rotates=True, varying="step"),
    "varying inputs of two prompts on two windows": Sampler(windows=2, prompts=2, rotates=True, varying="call"),
    "varying inputs beside prompts made anew": Sampler(prompts=2, conditioning=ANEW, varying="call", steady=True),
    "perturbed guidance with varying inputs": Sampler(twins=3, varying="step"),
    "perturbed guidance on windows in turn": Sampler(windows=2, twins=2, rotates=True),
    "perturbed guidance that ends, on windows in turn": Sampler(windows=2, twins=2, rotates=True, unguided_from=2),
    "perturbed guidance in a second-order solver": Sampler(twins=2, windows=2, evaluations=2),
    "perturbed guidance after a picture of one step": Sampler(pictures=(1, 4), twins=2),
    "a second picture on an unknown time": Sampler("unknown", pictures=(2, 3), prompts=2, twins=2, replaced_at=2),
    "guidance of the first step, and a prompt that changes": Sampler(
        prompts=2, conditioning=ANEW, steady=True, unguided_from=1, replaced_at=2
    ),
    "a prompt that is exchanged in the second step": Sampler(conditioning=ANEW, steady=True, replaced_at=1),
    "prompts that are exchanged in the second step, beside varying inputs": Sampler(
        prompts=2, conditioning=ANEW, varying="call", steady=True, replaced_at=1
    ),
    "a second-order solver with varying inputs on windows": Sampler(windows=2, varying="call", evaluations=2),
    "a prompt that is exchanged in the second step, inferred": Sampler(
        "value", conditioning=ANEW, steady=True, replaced_at=1, marked=False
    ),
    "a prompt made anew at each call that is exchanged later, inferred": Sampler(
        "value", conditioning=ANEW, steady=True, replaced_at=2, marked=False
    ),
    "a second-order solver with varying inputs, inferred": Sampler(
        "value", varying="call", steady=True, evaluations=2, marked=False
    ),
    "perturbed guidance, inferred": Sampler("value", twins=2, marked=False),
    "prompts made anew, inferred": Sampler("value", prompts=2, conditioning=ANEW, steady=True, marked=False),
    "prompts made anew on windows in turn, inferred": Sampler(
        "value", prompts=2, windows=2, rotates=True, conditioning=ANEW, prompts_first=True, steady=True, marked=False
    ),
    "varying inputs of two prompts, inferred": Sampler("value", prompts=2, varying="call", marked=False),
}


@pytest.mark.parametrize("sampler", HARD.values(), ids=HARD)
def test_hard_samplers(sampler: Sampler) -> None:
    verdict = follow(sampler)
    assert verdict.calls > 0
    assert (verdict.unsound, verdict.lost, verdict.wrong_steps) == ([], [], [])
