"""Sample the bundled text-conditional denoiser by DDIM with classifier-free guidance towards captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_rewrite.demo.shapes.captions import NULL_CAPTION
from dit_rewrite.demo.shapes.sampling import sample
from dit_rewrite.demo.shapes.text_model import encode

TEXT_GUIDANCE = 1.25  # chosen by examples/shapes/evaluate_text.py


def sample_captions(
    denoiser: nn.Module,
    encoder: nn.Module,
    captions: Sequence[str],
    *,
    steps: int,
    guidance: float = TEXT_GUIDANCE,
    seed: int,
    negative: Sequence[str] | None = None,
    scheduler: Any = None,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Sample images (n, 3, SIZE, SIZE) in [-1, 1] for n captions, on the encoder's device.

    `denoiser` is that of `text_model.TextModel`, or a compiled version of it; it is called with both halves of the
    guidance. `guidance` = 1 turns guidance off. `negative` are the captions of the unconditional half, by default empty
    ones. `scheduler` is as in `sampling.sample`. `progress` is called after each call of the denoiser. Raises
    BadArgument for captions that `captions.tokenise` refuses.
    """
    with torch.no_grad():
        other = [NULL_CAPTION] * len(captions) if negative is None else negative
        states, mask = encode(encoder, [*captions, *other])  # one object for all steps

    def predict(latents: Tensor, times: Tensor) -> Tensor:
        prediction: Tensor = denoiser(latents, states, times, encoder_attention_mask=mask, return_dict=False)[0]
        return prediction

    return sample(
        denoiser,
        predict,
        len(captions),
        states.device,
        steps=steps,
        guidance=guidance,
        seed=seed,
        scheduler=scheduler,
        progress=progress,
    )
