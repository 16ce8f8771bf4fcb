"""Train the bundled text-conditional PixArt on captioned shapes; resumable: run it again after an interruption.

    python examples/shapes/train_text.py --out DIR [--steps 12000] [--batch 16] [--threads 1]

A checkpoint (model, EMA, optimiser, step) is written every --save-every steps, and beside it, in
DIR/text_denoiser.safetensors, the EMA weights in fp16. The word vectors are trained with the denoiser.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Generator, Tensor

from dit_rewrite.shapes.captions import NULL_CAPTION, sample_captioned, tokenise
from dit_rewrite.shapes.model import SCHEDULE, save
from dit_rewrite.shapes.text_model import TextModel

EMA_DECAY = 0.999
CAPTION_DROP = 0.1
WARM_UP = 200
PARTS = ("model", "ema", "optimiser")


def initialise(model: TextModel) -> None:
    """Start from a prediction of zero and a modulation that does not depend on the timestep yet."""
    for linear in (model.denoiser.adaln_single.linear, model.denoiser.proj_out):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)


def draw_timesteps(n: int, last: int, generator: Generator) -> Tensor:
    """Timesteps ``(n,)`` int64 in [0, last], logit-normal (Esser et al. 2024, section 3.1): most where shapes form.

    Above 0.7 of the linear schedule a picture is all noise, and there is little to learn from it but the caption.
    """
    return (torch.sigmoid(torch.randn(n, generator=generator) - 0.6) * (last + 1)).long().clamp(max=last)


def loss_of(model: torch.nn.Module, scheduler: DDPMScheduler, batch: int, generator: Generator) -> Tensor:
    """The mean squared error of the predicted v; one caption in ten is replaced by the empty one."""
    images, captions, _ = sample_captioned(batch, generator)
    dropped = (torch.rand(batch, generator=generator) < CAPTION_DROP).tolist()
    tokens, mask = tokenise([NULL_CAPTION if drop else text for text, drop in zip(captions, dropped, strict=True)])
    noise = torch.randn(images.shape, generator=generator)
    timestep = draw_timesteps(batch, scheduler.config.num_train_timesteps - 1, generator)
    noisy = scheduler.add_noise(images, noise, timestep)
    target = scheduler.get_velocity(images, noise, timestep)
    return F.mse_loss(model(noisy, timestep, tokens, mask), target)


def rate_at(step: int, steps: int, peak: float) -> float:
    """The learning rate: up linearly for WARM_UP steps, and down to zero along a half cosine."""
    return peak * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


class Trainer:
    """The model, its moving average and optimiser, and the step that is next."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        torch.manual_seed(0)
        self.model = TextModel().eval()  # no module has dropout to train with
        initialise(self.model)
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
        self.ema = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=average)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=0.0, weight_decay=0.0, betas=(0.9, 0.99), fused=True
        )
        self.scheduler = DDPMScheduler(**SCHEDULE)
        self.step = 0

    def train_step(self) -> float:
        """One step of AdamW; its loss."""
        self.optimiser.param_groups[0]["lr"] = rate_at(self.step, self.arguments.steps, self.arguments.rate)
        generator = Generator().manual_seed(self.step)
        loss = loss_of(self.model, self.scheduler, self.arguments.batch, generator)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.ema.update_parameters(self.model)
        self.step += 1
        return loss.item()

    @property
    def checkpoint(self) -> Path:
        return self.arguments.out / "text_checkpoint.pt"

    def save(self) -> None:
        """Write a checkpoint, whole or not at all, and the averaged weights."""
        new = self.checkpoint.with_suffix(".new")
        torch.save({name: getattr(self, name).state_dict() for name in PARTS} | {"step": self.step}, new)
        new.replace(self.checkpoint)
        save(self.ema.module, self.arguments.out / "text_denoiser.safetensors")

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
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--stop", type=int, help="stop after this step, to go on later")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=250)
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
