"""DiTFastAttn (Yuan et al., 2024) written down: the attention of an eager model replaced by the paper's.

It shares no code with the compiler, the ops or the replay. A branch's value is its attention core's, projected sample
by sample, so sharing or storing the core is the same as sharing or storing the branch, except in FLUX's single blocks,
whose branches also contain an MLP.
"""

from __future__ import annotations

import itertools
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
    """DiTFastAttn in place of the attention of a model. `schedule` has a letter for each step:

    F: O = softmax(Q K^T / sqrt d) V, and the residual R = O - W (equation 1), where W attends only within a window
    W: WA-RS, O' = W + R (equation 2), with the R of the last step that computed it
    A: AST, the output of the step before
    S: ASC, as F for one half of the batch, with O and R used for both halves
    X: WA-RS and ASC, as W for that half

    `seen` returns the mask (N, N) of N tokens. Cross-attention is not replaced.
    """

    schedule: str
    seen: Callable[[int], Tensor]
    half: int = 0
    cores: int | None = None  # the number of first attentions of each step to replace; None means all
    refresh: bool = True  # False differs from the paper: ASC does not update R
    residual: dict[int, Tensor] = field(default_factory=dict)
    out: dict[int, Tensor] = field(default_factory=dict)
    does: str = "F"
    count: int = 0

    def run(self, model: nn.Module, inputs: Sequence[dict[str, Any]]) -> list[Tensor]:
        """Return the model's output at each step."""
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
        """Compute the output of one attention, possibly of half of the batch, and update R."""
        near = softmax_attention(*tensors, seen=self.seen(tensors[0].shape[2]))
        if self.does in "WX":
            return near + (self.residual[core].chunk(2)[self.half] if halved else self.residual[core])
        full = softmax_attention(*tensors)
        if self.refresh or not halved:
            self.residual[core] = torch.cat([full - near] * 2) if halved else full - near
        return full


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seen: Tensor | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt d) v in fp32 over the visible keys. A row that sees no key gives 0."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    for allowed in (mask, seen):
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -INF) if allowed.dtype is torch.bool else scores + allowed
    return scores.softmax(-1).nan_to_num(0) @ v


def band(reach: int, first: int = 0, last: int = 0) -> Callable[[int], Tensor]:
    """Mask of tokens at most `reach` apart. The `first` and `last` tokens are text, which sees and is seen by all."""

    def seen(tokens: int) -> Tensor:
        place = torch.arange(tokens)
        text = (place < first) | (place >= tokens - last)
        return ((place[:, None] - place).abs() <= reach) | text[:, None] | text

    return seen


def square(side: int, reach: int) -> Callable[[int], Tensor]:
    """Mask of the tokens of a square image that are at most `reach` apart in both directions."""

    def seen(tokens: int) -> Tensor:
        place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        assert len(place) == tokens
        return ((place[:, None] - place).abs() <= reach).all(-1)

    return seen


def box(sizes: Sequence[int], reach: Sequence[int], first: int = 0, last: int = 0) -> Callable[[int], Tensor]:
    """Mask of the tokens of a grid that are at most `reach` apart along each axis, with text before and after it."""

    def seen(tokens: int) -> Tensor:
        text = {*range(first), *range(tokens - last, tokens)}
        places = list(itertools.product(*map(range, sizes)))
        assert len(places) == tokens - first - last

        def sees(row: int, column: int) -> bool:
            if row in text or column in text:
                return True
            pairs = zip(places[row - first], places[column - first], reach, strict=True)
            return all(abs(a - b) <= w for a, b, w in pairs)

        return torch.tensor([[sees(row, column) for column in range(tokens)] for row in range(tokens)])

    return seen
