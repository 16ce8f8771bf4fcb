"""The metrics of a plan search, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_rewrite.errors import BadParameter
from dit_rewrite.policy.plan import Choice
from dit_rewrite.proof.image_metrics import psnr, ssim
from dit_rewrite.search.metrics import METRICS, relative_error

FULL, AST, ASC, WA_RS, WA_RS_ASC = Choice


def test_relative_error_by_hand():
    """Elements 0 (equal), 1/2, 1 (against zero), 2 (other sign), 0 (two zeros): their mean is 3.5 / 5."""
    reference = torch.tensor([3.0, 4.0, 5.0, -6.0, 0.0])
    output = torch.tensor([3.0, 2.0, 0.0, 6.0, 0.0])
    assert relative_error(reference, output) == pytest.approx(3.5 / 5, rel=1e-5)
    assert relative_error(output, reference) == relative_error(reference, output)
    assert relative_error(reference, reference) == 0


def test_epsilon_of_the_relative_error():
    """It is 1e-6, also for tensors in half precision, where 1e-6 cannot be told from 9.5e-7."""
    assert relative_error(torch.tensor([1e-6]).double(), torch.zeros(1)) == pytest.approx(0.5)
    tiny = torch.tensor([2.0**-20]).half()
    assert relative_error(tiny, torch.zeros(1).half()) == pytest.approx(2**-20 / (2**-20 + 1e-6))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.floats(-1e3, 1e3, width=32)), min_size=1, max_size=6))
def test_relative_error_is_that_of_the_appendix(pairs: list[tuple[float, float]]):
    """Appendix A.2, element by element."""
    terms = [min(max(abs(o - p) / (max(abs(o), abs(p)) + 1e-6), 0.0), 10.0) for o, p in pairs]
    o, p = torch.tensor(pairs).unbind(1)
    assert relative_error(o, p) == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_metrics_by_hand():
    """Of 0, 1, 2, 4 one is wrong by 1 or 2; scaled, the direction stays."""
    a, b = torch.tensor([[0.0, 1.0], [2.0, 4.0]])[None, None], torch.tensor([[0.0, 1.0], [4.0, 4.0]])[None, None]
    assert METRICS["mse"](a, b) == 1
    assert METRICS["psnr"](a, b) == 1 / 16 == 10 ** (-psnr(b, a, data_range=4.0) / 10)
    assert METRICS["relative_l2"](a, b) == pytest.approx(2 / 21**0.5)
    assert METRICS["cosine"](a, 3 * a) == pytest.approx(0, abs=1e-12)
    assert METRICS["cosine"](a, b) == pytest.approx(1 - 25 / (21 * 33) ** 0.5)
    image = torch.rand(2, 3, 12, 11, generator=torch.Generator().manual_seed(0))
    span = float(image.max() - image.min())
    assert METRICS["ssim"](image, image**2) == pytest.approx(1 - ssim(image**2, image, span), abs=1e-12)
    assert METRICS["ssim"](image[:, None], image[:, None] ** 2) == METRICS["ssim"](image, image**2)  # frames
    assert all(metric(image, image) == pytest.approx(0, abs=1e-12) for metric in METRICS.values())


def test_a_constant_reference_has_no_peak():
    """NaN does not pass, so that the search goes on."""
    assert math.isnan(METRICS["psnr"](torch.zeros(2, 3), torch.ones(2, 3)))


@pytest.mark.parametrize("shape", [(2, 16, 32), (2, 3, 8, 64), (40,)])
def test_structure_needs_planes(shape: tuple[int, ...]):
    with pytest.raises(BadParameter, match=r"metric='ssim'.*\(…, height, width\) of at least 11"):
        METRICS["ssim"](torch.rand(shape), torch.rand(shape))
