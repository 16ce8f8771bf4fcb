"""Train the bundled class-conditional DiT on the shapes data; resumable: run it again after an interruption.

    python examples/shapes/train.py --out DIR [--steps 7500] [--batch 64] [--threads 2]

A checkpoint (model, EMA, optimiser, step) and the EMA weights in fp16 (DIR/denoiser.safetensors) are written every
--save-every steps. The learning rate increases for 500 steps and then decreases linearly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel

from dit_rewrite.demo.shapes.data import NULL_CLASS, sample
from dit_rewrite.demo.shapes.model import SCHEDULE, build_denoiser
from dit_rewrite.demo.shapes.training import Trainer, build_parser

LABEL_DROP = 0.1


def initialise(model: DiTTransformer2DModel) -> None:
    """Initialise gates and head to zero (adaLN-zero), so that every block starts as the identity (DiT, section 3.2)."""
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    torch.nn.init.zeros_(model.proj_out_2.weight)
    torch.nn.init.zeros_(model.proj_out_2.bias)


def loss_of(
    model: Callable[..., Any], scheduler: DDPMScheduler, batch: int, generator: torch.Generator
) -> torch.Tensor:
    """Return the mean squared error of the predicted v.

    Labels are dropped here, once for all blocks, because diffusers' own dropout is sampled independently in each block,
    so that the unconditional model would never be trained.
    """
    images, labels = sample(batch, generator)
    noise = torch.randn(images.shape, generator=generator)
    timestep = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator)
    dropped = torch.rand(batch, generator=generator) < LABEL_DROP
    labels = torch.where(dropped, NULL_CLASS, labels)
    noisy = scheduler.add_noise(images, noise, timestep)
    target = scheduler.get_velocity(images, noise, timestep)
    return F.mse_loss(model(noisy, timestep, labels, return_dict=False)[0], target)


def main() -> None:
    parser = build_parser(__doc__, steps=7500, batch=64, threads=2, save_every=500)
    parser.add_argument("--eager", action="store_true", help="train without torch.compile")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = build_denoiser()
    initialise(model)
    model.eval()  # no dropout in the modules; see loss_of
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, betas=(0.9, 0.99))
    scheduler, run = DDPMScheduler(**SCHEDULE), model if given.eager else torch.compile(model)
    trainer = Trainer(
        model,
        [optimiser],
        lambda generator: loss_of(run, scheduler, given.batch, generator),
        lambda step: given.rate * min(1.0, (step + 1) / 500) * (1 - step / given.steps),
        given.out,
        "checkpoint.pt",
        "denoiser",
    )
    trainer.train(given.stop or given.steps, given.save_every)


if __name__ == "__main__":
    main()
