"""Train the bundled text-conditional PixArt on captioned shapes; resumable: run it again after an interruption.

    python examples/shapes/train_text.py --out DIR [--start WEIGHTS] [--steps 12000] [--batch 16] [--threads 1]

A checkpoint (model, EMA, optimisers, step) and the EMA weights in fp16 (DIR/text_denoiser.safetensors) are written
every --save-every steps. The word vectors are trained with the denoiser. --start begins a new stage from such weights,
with new optimisers and a new EMA. --seed gives each stage different batches.

The bundled weights were trained in three stages. A/text_denoiser.safetensors are the previously bundled weights (AdamW;
71.0 % of 500 captions correct in shape and colour). Stages B and C were stopped early, so the learning rate stayed at
its peak:

    B: --out B --start A/text_denoiser.safetensors --batch 32 --rate 1.5e-3 --steps 6500 --hold 2500 --seed 1000000
       --stop 2250
    C: --out C --start B/text_denoiser.safetensors --batch 32 --rate 2.5e-3 --steps 4000 --hold 1500 --seed 2000000
       --stop 1000 --optimiser muon

C is correct for 80.6 % of the captions (evaluate_text.py at guidance 1.25 and 50 steps).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Generator, Tensor

from dit_rewrite.demo.shapes.captions import NULL_CAPTION, sample_captioned, tokenise
from dit_rewrite.demo.shapes.model import SCHEDULE, load
from dit_rewrite.demo.shapes.text_model import TextModel
from dit_rewrite.demo.shapes.training import Muon, Trainer, build_parser, rate_at

CAPTION_DROP = 0.1


def initialise(model: TextModel) -> None:
    """Initialise the prediction to zero, and the modulation to be independent of the timestep."""
    for linear in (model.denoiser.adaln_single.linear, model.denoiser.proj_out):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)


def draw_timesteps(n: int, last: int, generator: Generator) -> Tensor:
    """Return logit-normal timesteps (n,) int64 in [0, last] (Esser et al. 2024, section 3.1).

    Most are at the noise levels where shapes form. Above 0.7 of the linear schedule a picture is almost pure noise, and
    only the caption is informative.
    """
    return (torch.sigmoid(torch.randn(n, generator=generator) - 0.6) * (last + 1)).long().clamp(max=last)


def loss_of(model: torch.nn.Module, scheduler: DDPMScheduler, batch: int, generator: Generator) -> Tensor:
    """Return the mean squared error of the predicted v; one caption in ten is replaced by the empty one."""
    images, captions, _ = sample_captioned(batch, generator)
    dropped = (torch.rand(batch, generator=generator) < CAPTION_DROP).tolist()
    tokens, mask = tokenise([NULL_CAPTION if drop else text for text, drop in zip(captions, dropped, strict=True)])
    noise = torch.randn(images.shape, generator=generator)
    timestep = draw_timesteps(batch, scheduler.config.num_train_timesteps - 1, generator)
    noisy = scheduler.add_noise(images, noise, timestep)
    target = scheduler.get_velocity(images, noise, timestep)
    return F.mse_loss(model(noisy, timestep, tokens, mask), target)


def build_optimisers(model: TextModel, name: str) -> list[torch.optim.Optimizer]:
    """Return AdamW for all parameters, or for "muon", Muon for the blocks' matrices and AdamW for the others."""
    layers = model.denoiser.transformer_blocks.modules()
    hidden = [layer.weight for layer in layers if isinstance(layer, torch.nn.Linear)]
    chosen = set(hidden) if name == "muon" else set()
    rest = [x for x in model.parameters() if x not in chosen]
    adamw = torch.optim.AdamW(rest, lr=0.0, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    return [Muon(hidden, lr=0.0), adamw] if chosen else [adamw]


def main() -> None:
    parser = build_parser(__doc__, steps=12000, batch=16, threads=1, save_every=250)
    parser.add_argument("--start", type=Path, help="weights to start from, instead of random ones")
    parser.add_argument("--hold", type=int, default=0, help="keep the peak rate until this step, below --steps")
    parser.add_argument("--optimiser", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the first step's batch; then one more a step")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model, scheduler = TextModel().eval(), DDPMScheduler(**SCHEDULE)  # no dropout in the modules
    initialise(model)
    if given.start is not None:
        load(model, given.start).requires_grad_(True)
    trainer = Trainer(
        model,
        build_optimisers(model, given.optimiser),
        lambda generator: loss_of(model, scheduler, given.batch, generator),
        lambda step: rate_at(step, given.steps, given.rate, given.hold),
        given.out,
        "text_checkpoint.pt",
        "text_denoiser",
        given.seed,
    )
    trainer.train(given.stop or given.steps, given.save_every)


if __name__ == "__main__":
    main()
