"""A pipeline's life: runs cut short, copies, pipelines made from it, policies replaced, and the plain one restored.

Every test runs FORA(2): a value reused from another run would change the image.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import dit_rewrite
from dit_rewrite.policies import FORA
from tests.end_to_end.pipelines.registry import PIPELINES
from tests.end_to_end.pipelines.test_enable import NEVER_OLD_ENOUGH, decisions

STEPS = 4
KINDS = [("flux", True), ("sd3", True), ("cogvideox", False)]  # two named streams; none; a scheduler without step_index

pytestmark = pytest.mark.filterwarnings("ignore:never old enough")


class Stopped(Exception):
    """Raised by a callback."""


def interrupt(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Ask the pipeline to end after its second step."""
    pipe._interrupt = index == 1
    return tensors


def fail(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Raise an error after the second step."""
    if index == 1:
        raise Stopped
    return tensors


def enabled(name: str) -> Any:
    """A new pipeline under FORA(2)."""
    return dit_rewrite.enable(PIPELINES[name].build(), FORA(2), backend="aot_eager", quiet=True)


@pytest.mark.parametrize(("name", "guidance"), KINDS)
def test_runs_cut_short_leave_nothing(name: str, guidance: bool) -> None:
    """After an interrupt, and after an error in a callback, a run draws the same image as before."""
    case, pipe = PIPELINES[name], enabled(name)
    first = case.call(pipe, STEPS, guidance=guidance)
    case.call(pipe, STEPS, seed=1, guidance=guidance, callback_on_step_end=interrupt)
    assert torch.equal(case.call(pipe, STEPS, guidance=guidance), first)
    with pytest.raises(Stopped):
        case.call(pipe, STEPS, seed=1, guidance=guidance, callback_on_step_end=fail)
    assert torch.equal(case.call(pipe, STEPS, guidance=guidance), first)
    ran = 3 * STEPS + 2 * 2
    assert decisions(pipe.transformer).total() == ran * case.calls_a_step(guidance)


@pytest.mark.parametrize(("name", "guidance"), KINDS)
def test_pictures_do_not_mix(name: str, guidance: bool) -> None:
    """Prompts, noise, numbers of steps and guidance differ: two pipelines give the same images in opposite orders."""
    case, pipe, other = PIPELINES[name], enabled(name), enabled(name)
    pictures = [(STEPS, 0, guidance), (STEPS, 1, guidance), (STEPS + 1, 0, guidance), (STEPS, 0, not guidance)]
    there = [case.call(pipe, steps, seed=seed, guidance=guided) for steps, seed, guided in pictures]
    back = [case.call(other, steps, seed=seed, guidance=guided) for steps, seed, guided in reversed(pictures)]
    assert all(torch.equal(a, b) for a, b in zip(there, reversed(back), strict=True))


def test_copy_draws_the_same() -> None:
    """A shallow copy shares the denoiser; the two alternate, and each draws the same images as alone."""
    case, pipe = PIPELINES["sd3"], enabled("sd3")
    first, second = (case.call(pipe, STEPS, seed=seed) for seed in (0, 1))
    twin = copy.copy(pipe)
    assert twin.transformer is pipe.transformer
    assert torch.equal(case.call(twin, STEPS), first)
    assert torch.equal(case.call(pipe, STEPS, seed=1), second)
    assert torch.equal(case.call(twin, STEPS), first)


def test_made_from_an_enabled_pipeline() -> None:
    """`from_pipe` takes over the rewritten denoiser; both pipelines are exact at reuse 0."""
    from diffusers import StableDiffusion3Pipeline

    case, pipe = PIPELINES["sd3"], PIPELINES["sd3"].build()
    plain = [case.call(pipe, STEPS, seed=seed) for seed in (0, 1)]
    dit_rewrite.enable(pipe, NEVER_OLD_ENOUGH, backend="aot_eager")
    made = StableDiffusion3Pipeline.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    assert made.transformer is pipe.transformer
    for seed in (0, 1):
        assert torch.equal(case.call(made, STEPS, seed=seed), plain[seed])
        assert torch.equal(case.call(pipe, STEPS, seed=seed), plain[seed])


def test_policy_exchanged() -> None:
    """A second `enable` applies the new policy: nothing reuses where FORA(2) reused."""
    case, pipe = PIPELINES["sd3"], PIPELINES["sd3"].build()
    plain = case.call(pipe, STEPS)
    dit_rewrite.enable(pipe, FORA(2), backend="aot_eager", quiet=True)
    assert not torch.equal(case.call(pipe, STEPS), plain)
    dit_rewrite.enable(pipe, NEVER_OLD_ENOUGH, backend="aot_eager")
    assert torch.equal(case.call(pipe, STEPS), plain)


@pytest.mark.parametrize("name", ["sd3", "wan22"])
def test_restored(name: str) -> None:
    """`restore` gives back the original classes and the plain pipeline's image."""
    case = PIPELINES[name]
    pipe = case.build()
    denoisers = [getattr(pipe, denoiser) for denoiser in case.denoisers]
    classes = [type(pipe), *map(type, denoisers)]
    plain = case.call(pipe, STEPS)
    dit_rewrite.enable(pipe, FORA(2), backend="aot_eager", quiet=True)
    assert not torch.equal(case.call(pipe, STEPS), plain)
    dit_rewrite.restore(pipe)
    after = [getattr(pipe, denoiser) for denoiser in case.denoisers]
    assert all(a is b for a, b in zip(after, denoisers, strict=True))
    assert [type(pipe), *map(type, after)] == classes
    assert torch.equal(case.call(pipe, STEPS), plain)


def test_a_preview_that_a_callback_draws() -> None:
    """A copy with its own scheduler draws within the run of the pipeline: neither image has values of the other."""
    case, pipe = PIPELINES["flux"], enabled("flux")
    first, second = (case.call(pipe, STEPS, seed=seed, guidance=True) for seed in (0, 1))
    other, drawn = copy.copy(pipe), []
    other.scheduler = copy.deepcopy(pipe.scheduler)

    def preview(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == 0:
            drawn.append(case.call(other, STEPS, seed=1, guidance=True))
        return tensors

    assert torch.equal(case.call(pipe, STEPS, guidance=True, callback_on_step_end=preview), first)
    assert torch.equal(drawn[0], second)
