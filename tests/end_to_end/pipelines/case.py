"""A pipeline under test: how to build it, the arguments of one image, and the calls that it makes.

Every pipeline is diffusers' own, with its own scheduler and random weights at toy size. Text arrives as embeddings, so
most pipelines need neither tokenizer nor text encoder; a VAE is there only where the pipeline reads one. Schedulers
that preserve variance use v-prediction: with untrained weights, predicted noise makes latents grow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from tests.helpers.drawn import prepare

TEXT = (1, 6, 24)  # one prompt of six tokens, 24 wide
PIXELS = 64  # eight latent rows and columns where the pipeline has no VAE and assumes a factor of 8
SIZE = {"height": PIXELS, "width": PIXELS}
STRENGTH = 0.5  # the share of the schedule that redraws a given image


def every_step(steps: int) -> tuple[range, ...]:
    """One denoiser that runs at every step."""
    return (range(steps),)


def second_half(steps: int) -> tuple[range, ...]:
    """The steps that run where an image is given: the last `STRENGTH` of the schedule's timesteps, counted from 0."""
    return (range(int(steps * STRENGTH)),)


def one_call(guidance: bool) -> int:
    """One call a step, with and without guidance: both halves are one batch."""
    return 1


def two_calls(guidance: bool) -> int:
    """One call a step, and a second one for the negative prompt."""
    return 1 + guidance


@dataclass(frozen=True)
class PipelineCase:
    """One pipeline, the arguments of one image, and the calls that its denoisers receive."""

    name: str
    build: Callable[[], Any]
    arguments: Callable[[int, bool], dict[str, Any]]
    """Arguments by seed and by whether there is guidance: everything but steps, generator and kind of output."""
    calls_a_step: Callable[[bool], int]
    denoisers: tuple[str, ...] = ("transformer",)
    guidance: tuple[bool, ...] = (False, True)
    """The kinds of guidance that the pipeline knows."""
    steps_run: Callable[[int], tuple[range, ...]] = every_step
    """Which of the steps asked for each denoiser runs: not all where the pipeline starts late or changes experts."""
    output_type: str = "latent"
    moving: bool = False
    """Whether tensors beside the latent are others at each step, such as residuals: this is learned at the second step,
    which computes."""

    def call(self, pipe: Any, steps: int, seed: int = 0, guidance: bool = False, **extra: Any) -> Tensor:
        """The final latents of one run; the seed determines noise and prompt."""
        arguments = {**self.arguments(seed, guidance), "output_type": self.output_type, "return_dict": False, **extra}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # some pipelines encode pictures with the global generator
            generator = Generator().manual_seed(seed)
            return pipe(num_inference_steps=steps, generator=generator, **arguments)[0]

    def calls(self, steps: int, guidance: bool) -> dict[str, int]:
        """The number of calls that each denoiser receives in one run."""
        ran = zip(self.denoisers, self.steps_run(steps), strict=True)
        return {name: len(indices) * self.calls_a_step(guidance) for name, indices in ran}


def quiet(pipe: Any) -> Any:
    """The pipeline without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts(transformer: nn.Module, scheduler: Any, vae: nn.Module | None = None, encoders: int = 1) -> dict[str, Any]:
    """The components of a pipeline; the tokenizers and text encoders that it names are None."""
    numbers = ["", *(f"_{number}" for number in range(2, encoders + 1))]
    text = {f"{part}{number}": None for part in ("tokenizer", "text_encoder") for number in numbers}
    return {"transformer": transformer, "scheduler": scheduler, "vae": vae, **text}


def frozen(module: nn.Module) -> Any:
    """The module with all weights drawn anew, so that no zero-initialised gate hides a wrong rewrite."""
    return prepare(module, torch.float32)


def draw(seed: int, *shape: int) -> Tensor:
    """A random tensor that depends on the seed."""
    return torch.randn(shape, generator=Generator().manual_seed(1000 + seed))


def prompts(seed: int, guidance: bool, **shapes: tuple[int, ...]) -> dict[str, Any]:
    """Embeddings by argument name, with negative ones under guidance."""
    positive = {name: draw(seed, *shape) for name, shape in shapes.items()}
    negative = {f"negative_{name}": draw(seed + 500, *shape) for name, shape in shapes.items()}
    return {**positive, **(negative if guidance else {})}


def masked_prompts(seed: int, guidance: bool, dtype: torch.dtype = torch.int64) -> dict[str, Any]:
    """Embeddings with their attention masks: the last token of the negative prompt is padding."""
    found = prompts(seed, guidance, prompt_embeds=TEXT)
    found["prompt_attention_mask"] = torch.ones(TEXT[:2]).to(dtype)
    if guidance:
        mask = torch.ones(TEXT[:2])
        mask[:, -1] = 0
        found["negative_prompt_attention_mask"] = mask.to(dtype)
    return found


def image_vae(channels: int, levels: int = 2) -> nn.Module:
    """A small VAE; with two levels it encodes sixteen pixel rows as eight latent rows."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(4,) * levels,
        latent_channels=channels,
        norm_num_groups=2,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    return frozen(vae)


def picture(seed: int, pixels: int = 16) -> Tensor:
    """Random pixels between 0 and 1."""
    return draw(seed, 1, 3, pixels, pixels).sigmoid()
