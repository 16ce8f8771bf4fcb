"""Strategies inside attention through Inductor: as close to float64 as the guarded graph, step by step."""

from __future__ import annotations

import pytest
import torch
from sympy import Mod, Ne

from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import Lowering
from dit_rewrite.guards import step
from dit_rewrite.module import attach, twin
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import BlockwiseReuse, ShareGuidance, WindowResidual
from dit_rewrite.policy.where import Where
from dit_rewrite.proof.compare import Check
from dit_rewrite.proof.replay import check_replay
from dit_rewrite.runtime.session import Observation
from tests.helpers.models import MODELS

STEPS = 4
ATTENTION = Where(("attention", "parallel"))
LATER = Ne(Mod(step, 3), 0)
BOTH = Policy((Rule(LATER, (WindowResidual(0.25), ShareGuidance("first")), ATTENTION),))
WINDOWS_AND_BLOCKS = Policy(
    (Rule(LATER, WindowResidual(0.25), Where(("self",))), Rule(LATER, BlockwiseReuse(0.05, 4), Where(("cross",))))
)
IN_CI = {"dit": BOTH, "sd3": BOTH, "pixart_alpha": WINDOWS_AND_BLOCKS}
CASES = [
    pytest.param(name, IN_CI.get(name, BOTH), id=name, marks=[] if name in IN_CI else [pytest.mark.slow])
    for name in MODELS
]


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_through_inductor(name: str, policy: Policy) -> None:
    case = MODELS[name]
    denoiser = case.build()
    backend = Backend(denoiser, policy, Lowering.of("inductor", partition="variants"))
    model = attach(twin(denoiser), backend)
    observed: list[Observation] = []
    backend.session.observer = observed.append
    with torch.no_grad(), model.trajectory(STEPS):
        for arguments in case.inputs(STEPS):
            model(**arguments)
    check = Check()
    check_replay(check, backend.rewritten, observed, ["main"] * len(observed), exact=False)
    assert check.within, check.first_difference
    reused = {decision.step for decision in model.stats().decisions if "reuse" in decision.strategies.values()}
    assert reused == (set() if name == "mochi" else {1, 2})
