"""Pipelines with two experts: one policy for both, each of which has the values of its own steps alone."""

from __future__ import annotations

import argparse
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_rewrite
from dit_rewrite import Evaluation, autopolicy
from dit_rewrite.cli import search as command
from dit_rewrite.cli.factory import Loaded
from dit_rewrite.errors import BadOption, BadParameter
from dit_rewrite.policies import StepMask
from dit_rewrite.proof.image_metrics import relative_l2
from dit_rewrite.search.controls import Controls
from dit_rewrite.search.denoisers import identity, parts_of
from dit_rewrite.search.measurements import Candidate, Measurements
from dit_rewrite.search.pipeline_sampler import of_pipeline
from dit_rewrite.search.placement import anchors_of, fit_weights, gap_costs, place, predict
from dit_rewrite.search.refine import neighbours
from tests.helpers import tiny
from tests.search.test_autopolicy import SETTINGS, scheduler_of
from tests.search.test_placement import drifting, gram_of, influence_of

STEPS, SECOND = 10, 5  # the step at which the second expert begins
CALL = {"num_inference_steps": STEPS}


class Experts:
    """A pipeline with one denoiser for high noise and another for low noise, as in Wan 2.2."""

    def __init__(self, layers: int = 2, second: int = SECOND) -> None:
        self.second = second
        self.transformer, self.transformer_2 = tiny.build(), tiny.build(layers)
        with torch.no_grad():
            for parameter in self.transformer_2.parameters():
                parameter.mul_(0.9)
        self.scheduler = scheduler_of(STEPS)

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer, "transformer_2": self.transformer_2, "scheduler": self.scheduler}

    def set_progress_bar_config(self, disable: bool) -> None:
        pass

    @torch.no_grad()
    def __call__(
        self, num_inference_steps: int, generator: torch.Generator, output_type: str = "np", return_dict: bool = True
    ) -> dict[str, Tensor]:
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(2, 8, tiny.CHANNELS, generator=generator)
        for i, timestep in enumerate(self.scheduler.timesteps):
            expert = self.transformer if i * STEPS < self.second * num_inference_steps else self.transformer_2
            output = expert(latents, timestep.expand(2).float(), tiny.condition())
            latents = self.scheduler.step(output, timestep, latents, return_dict=False)[0]
        return {"images": latents}


def image(pipe: Any, seed: int) -> Tensor:
    return pipe(STEPS, torch.Generator().manual_seed(seed))["images"]


@pytest.fixture(scope="module")
def measured() -> Measurements:
    model, sample, _ = of_pipeline(Experts(), CALL)
    return Measurements(model, sample, ("output",), (0,), "aot_eager")


def test_both_experts_have_the_policy_of_a_trial() -> None:
    """The second one computes at its first step, whatever the mask says. The error is that of the enabled pipeline."""
    policy, pipe = StepMask("1010101010"), Experts()
    expected = relative_l2(
        image(dit_rewrite.enable(Experts(), policy, backend="aot_eager", quiet=True), 3), image(pipe, 3)
    )
    (found,) = Evaluation(pipe, CALL, seeds=(3,), backend="aot_eager")(policy)
    assert found == {"error": pytest.approx(expected, rel=1e-5), "flops": pytest.approx(0.6, abs=1e-3)}
    assert expected > 0


def test_values_are_those_of_each_expert(measured: Measurements) -> None:
    gram = measured.places["output"].gram
    assert (measured.steps, measured.begins, measured.calls) == (STEPS, (0, SECOND), STEPS)
    assert not gram[:SECOND, SECOND:].any() and not gram[SECOND:, :SECOND].any()
    assert (gram[:SECOND, :SECOND] != 0).all() and (gram[SECOND:, SECOND:] != 0).all()
    table = measured.table(Candidate("output", (0, 2, 5, 7), "fitted"))
    assert [len(row) for row in table.rows] == [0, 1, 0, 2, 2, 0, 1, 0, 2, 2]


def test_the_first_step_of_an_expert_is_computed_and_stays(measured: Measurements) -> None:
    for count in (1, 2, 5):
        for start in measured.starts("output", count):
            assert {0, SECOND} <= set(start.computed)
    moved = neighbours(measured, Candidate("output", (0, 3, SECOND, 8), "fitted"))
    assert moved and all({0, SECOND} < set(each.computed) for each in moved)


def test_a_policy_for_both_experts(measured: Measurements) -> None:
    """It has the certified error when the pipeline runs with it, and reaches the speed-up."""
    pipe = Experts()
    found = autopolicy(pipe, CALL, speedup=2, controls={}, measurements=measured, **SETTINGS)
    assert {0, SECOND} < set(found.computed) and len(found.computed) == STEPS // 2
    assert found.cost == pytest.approx(0.5, abs=0.01)
    found.check(pipe.transformer_2, STEPS, pipe.scheduler)
    plain = [image(pipe, seed) for seed in found.held_out_seeds]
    dit_rewrite.enable(pipe, found.policy, backend="aot_eager", quiet=True)
    errors = [relative_l2(image(pipe, seed), own) for seed, own in zip(found.held_out_seeds, plain, strict=True)]
    assert errors == pytest.approx(found.errors.each, rel=1e-3)
    sizes = [part.stats().peak_bytes for part in (pipe.transformer, pipe.transformer_2)]
    assert found.peak_bytes == sum(sizes) and all(sizes)


def test_controls_count_the_calls_of_both(measured: Measurements) -> None:
    model, _, solvers = of_pipeline(Experts(), CALL)
    runner = Controls(model, {"DDIM": solvers["DDIMScheduler"]}, STEPS)
    control = runner.best(0.5, {0: measured.reference(0)}, {5: measured.reference(5), 6: measured.reference(6)})
    assert control is not None and (control.steps, control.cost) == (5, 0.5)


@pytest.mark.parametrize("seed", range(3))
def test_placements_with_a_beginning_are_exhaustive_search(seed: int) -> None:
    gram, influence = gram_of(drifting(seed)), influence_of(seed)
    steps, begins = len(gram), (0, 4)

    def objective(computed: tuple[int, ...]) -> float:
        rows = []
        for step in range(steps):
            own = [each for each in computed if each >= max(b for b in begins if b <= step)]
            rows.append(() if step in computed else fit_weights(gram, step, anchors_of(step, own, 2)))
        return predict(gram, influence, rows, computed)

    found = place(gap_costs(gram, influence, 1.0, begins), 5)
    for count in (2, 3, 5):
        free = [step for step in range(1, steps) if step != 4]
        best = min(objective(tuple(sorted({*begins, *more}))) for more in combinations(free, count - 2))
        assert set(begins) <= set(found[count - 1].computed) and len(found[count - 1].computed) == count
        assert found[count - 1].predicted == pytest.approx(best, abs=1e-6)


def test_experts_of_other_structure_have_no_common_policy() -> None:
    """`Evaluation` runs any policy on them."""
    pipe = Experts(layers=3)
    with pytest.raises(BadParameter, match="model='transformer, transformer_2'.* one structure"):
        autopolicy(pipe, CALL, speedup=2)
    assert list(parts_of(Evaluation(pipe, CALL).model)) == ["transformer", "transformer_2"]
    assert identity("autopolicy", nn.ModuleDict(parts_of(of_pipeline(Experts(), CALL)[0]))) == identity(
        "autopolicy", pipe.transformer
    )


def test_an_expert_that_never_runs_has_no_share() -> None:
    model, sample, _ = of_pipeline(Experts(second=STEPS), CALL)
    found = Measurements(model, sample, ("output",), (0,), "aot_eager")
    assert found.begins == (0,) and found.steps == STEPS


def test_a_plan_is_searched_for_one_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample, _ = of_pipeline(Experts(), CALL)
    monkeypatch.setattr(command, "load", lambda arguments: Loaded(model, sample, {}))
    given = argparse.Namespace(delta="D4", seeds=1, window="0.125", grid=None, model="folder")
    with pytest.raises(BadOption, match="a pipeline with one denoiser"):
        command.run(given)


def test_wan() -> None:
    """The second expert of Wan 2.2 begins at step 2 of 4, so each expert reuses its output once."""
    from tests.end_to_end.pipelines.video import build_wan22, experts, wan_arguments, wan_vae

    pipe = build_wan22()
    pipe.register_modules(vae=wan_vae())
    assert experts(4) == (range(2), range(2, 4))
    call = {**wan_arguments(0, False), "num_inference_steps": 4}
    (found,) = Evaluation(pipe, call, seeds=(0,), backend="aot_eager")(StepMask("1010"))
    assert found["error"] > 0 and 0.45 < found["flops"] < 0.51
