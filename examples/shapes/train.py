"""Train the bundled class-conditional DiT on the shapes data; resumable: run it again after an interruption.

    python examples/shapes/train.py --out DIR [--steps 7500] [--batch 64] [--threads 2]

A checkpoint (model, EMA, optimiser, step) is written every --save-every steps; at the end DIR/denoiser.safetensors
holds the EMA weights in fp16.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel

from dit_rewrite.shapes.data import NULL_CLASS, sample
from dit_rewrite.shapes.model import SCHEDULE, build_denoiser, save

EMA_DECAY = 0.999
LABEL_DROP = 0.1
PARTS = ("model", "ema", "optimiser")


def initialise(model: DiTTransformer2DModel) -> None:
    """adaLN-zero: gates and head start at zero, so that every block starts as the identity (DiT, section 3.2)."""
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    torch.nn.init.zeros_(model.proj_out_2.weight)
    torch.nn.init.zeros_(model.proj_out_2.bias)


def loss_of(model: torch.nn.Module, scheduler: DDPMScheduler, batch: int, generator: torch.Generator) -> torch.Tensor:
    """The mean squared error of the predicted v. Labels are dropped here, once for all blocks: diffusers'
    own dropout draws anew in each block, and the unconditional model would never be trained."""
    images, labels = sample(batch, generator)
    noise = torch.randn(images.shape, generator=generator)
    timestep = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator)
    dropped = torch.rand(batch, generator=generator) < LABEL_DROP
    labels = torch.where(dropped, NULL_CLASS, labels)
    noisy = scheduler.add_noise(images, noise, timestep)
    target = scheduler.get_velocity(images, noise, timestep)
    return F.mse_loss(model(noisy, timestep, labels, return_dict=False)[0], target)


class Trainer:
    """The model, its moving average and optimiser, and the step that is next."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        torch.manual_seed(0)
        self.model = build_denoiser()
        initialise(self.model)
        self.model.eval()  # no module has dropout of its own to train with; see loss_of
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
        self.ema = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=average)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0, betas=(0.9, 0.99))
        self.scheduler = DDPMScheduler(**SCHEDULE)
        self.run = self.model if arguments.eager else torch.compile(self.model)
        self.step = 0

    def train_step(self) -> float:
        """One step of AdamW at a rate that rises for 500 steps and falls linearly; its loss."""
        rate = self.arguments.rate * min(1.0, (self.step + 1) / 500) * (1 - self.step / self.arguments.steps)
        self.optimiser.param_groups[0]["lr"] = rate
        generator = torch.Generator().manual_seed(self.step)
        loss = loss_of(self.run, self.scheduler, self.arguments.batch, generator)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.ema.update_parameters(self.model)
        self.step += 1
        return loss.item()

    @property
    def checkpoint(self) -> Path:
        return self.arguments.out / "checkpoint.pt"

    def save(self) -> None:
        """Write a checkpoint, whole or not at all, and the averaged weights."""
        new = self.checkpoint.with_suffix(".new")
        torch.save({name: getattr(self, name).state_dict() for name in PARTS} | {"step": self.step}, new)
        new.replace(self.checkpoint)
        save(self.ema.module, self.arguments.out / "denoiser.safetensors")

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            for name in PARTS:
                getattr(self, name).load_state_dict(state[name])
            self.step = state["step"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--stop", type=int, help="stop after this step, to go on later")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--eager", action="store_true", help="train without torch.compile")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(arguments)
    trainer.resume()
    losses: list[float] = []
    began = time.perf_counter()
    while trainer.step < (arguments.stop or arguments.steps):
        losses.append(trainer.train_step())
        if trainer.step % arguments.save_every == 0:
            pace = (time.perf_counter() - began) / len(losses)
            recent = losses[-arguments.save_every :]
            print(f"step {trainer.step}  loss {sum(recent) / len(recent):.5f}  {pace * 1e3:.0f} ms/step", flush=True)
            trainer.save()
    trainer.save()


if __name__ == "__main__":
    main()
