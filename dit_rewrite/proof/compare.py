"""Compare two runs: bit for bit, and by their distance from float64."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_rewrite.torch_compat import tree_leaves


@dataclass(frozen=True)
class Difference:
    """The first difference of two runs: the node whose value differs, the step, and the comparison that found it."""

    node: str
    step: int
    what: str

    def __str__(self) -> str:
        return f"at {self.node}, step {self.step} ({self.what})"


@dataclass
class Check:
    """The result of a comparison. ``exact``: equal bit for bit. ``within``: exact, or different only by rounding."""

    exact: bool = True
    within: bool = True
    max_abs_error: float = 0.0
    first_difference: Difference | None = None

    def compare(self, ours: Tensor, theirs: Tensor, where: Difference) -> bool:
        """Record whether two tensors are equal bit for bit (NaN equals NaN). Any difference counts as a failure."""
        if equal(ours, theirs):
            return True
        self.fail(where, max_abs_error(ours, theirs))
        return False

    def fail(self, where: Difference, error: float = math.inf) -> None:
        """Record a difference that is not due to rounding."""
        self.exact = self.within = False
        self.max_abs_error = max(self.max_abs_error, error)
        self.first_difference = self.first_difference or where

    def __str__(self) -> str:
        return "exact" if self.exact else "within rounding" if self.within else "WRONG"


def equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have equal dtypes, shapes and elements (NaN equals NaN)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def max_abs_error(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference, or inf if the shapes differ or an element is not finite in only one."""
    if a.shape != b.shape:
        return math.inf
    error = (a.double() - b.double()).abs().max().item()
    return math.inf if math.isnan(error) else error


def rms(a: Iterable[object], b: Iterable[object]) -> float:
    """Return the root mean square difference over all tensors of two equal structures."""
    squares, count = 0.0, 0
    for x, y in zip(tree_leaves(list(a)), tree_leaves(list(b)), strict=True):
        squares += torch.sum((x.double() - y.double()) ** 2).item()
        count += x.numel()
    return math.sqrt(squares / max(count, 1))
