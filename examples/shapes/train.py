"""Train the bundled class-conditional DiT on the shapes data; resumable: run it again after an interruption.

    python examples/shapes/train.py --out DIR [--steps 24000] [--batch 64] [--threads 2]

A checkpoint (model, EMA, optimiser, step) is written every 500 steps; at the end DIR/denoiser.safetensors
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model = build_denoiser()
    initialise(model)
    model.eval()  # no module has dropout of its own to train with; see loss_of
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY))
    optimiser = torch.optim.AdamW(model.parameters(), lr=arguments.rate, weight_decay=0.0, betas=(0.9, 0.99))
    scheduler = DDPMScheduler(**SCHEDULE)
    checkpoint = arguments.out / "checkpoint.pt"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        start = state["step"]
    step_model = torch.compile(model)
    mean, began = 0.0, time.perf_counter()
    for step in range(start, arguments.steps):
        warm = min(1.0, (step + 1) / 500)
        optimiser.param_groups[0]["lr"] = arguments.rate * warm * (1 - step / arguments.steps)
        generator = torch.Generator().manual_seed(step)
        loss = loss_of(step_model, scheduler, arguments.batch, generator)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        ema.update_parameters(model)
        mean += loss.item()
        if (step + 1) % 500 == 0:
            pace = (time.perf_counter() - began) / (step + 1 - start)
            print(f"step {step + 1}  loss {mean / 500:.5f}  {pace * 1e3:.0f} ms/step", flush=True)
            mean = 0.0
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "step": step + 1}
            torch.save({**state, "optimiser": optimiser.state_dict()}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            save(ema.module, arguments.out / "denoiser.safetensors")


if __name__ == "__main__":
    main()
