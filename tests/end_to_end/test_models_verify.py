"""`verify` proves every named model: reuse 0 and the replay of FORA's decisions, bit for bit."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import dit_rewrite
from dit_rewrite.policies import FORA
from tests.helpers.broken import broken_blocks
from tests.helpers.models import MODELS, Case

# Values in the cache, counted by hand: one per site, and one more for each further stream that a joint attention adds
# to (the last block of SD3 and Mochi drops its text; that of CogVideoX keeps the text value). The MLP of CogVideoX
# runs over both streams and adds to each, but nothing reads the text sum of the last one.
VALUES = {
    "dit": 6,
    "pixart_alpha": 9,
    "pixart_sigma": 9,
    "sd3": 8 + 2,
    "flux": 8 + 2,
    "cogvideox": 6 + 3 + 2,
    "latte": 10,
    "mochi": 8 + 2,
    "omnigen": 6,
    "wan": 6,
    "stdit": 8,
}
# Each kind of model in one precision; test_models_fora compares the computed steps of every model in float32 too
QUICK = {"fp32": {"dit", "flux"}, "bf16": {"pixart_alpha", "sd3", "omnigen", "wan", "stdit"}}
PRECISIONS = [
    pytest.param(
        case,
        precision,
        id=f"{case.name}-{precision}",
        marks=[pytest.mark.slow] if case.name not in QUICK.get(precision, MODELS) else [],
    )
    for case in MODELS.values()
    for precision in ("fp32", "bf16", "autocast")
    if precision != "autocast" or case.autocast
]


@pytest.mark.parametrize(("case", "precision"), PRECISIONS)
def test_reuse_0_and_replay_are_exact(case: Case, precision: str) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    ambient: Any = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()
    with ambient:
        found = dit_rewrite.verify(case.build(dtype), case.inputs(4, dtype), policy=FORA(3), backend="aot_eager")
    sites = sum(case.sites.values())
    assert found.exact, found
    assert (found.sites, found.values, found.calls) == (sites, VALUES[case.name], 4)
    assert (found.decisions, found.reused) == (4 * sites, 2 * sites)


def test_blocks_behind_breaks_are_verified() -> None:
    case = broken_blocks()
    found = dit_rewrite.verify(case.build(), case.inputs(4), policy=FORA(3), backend="aot_eager")
    assert found.exact, found
    assert (found.sites, found.values) == (12, 12)
