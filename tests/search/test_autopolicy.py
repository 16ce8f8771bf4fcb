"""The search for a policy: its bounds, the tightening on held-out seeds, the control, and one run on a real model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from dit_rewrite import autopolicy, compile
from dit_rewrite.errors import (
    BadCertificate,
    BadParameter,
    NotAModule,
    NothingFits,
    NotImages,
    PolicyForOtherModel,
    PolicyForOtherScheduler,
    PolicyForOtherSteps,
)
from dit_rewrite.policies import FORA, Never, parse
from dit_rewrite.proof.image_metrics import relative_l2
from dit_rewrite.search.certificate import AutoPolicy, Errors
from dit_rewrite.search.controls import Controls
from dit_rewrite.search.evaluation import Evaluation
from dit_rewrite.search.measurements import (
    Candidate,
    Measurements,
    geometric_mean,
    image_errors,
    rank_correlation,
)
from dit_rewrite.search.pipeline_sampler import run
from dit_rewrite.search.refine import first_guess
from tests.helpers import tiny

STEPS, BOUNDS = 10, (0.6, 0.25)
SETTINGS: dict[str, Any] = {
    "places": ("output",),
    "calibration_seeds": (0,),
    "held_out_seeds": (5, 6, 7),
    "trials": 3,
    "measure": "flops",
    "backend": "aot_eager",
}


def scheduler_of(steps: int) -> DDIMScheduler:
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, prediction_type="v_prediction")
    scheduler.set_timesteps(steps)
    return scheduler


@torch.no_grad()
def sample(denoiser: Any, seed: int, steps: int = STEPS) -> Tensor:
    """DDIM with the tiny denoiser."""
    scheduler, condition = scheduler_of(steps), tiny.condition()
    latents = torch.randn(2, 8, tiny.CHANNELS, generator=torch.Generator().manual_seed(seed))

    def loop(latents: Tensor) -> Tensor:
        for timestep in scheduler.timesteps:
            output = denoiser(latents, timestep.expand(2).float(), condition)
            latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        return latents

    if not hasattr(denoiser, "trajectory"):
        return loop(latents)
    with denoiser.trajectory(steps, scheduler):
        return loop(latents)


def fewer(denoiser: Any, steps: int, seed: int) -> Tensor:
    return sample(denoiser, seed, steps)


def perfect(denoiser: Any, steps: int, seed: int) -> Tensor:
    """A solver that has the images of the full run, for fewer calls."""
    sample(denoiser, seed, steps)
    return sample(tiny.build(), seed)


@pytest.fixture(scope="module")
def measured() -> Measurements:
    return Measurements(tiny.build(), sample, ("output",), (0,), "aot_eager")


@pytest.fixture(scope="module")
def found(measured: Measurements) -> AutoPolicy:
    return autopolicy(tiny.build(), sample, speedup=2, controls={"DDIM": fewer}, measurements=measured, **SETTINGS)


def test_a_speedup_is_kept_and_verified_by_running(found: AutoPolicy) -> None:
    """Half of the steps compute, and the policy run as such has the certified error, the control its own."""
    assert len(found.computed) == STEPS // 2 and found.computed[0] == 0
    assert found.speedup == pytest.approx(2, rel=0.01)
    model = compile(tiny.build(), replace(parse("never"), rules=()) if found.winner == "control" else found.policy,
                    backend="aot_eager")  # fmt: skip
    plain = tiny.build()
    if found.winner == "policy":
        errors = [relative_l2(sample(model, seed), sample(plain, seed)) for seed in (5, 6, 7)]
        assert errors == pytest.approx(found.errors.each, rel=1e-3)
    assert found.control is not None and (found.control.solver, found.control.steps) == ("DDIM", 5)
    controlled = [relative_l2(sample(plain, seed, 5), sample(plain, seed)) for seed in (5, 6, 7)]
    assert controlled == pytest.approx(found.control.errors.each, rel=1e-3)
    assert (found.winner == "control") == (found.control.errors.mean < found.errors.mean)
    assert f"the {found.winner} wins" in str(found) and "DDIM with 5 steps" in str(found)


def test_the_control_is_returned_where_it_wins(measured: Measurements) -> None:
    found = autopolicy(
        tiny.build(), sample, speedup=2, controls={"perfect": perfect}, measurements=measured, **SETTINGS
    )
    assert found.winner == "control" and found.policy == Never()
    assert found.control is not None and found.control.errors.mean == pytest.approx(0, abs=1e-6)
    alone = autopolicy(tiny.build(), sample, speedup=2, measurements=measured, **SETTINGS)
    assert alone.winner == "policy" and alone.control is None and alone.policy.rules
    assert "no control" in str(alone)


def test_a_bound_on_the_error_holds_on_held_out_seeds(measured: Measurements) -> None:
    loose, tight = (
        autopolicy(tiny.build(), sample, max_error=bound, measurements=measured, **SETTINGS) for bound in BOUNDS
    )
    assert (loose.errors.high <= BOUNDS[0]) and (tight.errors.high <= BOUNDS[1])
    assert len(loose.computed) < len(tight.computed) < STEPS


@pytest.mark.parametrize(("values", "depth"), [(4, 4), (2, 2)])
def test_bytes_are_bounded(measured: Measurements, values: int, depth: int) -> None:
    """Forecasts read as many values as fit. The size is predicted, and measured in a run; the certificate has both."""
    size = 2 * 8 * tiny.CHANNELS * 4  # bytes of an output
    kept = autopolicy(tiny.build(), sample, speedup=2, max_bytes=values * size, measurements=measured, **SETTINGS)
    table = measured.table(Candidate("output", kept.computed, kept.style, depth))
    assert kept.cache_bytes == kept.peak_bytes == size * max(map(len, table.rows)) <= values * size
    assert f"{kept.cache_bytes:,} bytes in caches predicted, {kept.peak_bytes:,} measured" in str(kept)
    model = compile(tiny.build(), kept.policy, backend="aot_eager")
    sample(model, 5)
    assert kept.winner == "control" or model.stats().peak_bytes == kept.peak_bytes


def test_too_few_bytes_are_refused(measured: Measurements) -> None:
    with pytest.raises(NothingFits, match="bytes"):
        autopolicy(tiny.build(), sample, max_bytes=10, measurements=measured, **SETTINGS)


def test_time_is_measured_in_alternation(measured: Measurements) -> None:
    """The tiny model gains nothing, so a bound that no policy keeps is refused, and a weak one is kept."""
    settings = SETTINGS | {"measure": "time", "trials": 1}
    found = autopolicy(tiny.build(), sample, max_seconds=60.0, measurements=measured, **settings)
    assert found.seconds is not None and 0 < found.seconds < 60
    with pytest.raises(NothingFits, match="max_seconds"):
        autopolicy(tiny.build(), sample, max_seconds=1e-9, measurements=measured, **settings)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_certificate_round_trip(found: AutoPolicy, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    found.save(path)
    assert AutoPolicy.load(path) == found
    assert parse(str(path)) == found.policy
    content = json.loads(path.read_text())
    del content["certificate"]["errors"]
    path.write_text(json.dumps(content))
    with pytest.raises(BadCertificate, match="errors"):
        AutoPolicy.load(path)
    path.write_text("{")
    with pytest.raises(BadCertificate):
        AutoPolicy.load(path)


def test_other_models_steps_and_schedules_are_refused(measured: Measurements) -> None:
    found = autopolicy(tiny.build(), sample, speedup=2, measurements=measured, **SETTINGS)
    found.check(tiny.build(), STEPS, scheduler_of(STEPS))
    with pytest.raises(PolicyForOtherModel):
        found.check(tiny.build(3), STEPS)
    with pytest.raises(PolicyForOtherSteps):
        found.check(tiny.build(), STEPS + 1)
    other = DDIMScheduler(timestep_spacing="leading")
    other.set_timesteps(STEPS)
    with pytest.raises(PolicyForOtherScheduler):
        found.check(tiny.build(), STEPS, other)
    with pytest.raises(PolicyForOtherModel):
        compile(tiny.build(3), found.policy, backend="aot_eager")
    model = compile(tiny.build(), found.policy, backend="aot_eager")
    with pytest.raises(PolicyForOtherScheduler), model.trajectory(STEPS, other):
        pass
    with model.trajectory(STEPS, scheduler_of(STEPS)):
        pass


def test_the_search_is_no_worse_than_policies_set_by_hand(measured: Measurements) -> None:
    """Even placements, with TaylorSeer's weights and fitted ones, are among the starting candidates."""
    starts = measured.starts("output", 5, depth=3)
    closed, left = (0, 2, 4, 7, 9), (0, 2, 4, 6, 8)
    wanted = [(closed, "fitted"), (closed, "taylorseer"), (left, "taylorseer")]
    assert {Candidate("output", computed, style, 3) for computed, style in wanted} <= set(starts)
    found = first_guess(measured, {"output": 3}, 5)
    assert found.typical == min(measured.attempt(start).typical for start in starts)


def test_a_few_sensitive_images_do_not_decide() -> None:
    """One image of four is off by chance: by the typical error the better candidate is found, by the mean the other."""
    better, worse = [0.01, 0.01, 0.01, 0.5], [0.02, 0.02, 0.02, 0.3]
    assert geometric_mean(better) < geometric_mean(worse) and sum(better) > sum(worse)
    assert geometric_mean([0.0, 1.0]) == pytest.approx(1e-6)
    errors = image_errors(torch.tensor([[1.0, 1.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    assert errors == pytest.approx([1.0, 0.5])


def test_interval_and_ranks() -> None:
    errors = Errors.of([1.1, 1.2, 1.3])
    assert errors.mean == pytest.approx(1.2)
    assert [errors.high - 1.2, 1.2 - errors.low] == pytest.approx([4.30 * 0.1 / 3**0.5] * 2, rel=0.01)
    assert Errors.of([0.1] * 30).high == pytest.approx(0.1)
    assert rank_correlation([1, 2, 3], [1, 8, 27]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"speedup": 1.0},
        {"speedup": 2, "max_error": 0.1},
        {"max_error": 0.0},
        {"max_error": float("nan")},
        {"max_seconds": 1.0},
        {"speedup": 2, "held_out_seeds": (0, 5)},
        {"speedup": 2, "places": ("blocks",)},
        {"speedup": 2, "measure": "steps"},
        {"speedup": 2, "trials": -1},
        {"speedup": 2, "trials": 2.5},
        {"speedup": 2, "held_out_seeds": 3},
        {"speedup": 2, "calibration_seeds": 3},
        {"speedup": 2, "controls": [fewer]},
    ],
)
def test_invalid_arguments_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(BadParameter):
        autopolicy(tiny.build(), sample, **SETTINGS | given)


def test_a_file_that_cannot_be_written_is_found_before_the_search(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(FileExistsError):
        autopolicy(tiny.build(), lambda *_: pytest.fail("it sampled"), speedup=2, path=tmp_path / "file" / "p.json")


def test_models_and_images_are_checked() -> None:
    with pytest.raises(NotAModule):
        autopolicy(sample, sample, speedup=2)
    with pytest.raises(NotImages):
        autopolicy(tiny.build(), lambda model, seed: [sample(model, seed)], speedup=2, **SETTINGS)  # type: ignore[arg-type, return-value]


def test_a_control_that_fails_is_reported_and_left_out(measured: Measurements) -> None:
    """The search is not lost, and the other controls run."""

    def broken(denoiser: Any, steps: int, seed: int) -> Tensor:
        raise AttributeError("no set_begin_index")

    said: list[str] = []
    target = {0: measured.reference(0)}
    runner = Controls(tiny.build(), {"broken": broken, "DDIM": fewer}, STEPS, said.append)
    found = runner.best(0.5, target, {5: measured.reference(5)})
    assert found is not None and (found.solver, found.steps) == ("DDIM", 5)
    assert said == ["the control broken cannot sample: AttributeError: no set_begin_index"]
    assert Controls(tiny.build(), {"broken": broken}, STEPS).best(0.5, target, target) is None


def test_a_pipeline_is_sampled_by_its_call() -> None:
    """In `Evaluation` as in `autopolicy`. A function samples with a denoiser, and not with the pipeline."""
    from tests.cli.test_generate import build_dit_pipeline

    pipeline, call = build_dit_pipeline(), {"class_labels": [3], "num_inference_steps": 4, "return_dict": False}
    (found,) = Evaluation(pipeline, call, seeds=(0,), backend="aot_eager")(FORA(2))
    assert found["error"] > 0 and 0.5 < found["flops"] < 0.7
    for function in (autopolicy, Evaluation):
        with pytest.raises(BadParameter, match=f"{function.__name__}: sample=.* such as pipe.transformer"):
            function(pipeline, sample, **({} if function is Evaluation else {"speedup": 2}))  # type: ignore[operator]
        with pytest.raises(BadParameter, match=f"{function.__name__}: model='TinyDiT'"):
            function(tiny.build(), call, **({} if function is Evaluation else {"speedup": 2}))  # type: ignore[operator]


def test_any_output_of_a_pipeline_is_compared() -> None:
    """Images, frames or sounds: the first value of the call's result."""
    from diffusers import DiTPipeline
    from diffusers.pipelines.pipeline_utils import AudioPipelineOutput

    from tests.cli.test_generate import build_dit_pipeline

    class Sounds(DiTPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> AudioPipelineOutput:
            return AudioPipelineOutput(audios=super().__call__(*args, **kwargs).images)

    plain = build_dit_pipeline()
    calls = {"class_labels": [3], "num_inference_steps": 2}
    heard, seen = (
        run(kind(**plain.components), {"transformer": plain.transformer}, 0, calls, DDIMScheduler)
        for kind in (Sounds, DiTPipeline)
    )
    assert torch.equal(heard, seen)


def test_measurements_of_another_model_are_refused(measured: Measurements) -> None:
    with pytest.raises(BadParameter, match="those of this model"):
        autopolicy(tiny.build(3), sample, speedup=2, measurements=measured, **SETTINGS)
    with pytest.raises(BadParameter, match="held_out_seeds"):
        autopolicy(tiny.build(), sample, speedup=2, measurements=measured, **SETTINGS | {"held_out_seeds": (0, 5)})


def test_stack_and_branches_are_places_too() -> None:
    settings = SETTINGS | {"places": ("stack", "branches"), "trials": 1}
    found = autopolicy(tiny.build(), sample, speedup=1.5, **settings)
    assert found.place in ("stack", "branches") and found.cost <= 1 / 1.5
    assert found.peak_bytes == found.cache_bytes > 0
    model = compile(tiny.build(), found.policy, backend="aot_eager")
    error = relative_l2(sample(model, 5), sample(tiny.build(), 5))
    assert error == pytest.approx(found.errors.each[0], rel=1e-3)
