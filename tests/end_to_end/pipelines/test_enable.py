"""`enable` on every pipeline: exact without reuse, and half of the work reused when every second step reuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Any

import pytest
import torch
from sympy import Eq
from sympy.logic.boolalg import Boolean

import dit_rewrite
from dit_rewrite import Policy, Rule, guards
from dit_rewrite.policies import FORA
from dit_rewrite.runtime.stats import Stats
from tests.end_to_end.pipelines.case import PipelineCase
from tests.end_to_end.pipelines.registry import ENABLED, PIPELINES

STEPS = 4
NEVER_OLD_ENOUGH = Policy((Rule(when=guards.age > 10_000),), name="never old enough")
"""Guards and stores every site, and reuses none."""
SECOND_STEPS = "second steps"

pytestmark = pytest.mark.filterwarnings("ignore:second steps")


def every_second_step(case: PipelineCase) -> Policy:
    """A policy that reuses every second step of a run of `STEPS`, and nothing in a shorter one.

    One compilation serves both runs: the guard reads the number of steps.
    """
    steps = max(indices.stop for indices in case.steps_run(STEPS))
    return Policy((Rule(when=Eq(guards.step % 2, 1) & (guards.num_steps >= steps)),), name=SECOND_STEPS)


def expected(case: PipelineCase, guidance: bool, steps: int) -> dict[str, Counter[tuple[int, str]]]:
    """If every second step reuses, how often each denoiser computes or reuses at each step.

    Even steps compute; odd ones reuse, except for a denoiser's first step, which has nothing to reuse, and the second
    one where inputs move.
    """
    calls, found = case.calls_a_step(guidance), {}
    for name, indices in zip(case.denoisers, case.steps_run(steps), strict=True):
        computed = {indices.start, indices.start + case.moving}
        done = {i: "reuse" if i % 2 and i not in computed else "compute" for i in indices}
        found[name] = Counter({pair: calls for pair in done.items()})
    return found


def decisions(denoiser: Any) -> Counter[tuple[int, str]]:
    """The number of streams in which a denoiser computed or reused at each step; a stream does the same at all
    sites."""
    return decided(denoiser.stats())


def decided(stats: Stats) -> Counter[tuple[int, str]]:
    done: dict[tuple[int, int, Hashable], set[str]] = {}
    for row in stats.decisions:
        done.setdefault((row.trajectory, row.step, row.stream), set()).update(row.strategies.values())
    return Counter((step, " and ".join(sorted(found))) for (_, step, _), found in done.items())


def run_both(case: PipelineCase, guidance: bool, **extra: Any) -> dict[str, Counter[tuple[int, str]]]:
    """Check a run in which every site is guarded and stored, and none reused: its image equals the plain pipeline's,
    bit for bit. Return the decisions of a run in which every second step reuses."""
    pipe = case.build()
    plain = case.call(pipe, STEPS - 1, guidance=guidance, **extra)
    dit_rewrite.enable(pipe, every_second_step(case), backend="aot_eager")
    with pytest.warns(UserWarning, match=f"{SECOND_STEPS}: none of .* was reused"):
        assert torch.equal(case.call(pipe, STEPS - 1, guidance=guidance, **extra), plain)
    before = {name: getattr(pipe, name).stats() for name in case.denoisers}
    assert all(stats.computed > 0 and stats.reused == 0 for stats in before.values())
    case.call(pipe, STEPS, guidance=guidance, **extra)
    graphs = [graph for name in case.denoisers for graph in getattr(pipe, name).explain().rewritten]
    assert all(len(graph.variants) == 2 for graph in graphs if graph.guarded.sites), "both runs compute alike"
    return {name: decided(getattr(pipe, name).stats().since(stats)) for name, stats in before.items()}


@pytest.mark.parametrize(("name", "guidance"), ENABLED)
def test_exact_without_reuse_and_every_second_step_reuses(name: str, guidance: bool) -> None:
    """Each call of an odd step reuses every site, and each call of an even step computes every site."""
    case = PIPELINES[name]
    assert run_both(case, guidance) == expected(case, guidance, STEPS)


@pytest.mark.parametrize(
    ("name", "late"),
    [("flux_img2img", guards.sigma < 0.5), ("cogvideox_video", guards.snr > 100), ("wan22", guards.sigma < 0.6)],
)
def test_noise_is_that_of_the_schedule(name: str, late: Boolean) -> None:
    """Where a denoiser starts late in the schedule, guards read the noise of the timestep: it is low at the last step
    only.

    The two steps that run of four have sigma 0.61 and 0.35 (FLUX), 0.75 and 0.50 (Wan), SNR 0.7 and 392 (CogVideoX).
    """
    case = PIPELINES[name]
    pipe = dit_rewrite.enable(case.build(), Policy((Rule(when=late),)), backend="aot_eager", quiet=True)
    case.call(pipe, STEPS)
    first, second = case.steps_run(STEPS)[-1]
    assert decisions(getattr(pipe, case.denoisers[-1])) == Counter({(first, "compute"): 1, (second, "reuse"): 1})


def test_expert_that_enters_at_an_odd_step() -> None:
    """Wan 2.2's second expert runs steps 3 and 4 of five: the first has no value to reuse; the second is even."""
    case = PIPELINES["wan22"]
    pipe = dit_rewrite.enable(case.build(), FORA(2), backend="aot_eager", quiet=True)
    case.call(pipe, 5)
    assert decisions(pipe.transformer_2) == Counter({(3, "compute"): 1, (4, "compute"): 1})


def test_second_call_stops_midway() -> None:
    """Lumina 2 without guidance for the second half of its steps: the one remaining call keeps its stream."""
    case = PIPELINES["lumina2"]
    pipe = case.build()
    dit_rewrite.enable(pipe, FORA(2), backend="aot_eager", quiet=True)
    case.call(pipe, STEPS, guidance=True, cfg_trunc_ratio=0.5)
    done = Counter({(0, "compute"): 2, (1, "reuse"): 2, (2, "compute"): 1, (3, "reuse"): 1})
    assert decisions(pipe.transformer) == done


def test_batch_halves_midway() -> None:
    """Z-Image without guidance from its fifth step on: a batch of two images instead of four.

    Its latents are a list, and those behind the first may be conditions until they moved twice.
    """
    case = PIPELINES["z_image"]
    pipe = dit_rewrite.enable(case.build(), FORA(2), backend="aot_eager", quiet=True)
    case.call(pipe, 8, guidance=True, cfg_truncation=0.3)
    done = ["compute", "compute", "compute", "reuse", "compute", "compute", "compute", "reuse"]
    assert decisions(pipe.transformer) == Counter({pair: 1 for pair in enumerate(done)})


def test_call_that_leaves_layers_out() -> None:
    """Stable Diffusion 3 with skip-layer guidance: steps 1 to 3 make a second call, with another graph and batch.

    This call has a value to reuse at its second odd step only.
    """
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}
    done = {(0, "compute"): 1, (1, "reuse"): 1, (1, "compute"): 1, (2, "compute"): 2, (3, "reuse"): 2}
    assert run_both(PIPELINES["sd3"], True, **skip) == {"transformer": Counter(done)}


def test_residual_added_twice_is_no_stream() -> None:
    """A ControlNet of two layers adds its first residual after two of three blocks: the sites stay the same."""
    found = []
    for name in ("sd3", "sd3_controlnet"):
        case = PIPELINES[name]
        pipe = dit_rewrite.enable(case.build(), FORA(2), backend="aot_eager", quiet=True)
        case.call(pipe, STEPS)
        sites = [place.site for place in pipe.transformer.explain().sites]
        found.append([(site.kind, site.layer, len(site.values)) for site in sites])
    assert found[0] == found[1]
