"""Segments through Inductor: the cut graph still gives the bits of plain torch.compile in float32."""

from __future__ import annotations

import pytest

import dit_rewrite
from dit_rewrite.policies import FORA
from tests.helpers.models import MODELS

QUICK = ("dit",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in MODELS]
)
def test_segments_are_exact_at_reuse_0(name: str) -> None:
    case = MODELS[name]
    found = dit_rewrite.verify(case.build(), case.inputs(3), FORA(2), lowering="segments")
    assert found.reuse0.exact, found
    assert found.replay.within, found
