"""The bundled toys as the fidelity benchmark samples them, and the solvers that run them with fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from benchmarks.record import digest
from dit_rewrite.demo.shapes.captions import sample_captioned
from dit_rewrite.demo.shapes.data import NUM_CLASSES
from dit_rewrite.demo.shapes.flow_model import load_flow_model
from dit_rewrite.demo.shapes.flow_sampling import FLOW_GUIDANCE, sample_relations
from dit_rewrite.demo.shapes.model import SCHEDULE, WEIGHTS, build_scheduler, load_denoiser
from dit_rewrite.demo.shapes.relations import sample_related
from dit_rewrite.demo.shapes.sampling import GUIDANCE, sample_images
from dit_rewrite.demo.shapes.text_model import load_text_model
from dit_rewrite.demo.shapes.text_sampling import TEXT_GUIDANCE, sample_captions

CAPTION_SEED = NOISE_SEED = 7
CALIBRATION_SEED = 8  # noise seed for the calibration of policies


class EvenEuler(FlowMatchEulerDiscreteScheduler):
    """Euler's method at the noise levels 1 - i/n. In diffusers' own, the last step from 0.001 to 0 is wasted."""

    def set_timesteps(self, num_inference_steps: int, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        self.sigma_min = 1 / num_inference_steps
        super().set_timesteps(num_inference_steps, *args, **kwargs)


class EvenHeun(FlowMatchHeunDiscreteScheduler):
    """Heun's method at the noise levels 1 - i/n: two calls per step except the last, which is an Euler step."""

    def set_timesteps(self, num_inference_steps: int, *args: Any, **kwargs: Any) -> None:
        self.sigma_min = 1 / num_inference_steps
        super().set_timesteps(num_inference_steps, *args, **kwargs)


Sample = Callable[[nn.Module, int, int, int, Any], Tensor]


@dataclass(frozen=True)
class Toy:
    """A denoiser and its sampler.

    ``sample(denoiser, count, steps, seed, scheduler)`` returns `count` images; equal `count` and `seed` give equal
    noise. The first of `solvers` samples the uncached model and the policies. The reference uses the solver `reference`
    with `reference_steps`, which is close to the exact solution that all solvers approximate.
    """

    name: str
    weights: Path
    guidance: float
    denoiser: nn.Module
    sample: Sample
    solvers: Mapping[str, Callable[[], Any]]
    reference: str
    reference_steps: int

    def key(self) -> dict[str, Any]:
        """Everything that determines its images, apart from the solver and the steps."""
        known = {
            "weights": digest(self.weights),
            "guidance": self.guidance,
            "noise": NOISE_SEED,
            "captions": CAPTION_SEED,
        }
        return {"toy": self.name, **known, "reference": [self.reference, self.reference_steps]}

    @property
    def sampler(self) -> str:
        """The solver of the uncached model and the policies."""
        return next(iter(self.solvers))

    @torch.no_grad()
    def run(
        self, denoiser: nn.Module, count: int, steps: int, solver: str | None = None, seed: int = NOISE_SEED
    ) -> Tensor:
        """Sample images with the denoiser or a compiled version of it."""
        return self.sample(denoiser, count, steps, seed, self.solvers[solver or self.sampler]())


def calls(solver: str, steps: int) -> int:
    """Return how often a solver calls the denoiser."""
    return 2 * steps - 1 if solver == "Heun" else steps


def _plus_plus(order: int) -> Callable[[], Any]:
    return lambda: DPMSolverMultistepScheduler(
        **SCHEDULE, timestep_spacing="trailing", solver_order=order, algorithm_type="dpmsolver++"
    )


def _ddim() -> DDIMScheduler:
    """Return DDIM without clipping of predictions, which the other solvers do not have."""
    return DDIMScheduler(**SCHEDULE, timestep_spacing="trailing", clip_sample=False)


CLIPPED, UNCLIPPED = "DDIM, clipped", "DDIM"
DIFFUSION_SOLVERS: Mapping[str, Callable[[], Any]] = {
    CLIPPED: build_scheduler,
    UNCLIPPED: _ddim,
    "DPM-Solver++ 2M": _plus_plus(2),
    "DPM-Solver++ 3M": _plus_plus(3),
    "UniPC": lambda: UniPCMultistepScheduler(**SCHEDULE, timestep_spacing="trailing"),
}
DIFFUSION_REFERENCE = 500  # DDIM steps; must divide 1000, or diffusers steps to other times than it calls at
FLOW_REFERENCE = 400
_FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0}
FLOW_SOLVERS: Mapping[str, Callable[[], Any]] = {
    "Euler": EvenEuler,
    "Heun": EvenHeun,
    "DPM-Solver++ 2M": lambda: DPMSolverMultistepScheduler(**_FLOW, solver_order=2, algorithm_type="dpmsolver++"),
    "UniPC": lambda: UniPCMultistepScheduler(**_FLOW),
}


def class_toy(sampler: str) -> Toy:
    """Class-conditional shapes: DiT."""

    def sample(denoiser: nn.Module, count: int, steps: int, seed: int, scheduler: Any) -> Tensor:
        labels = torch.arange(count) % NUM_CLASSES
        return sample_images(denoiser, labels, steps=steps, guidance=GUIDANCE, seed=seed, scheduler=scheduler)

    return _diffusion("class", sampler, WEIGHTS / "denoiser.safetensors", GUIDANCE, load_denoiser(), sample)


def text_toy(sampler: str) -> Toy:
    """Captioned shapes: PixArt."""
    model = load_text_model()

    def sample(denoiser: nn.Module, count: int, steps: int, seed: int, scheduler: Any) -> Tensor:
        _, captions, _ = sample_captioned(count, torch.Generator().manual_seed(CAPTION_SEED))
        return sample_captions(denoiser, model.encoder, captions, steps=steps, seed=seed, scheduler=scheduler)

    return _diffusion("text", sampler, WEIGHTS / "text_denoiser.safetensors", TEXT_GUIDANCE, model.denoiser, sample)


def _diffusion(name: str, sampler: str, weights: Path, guidance: float, denoiser: nn.Module, sample: Sample) -> Toy:
    """Return a diffusion toy. If its sampler does not clip, neither may the controls, or they solve another problem."""
    solvers = {sampler: DIFFUSION_SOLVERS[sampler]}
    solvers |= {name: make for name, make in DIFFUSION_SOLVERS.items() if name != CLIPPED}
    name = name if sampler == CLIPPED else f"{name}_unclipped"
    return Toy(name, weights, guidance, denoiser, sample, solvers, UNCLIPPED, DIFFUSION_REFERENCE)


def flow_toy() -> Toy:
    """Two shapes in relation, by flow matching: SD3."""
    model = load_flow_model()

    def sample(denoiser: nn.Module, count: int, steps: int, seed: int, scheduler: Any) -> Tensor:
        _, captions, _ = sample_related(count, torch.Generator().manual_seed(CAPTION_SEED))
        return sample_relations(denoiser, model.encoder, captions, steps=steps, seed=seed, scheduler=scheduler)

    weights = WEIGHTS / "flow_denoiser.safetensors"
    return Toy("flow", weights, FLOW_GUIDANCE, model.denoiser, sample, FLOW_SOLVERS, "Euler", FLOW_REFERENCE)


TOYS: Mapping[str, Callable[[], Toy]] = {
    "class": partial(class_toy, CLIPPED),
    "text": partial(text_toy, CLIPPED),
    "flow": flow_toy,
    "class_unclipped": partial(class_toy, UNCLIPPED),
    "text_unclipped": partial(text_toy, UNCLIPPED),
}
