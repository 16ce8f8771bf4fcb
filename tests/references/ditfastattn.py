"""DiTFastAttn's definitions written down: PyTorch's attention in an eager model exchanged for the paper's.

It shares nothing with the compiler, the ops or the replay. A branch's value is its attention core's, projected sample
by sample, so that what is shared or kept at the core is shared or kept at the branch (FLUX's single blocks alone hold
an MLP beside it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.models import output

INF = math.inf


@dataclass
class Paper:
    """DiTFastAttn at the attention of one model. Of each step a letter says what it does:

    F: O = softmax(Q K^T / sqrt d) V, and the residual R = O - W (equation 1), W being the softmax over a window alone
    W: O' = W + R (equation 2), with the R of the last step that had it.      A: AST, the output of the step before
    S: ASC, an F of one half of the batch, O and R used for both halves.      X: WA-RS and ASC, a W of that half

    `seen` says of N tokens which see each other (N, N). Cross-attention is left alone.
    """

    schedule: str
    seen: Callable[[int], Tensor]
    half: int = 0
    cores: int | None = None  # the first of each step, where the others are left alone too
    refresh: bool = True  # False departs from the paper: ASC leaves R as it was
    residual: dict[int, Tensor] = field(default_factory=dict)
    out: dict[int, Tensor] = field(default_factory=dict)
    does: str = "F"
    count: int = 0

    def run(self, model: nn.Module, inputs: Sequence[dict[str, Any]]) -> list[Tensor]:
        """What the model returns at each step."""
        results = []
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", self.attend)
            for does, arguments in zip(self.schedule, inputs, strict=True):
                self.does, self.count = does, 0
                results.append(output(model(**arguments)).clone())
        return results

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        assert not any(rest.values()), "no dropout, causality, scale or shared heads"
        if query.shape != key.shape or self.count == self.cores:
            return softmax_attention(query, key, value, attn_mask)
        core, self.count = self.count, self.count + 1
        if self.does != "A":
            halved = self.does in "SX"
            mask = None if attn_mask is None else attn_mask.expand(query.shape[0], *attn_mask.shape[1:])
            tensors = [t.chunk(2)[self.half] if halved and t is not None else t for t in (query, key, value, mask)]
            found = self.compute(core, tensors, halved)
            self.out[core] = torch.cat([found, found]) if halved else found
        return self.out[core]

    def compute(self, core: int, tensors: list[Any], halved: bool) -> Tensor:
        """The output of one attention, perhaps of half the batch; R is brought up to date."""
        near = softmax_attention(*tensors, seen=self.seen(tensors[0].shape[2]))
        if self.does in "WX":
            return near + (self.residual[core].chunk(2)[self.half] if halved else self.residual[core])
        full = softmax_attention(*tensors)
        if self.refresh or not halved:
            self.residual[core] = torch.cat([full - near] * 2) if halved else full - near
        return full


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seen: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt d) v in fp32, over the keys that are seen; a row that sees none gives 0."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    for allowed in (mask, seen):
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -INF) if allowed.dtype is torch.bool else scores + allowed
    return scores.softmax(-1).nan_to_num(0) @ v


def band(reach: int, first: int = 0, last: int = 0) -> Callable[[int], Tensor]:
    """Tokens no further apart than `reach`; the `first` and `last` ones are text, which sees and is seen by all."""

    def seen(tokens: int) -> Tensor:
        place = torch.arange(tokens)
        text = (place < first) | (place >= tokens - last)
        return ((place[:, None] - place).abs() <= reach) | text[:, None] | text

    return seen


def square(side: int, reach: int) -> Callable[[int], Tensor]:
    """Tokens of a square image that are no further apart than `reach` in either direction."""

    def seen(tokens: int) -> Tensor:
        place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        assert len(place) == tokens
        return ((place[:, None] - place).abs() <= reach).all(-1)

    return seen
