"""The strategy `ReuseProbabilities`: this step's values, weighted by the attention probabilities of an earlier step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dit_rewrite.compiler.attention_codecs import codec
from dit_rewrite.errors import RefusalReason
from dit_rewrite.kernels.common.scores import apply_mask
from dit_rewrite.passes.analysis.attention_sites import arguments
from dit_rewrite.passes.rewrite.codec import Codec
from dit_rewrite.policy.strategies import Core


@dataclass(frozen=True)
class ReuseProbabilities(Core):
    """What a policy says. The step that computes keeps softmax(QK'), and a step that reuses multiplies it by its V.

    The projections of Q and K and the softmax are not run at a step that reuses. A slot holds as many numbers as the
    attention has scores.
    """


@dataclass(frozen=True)
class Probabilities:
    """What the slot holds, and how the attention's output is made from it."""

    scale: float

    def is_plain(self, value: Tensor, read: Sequence[Tensor]) -> bool:
        return False

    def encode(self, value: Tensor, read: Sequence[Tensor]) -> tuple[Tensor, ...]:
        query, key, _, *mask = read
        scores = query @ key.transpose(-2, -1) * self.scale
        return (apply_mask(scores, mask[0] if mask else None).softmax(-1),)

    def decode(self, held: Sequence[Tensor], read: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        output = (held[0] @ read[2]).to(dtype)
        return output.transpose(1, 2).contiguous().transpose(1, 2)  # the layout of PyTorch's attention: views follow


@codec.register
def _probabilities(
    strategy: ReuseProbabilities, core: fx.Node, image: int | None, static: bool, steady_mask: bool
) -> Codec | RefusalReason:
    """The codec for an attention op; a mask that changes from step to step is refused."""
    if not steady_mask:
        return RefusalReason.MOVING_MASK
    scale = arguments(core)["scale"]
    head_size = arguments(core)["query"].meta["val"].shape[-1]
    return Probabilities(head_size**-0.5 if scale is None else scale)
