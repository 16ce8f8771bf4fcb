"""Sample the bundled flow-matching denoiser by Euler's method with classifier-free guidance towards captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dit_rewrite.demo.shapes.flow_model import build_flow_scheduler, encode_relations
from dit_rewrite.demo.shapes.relations import NULL_CAPTION, SIZE
from dit_rewrite.demo.shapes.sampling import sample

FLOW_GUIDANCE = 3.0  # chosen by examples/shapes/evaluate_flow.py


def sample_relations(
    denoiser: nn.Module,
    encoder: nn.Module,
    captions: Sequence[str],
    *,
    steps: int,
    guidance: float = FLOW_GUIDANCE,
    seed: int,
    scheduler: Any = None,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Sample images (n, 3, SIZE, SIZE) in [-1, 1] for n captions, on the encoder's device.

    `denoiser` is that of `flow_model.FlowModel`, or a compiled version of it; it is called with both halves of the
    guidance. `guidance` = 1 turns guidance off. `scheduler` is Euler's method by default, or another scheduler for flow
    matching (see `sampling.sample`). `progress` is called after each call of the denoiser. Raises BadArgument for
    captions that
    `relations.tokenise` refuses.
    """
    both = [*captions, *[NULL_CAPTION] * len(captions)]
    states, pooled = encode_relations(encoder, both)  # the same objects at all steps: conditioning

    def predict(latents: Tensor, times: Tensor) -> Tensor:
        prediction: Tensor = denoiser(latents, states, pooled, times, return_dict=False)[0]
        return prediction

    return sample(
        denoiser,
        predict,
        len(captions),
        states.device,
        steps=steps,
        guidance=guidance,
        seed=seed,
        scheduler=build_flow_scheduler() if scheduler is None else scheduler,
        size=SIZE,
        progress=progress,
    )
