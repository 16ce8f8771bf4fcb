"""Train the bundled flow-matching SD3 on two shapes in relation; resumable: run it again after an interruption.

    python examples/shapes/train_flow.py --out DIR [--steps 3600] [--batch 48] [--threads 1]

A checkpoint (model, EMA, optimisers, step) and the EMA weights in fp16 (DIR/flow_denoiser.safetensors) are written
every --save-every steps. The word vectors are trained with the denoiser.

The bundled weights were trained with

    python examples/shapes/train_flow.py --out DIR --steps 3600 --hold 2200 --batch 48 --rate 2e-3
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dit_rewrite.demo.shapes.flow_model import FlowModel
from dit_rewrite.demo.shapes.relations import NULL_CAPTION, sample_related, tokenise
from dit_rewrite.demo.shapes.training import Muon, Trainer, build_parser, rate_at

CAPTION_DROP = 0.1


def initialise(model: FlowModel) -> None:
    """Initialise gates and head to zero (adaLN-zero), so that every block starts as the identity (DiT, section 3.2)."""
    for name, parameter in model.denoiser.named_parameters():
        if "norm1" in name or name.startswith(("proj_out", "norm_out")):
            torch.nn.init.zeros_(parameter)


def draw_sigmas(n: int, generator: Generator) -> Tensor:
    """Return logit-normal noise levels (n,) in (0, 1) (Esser et al. 2024, section 3.1).

    The distribution is shifted towards noise, because shapes and places are determined early.
    """
    return torch.sigmoid(torch.randn(n, generator=generator) + 0.3)


def loss_of(model: Callable[..., Any], batch: int, generator: Generator) -> Tensor:
    """Return the mean squared error of the predicted velocity; one caption in ten is replaced by the empty one."""
    images, captions, _ = sample_related(batch, generator)
    dropped = (torch.rand(batch, generator=generator) < CAPTION_DROP).tolist()
    tokens = tokenise([NULL_CAPTION if drop else text for text, drop in zip(captions, dropped, strict=True)])
    noise = torch.randn(images.shape, generator=generator)
    sigma = draw_sigmas(batch, generator)
    level = sigma[:, None, None, None]
    return F.mse_loss(model((1 - level) * images + level * noise, 1000 * sigma, tokens), noise - images)


def build_optimisers(model: FlowModel) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of attention and MLP, and AdamW for the other parameters."""
    blocks = model.denoiser.transformer_blocks.named_modules()
    hidden = [m.weight for name, m in blocks if isinstance(m, torch.nn.Linear) and "norm" not in name]
    rest = [x for x in model.parameters() if not any(x is matrix for matrix in hidden)]
    adamw = torch.optim.AdamW(rest, lr=0.0, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    return [Muon(hidden, lr=0.0), adamw]


def main() -> None:
    parser = build_parser(__doc__, steps=3600, batch=48, threads=1, save_every=250)
    parser.add_argument("--hold", type=int, default=0, help="keep the peak rate until this step, below --steps")
    parser.add_argument("--eager", action="store_true", help="train without torch.compile")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = FlowModel().eval()  # no dropout in the modules
    initialise(model)
    run = model if given.eager else torch.compile(model)
    trainer = Trainer(
        model,
        build_optimisers(model),
        lambda generator: loss_of(run, given.batch, generator),
        lambda step: rate_at(step, given.steps, given.rate, given.hold),
        given.out,
        "flow_checkpoint.pt",
        "flow_denoiser",
    )
    trainer.train(given.stop or given.steps, given.save_every)


if __name__ == "__main__":
    main()
