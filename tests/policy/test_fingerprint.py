"""The model and the scheduler that a plan belongs to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dit_rewrite.errors import DitRewriteError, PlanMismatch
from dit_rewrite.policy.plan import describe_scheduler, fingerprint
from tests.helpers.plans import PLAN


class Block(nn.Module):
    def __init__(self, width: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=bias)
        self.act: nn.Module = nn.GELU()
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("table", torch.ones(3), persistent=False)


class Other(Block):
    """The same tensors in a module of another class."""


def same_size_other_activation() -> Block:
    block = Block()
    block.act = nn.SiLU()
    return block


def renamed() -> Block:
    block = Block()
    block.projection = block.proj
    del block.proj
    return block


def test_fingerprints_of_equal_models():
    """Other values, a compiled copy and tables for another size do not change the fingerprint."""
    model = Block()
    compiled = torch.compile(Block(), backend="eager")
    longer = Block()
    longer.register_buffer("table", torch.ones(9), persistent=False)
    assert len(fingerprint(model)) == 64
    assert {fingerprint(m) for m in (model, Block(), compiled, longer)} == {fingerprint(model)}


def test_shared_modules_count_as_often_as_they_stand():
    shared = Block()
    assert fingerprint(nn.Sequential(shared, shared)) == fingerprint(nn.Sequential(Block(), Block()))


def test_fingerprints_of_other_models():
    """Class, width, parameter, name, activation, dtype, buffer and number of blocks each change the fingerprint."""
    more_scale = Block()
    more_scale.register_buffer("scale", torch.ones(5))
    others = [
        *(Other(), Block(8), Block(bias=False), renamed(), same_size_other_activation(), Block().half(), more_scale),
        *(nn.Sequential(Block()), nn.Sequential(Block(), Block())),
    ]
    assert len({fingerprint(model) for model in (Block(), *others)}) == 1 + len(others)


def test_a_plan_knows_its_model_and_number_of_steps():
    plan = replace(PLAN, model=fingerprint(Block()))
    plan.check(Block(), num_steps=3)
    with pytest.raises(PlanMismatch, match=r"another model \(its fingerprint is .* this Other is .* search one"):
        plan.check(Other(), num_steps=3)
    with pytest.raises(PlanMismatch, match="The plan has 3 steps, and the trajectory has 2. Sample with 3 steps"):
        plan.check(Block(), num_steps=2)
    with pytest.raises(PlanMismatch, match="The plan has 3 steps, and the trajectory has 4"):
        plan.check(Block(), num_steps=4)
    assert issubclass(PlanMismatch, DitRewriteError)


class Scheduler:
    def __init__(self, **config: Any) -> None:
        self.config = config


def test_schedulers_as_text():
    text = describe_scheduler(Scheduler(beta=0.1, name="linear", betas=torch.ones(2)))
    assert text.startswith("Scheduler:")
    assert describe_scheduler(Scheduler(name="linear", betas=torch.ones(2), beta=0.1, _version="2")) == text
    assert describe_scheduler(Scheduler(beta=0.2, name="linear", betas=torch.ones(2))) != text
    assert describe_scheduler(Scheduler(beta=0.1, name="linear", betas=torch.zeros(2))) != text
    assert describe_scheduler(object()).startswith("object:")
    assert describe_scheduler(None) == "none"
