"""The search of a plan by other metrics (appendix A.7 of DiTFastAttn)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit_rewrite.errors import BadParameter, PlanMismatch
from dit_rewrite.policy.plan import Choice, PlanRow
from dit_rewrite.search.greedy import STRATEGIES, greedy, loss
from dit_rewrite.search.metrics import Metric, metric_of
from tests.search.known_losses import ASC, AST, FULL, WA_RS, WA_RS_ASC, Fake, listed


class Planted(Fake):
    """A model of one site whose output is an image under each choice, in two trajectories."""

    def __init__(self, reference: Tensor, outputs: dict[Choice, Tensor]) -> None:
        super().__init__(listed({}), 1)
        self.images = {FULL: reference, **outputs}

    def outputs(self, row: PlanRow) -> list[Tensor]:
        return [self.images[(row or (FULL,))[-1]][None, None].clone() for _ in range(2)]


def planted() -> Planted:
    """Four damages: small values change their sign, one pixel is far off, all is larger, and the upper half lighter."""
    reference = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)).double()
    reference[8:] = torch.where(reference[8:] < 0.5, -0.03, 0.03)
    signs, pixel, light = (reference.clone() for _ in range(3))
    signs[8:] *= -1
    pixel[0, 0] += 1.5
    light[:8] += 0.08
    return Planted(reference, {AST: signs, WA_RS: pixel, ASC: 1.3 * reference, WA_RS_ASC: light})


def furthest(reference: Tensor, output: Tensor) -> float:
    return float((output - reference).abs().max())


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("relative_error", WA_RS),  # one element of 256
        ("mse", AST),  # the signs are of small values
        ("psnr", AST),
        ("relative_l2", AST),
        ("cosine", ASC),  # the same direction
        ("ssim", WA_RS_ASC),  # the same structure
        (furthest, AST),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_each_metric_leads_the_search(metric: str | Metric, expected: Choice):
    """Of four damages each metric lets another pass: all others are above the threshold, and are tried before."""
    name, function = metric_of(metric)
    fake = planted()
    reference = [fake.images[FULL][None, None]] * 2
    losses = {choice: loss(reference, fake.outputs((choice,)), function) for choice in STRATEGIES}
    assert min(losses, key=losses.__getitem__) is expected
    least, second = sorted(losses.values())[:2]
    assert second > 1.05 * least
    order = [*(choice for choice in STRATEGIES if choice is not expected), expected]
    found = greedy(fake, ["attn"], 2, (least + second) / 2, order, metric=metric)
    assert (found.table[1], found.evaluations) == ((expected,), 4)
    assert name == (metric if isinstance(metric, str) else f"{__name__}.furthest")


def test_a_search_by_another_metric_is_not_continued(tmp_path: Path):
    path = tmp_path / "plan.json.partial"
    greedy(planted(), ["attn"], 2, 0.1, partial=path, metric="mse")
    assert greedy(planted(), ["attn"], 2, 0.1, partial=path, metric="mse").table
    with pytest.raises(PlanMismatch, match="metric: 'mse' there, 'psnr' here"):
        greedy(planted(), ["attn"], 2, 0.1, partial=path, metric="psnr")
    with pytest.raises(BadParameter, match="metric=3.*a function of two tensors"):
        greedy(planted(), ["attn"], 2, 0.1, metric=3)  # type: ignore[arg-type]
