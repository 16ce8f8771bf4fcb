"""A fake model whose losses are exactly known, and algorithm 1 of DiTFastAttn in plain Python."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from dit_rewrite.policy.plan import Choice, PlanRow, Table

FULL, AST, ASC, WA_RS, WA_RS_ASC = Choice

# The loss of a step's output, from the rows of the steps before and the choices of all sites in this one.
Losses = Callable[[Table, PlanRow], Fraction]

LARGE = 2.0**60  # eps is far below its last digit, so that the error of LARGE * (1 - x) is x exactly


class Interrupted(Exception):
    pass


class Fake:
    """A model that consists of its losses; refuses calls that are out of order, and records those that cost a run."""

    def __init__(self, losses: Losses, sites: int, stop_at: tuple[int, int] | None = None) -> None:
        self.losses = losses
        self.sites = sites
        self.stop_at = stop_at  # the step and site whose first attempt is interrupted
        self.history: Table = ()
        self.row: PlanRow | None = None
        self.work = 0.0
        self.replayed: list[PlanRow] = []
        self.begun: list[int] = []
        self.attempts: list[tuple[int, int, Choice]] = []
        self.given = [torch.full((2, 3), LARGE), torch.full((2,), -LARGE)]

    def replay(self, row: PlanRow) -> None:
        assert self.row is None
        assert len(row) == self.sites
        self.history += (row,)
        self.replayed.append(row)
        self.work += 1

    def begin(self, step: int) -> None:
        assert self.row is None
        assert step == len(self.history)
        self.begun.append(step)
        self.row = ()

    def reference(self) -> list[Tensor]:
        assert self.row == ()
        self.work += 1
        return self.outputs((FULL,) * self.sites)

    def attempt(self, index: int, choice: Choice) -> list[Tensor]:
        assert self.row is not None
        assert index == len(self.row) < self.sites
        step = len(self.history)
        if (step, index) == self.stop_at:
            raise Interrupted
        self.attempts.append((step, index, choice))
        self.work += Fraction(self.sites - index, self.sites)
        return self.outputs((*self.row, choice, *(FULL,) * (self.sites - index - 1)))

    def fix(self, index: int, choice: Choice) -> None:
        assert self.row is not None
        assert index == len(self.row) < self.sites
        self.row += (choice,)

    def finish(self) -> None:
        assert self.row is not None
        assert len(self.row) == self.sites
        self.history, self.row = (*self.history, self.row), None
        self.work += 1

    def outputs(self, row: PlanRow) -> list[Tensor]:
        """Outputs in buffers that the next call overwrites."""
        error = float(self.losses(self.history, row))
        self.given[0].fill_(LARGE * (1 - error))
        self.given[1].fill_(-LARGE * (1 - error))
        return self.given


def algorithm_1(losses: Losses, sites: int, steps: int, delta: Fraction, choices: PlanRow) -> tuple[Table, int]:
    """The paper's algorithm, in fractions: layers count from 1; S is in ascending cost, so that the strategy "with the
    highest computation reduction ratio" is the first that passes; the first step is not compressed. Also returns the
    number of candidates tried."""
    table: list[list[Choice]] = [[FULL] * sites]
    tried = 0
    for t in range(1, steps):
        history = tuple(map(tuple, table))
        table.append([FULL] * sites)
        for i in range(1, sites + 1):
            for m in choices:
                table[t][i - 1] = m
                tried += 1
                if losses(history, tuple(table[t])) < Fraction(i, sites) * delta:
                    break
                table[t][i - 1] = FULL
    return tuple(map(tuple, table)), tried


def names(sites: int) -> list[str]:
    return [f"blocks.{i}.attn" for i in range(sites)]


def listed(losses: dict[Choice, list[Fraction]]) -> Losses:
    """A loss for each choice and site, the same at each step; the losses of one row add up."""

    def total(history: Table, row: PlanRow) -> Fraction:
        return sum((losses[choice][i] for i, choice in enumerate(row) if choice is not FULL), Fraction(0))

    return total


def drawn(seed: int) -> Losses:
    """Losses in 64ths that depend on the whole row and on the row before, and often equal a threshold."""

    def total(history: Table, row: PlanRow) -> Fraction:
        if all(choice is FULL for choice in row):
            return Fraction(0)
        before = history[-1] if history else ()
        return Fraction(random.Random(f"{seed} {len(history)} {before} {row}").randrange(0, 9), 64)

    return total
