"""Comparing two runs: bit for bit, and by their distance from float64."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_rewrite.torch_compat import tree_leaves


@dataclass(frozen=True)
class Difference:
    """Where two runs first differ: the node whose value does, the step, and what was compared."""

    node: str
    step: int
    what: str

    def __str__(self) -> str:
        return f"at {self.node}, step {self.step} ({self.what})"


@dataclass
class Check:
    """What a comparison found. ``within``: where it is not exact, it is within rounding."""

    exact: bool = True
    within: bool = True
    max_abs_error: float = 0.0
    first_difference: Difference | None = None

    def compare(self, ours: Tensor, theirs: Tensor, where: Difference) -> bool:
        """Note whether two tensors are equal bit for bit, NaN being equal to NaN; by default nothing else is within."""
        if equal(ours, theirs):
            return True
        self.fail(where, max_abs_error(ours, theirs))
        return False

    def fail(self, where: Difference, error: float = math.inf) -> None:
        """Note a difference."""
        self.exact = self.within = False
        self.max_abs_error = max(self.max_abs_error, error)
        self.first_difference = self.first_difference or where

    def __str__(self) -> str:
        return "exact" if self.exact else "within rounding" if self.within else "WRONG"


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype and shape and equal elements, NaN being equal to NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def max_abs_error(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite where shapes differ or one alone is not finite."""
    if a.shape != b.shape:
        return math.inf
    error = (a.double() - b.double()).abs().max().item()
    return math.inf if math.isnan(error) else error


def rms(a: Iterable[object], b: Iterable[object]) -> float:
    """The root mean square difference over all tensors of two equal structures."""
    squares, count = 0.0, 0
    for x, y in zip(tree_leaves(list(a)), tree_leaves(list(b)), strict=True):
        squares += torch.sum((x.double() - y.double()) ** 2).item()
        count += x.numel()
    return math.sqrt(squares / max(count, 1))
