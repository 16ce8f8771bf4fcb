"""Policies that change attention by a schedule, a model with one attention, and the outputs of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from sympy import Eq, Or
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dit_rewrite
from dit_rewrite import Policy, Reuse, Rule, ShareGuidance, Where, WindowResidual
from dit_rewrite.guards import step
from dit_rewrite.module import twin
from dit_rewrite.policy.strategies import Strategy
from examples.stdit import sincos
from tests.helpers import tiny
from tests.helpers.drawn import prepare
from tests.helpers.models import output

ATTENTION = ("attention", "parallel")
TOLERANCE = 1e-5  # of the largest element: roundings of fp32


def scheduled(schedule: str, window: WindowResidual, half: int, kinds: tuple[str, ...] = ATTENTION) -> Policy:
    """The policy that follows a schedule of `Paper`."""
    halves: tuple[Literal["first"], Literal["second"]] = ("first", "second")
    share = ShareGuidance(halves[half])
    do: dict[str, Strategy | tuple[Strategy, ...]] = {"A": Reuse(), "W": window, "S": share, "X": (window, share)}
    at = {letter: [i for i, other in enumerate(schedule) if other == letter] for letter in do}
    return Policy(tuple(Rule(Or(*(Eq(step, i) for i in at[x])), do[x], Where(kinds)) for x in do if at[x]))


def run(model: nn.Module, inputs: Sequence[dict[str, Any]], policy: Policy, lowering: str) -> list[Tensor]:
    """The outputs of the rewritten model at each step of an explicit trajectory."""
    compiled = dit_rewrite.compile(twin(model), policy, backend="aot_eager", lowering=lowering)
    with torch.no_grad(), compiled.trajectory(len(inputs)):
        found = [output(compiled(**arguments)).clone() for arguments in inputs]
    assert (compiled.stats().misses, compiled.stats().late_variants) == ({}, 0)
    return found


def plain(model: nn.Module, inputs: Sequence[dict[str, Any]]) -> list[Tensor]:
    """The outputs of the untouched model."""
    with torch.no_grad():
        return [output(model(**arguments)).clone() for arguments in inputs]


def apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """The largest difference at each step, relative to the largest element."""
    pairs = zip(found, expected, strict=True)
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]


QUARTER = WindowResidual(0.25)


class Ops(TorchDispatchMode):
    """Records each call of one of our ops that replaces attention, with its batch size."""

    def __init__(self, seen: list[tuple[str, int]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dit_rewrite":
            self.seen.append((func._opname, args[0].shape[0]))
        return func(*args, **(kwargs or {}))


def ops_of(model: nn.Module, inputs: Sequence[dict[str, Any]], policy: Policy) -> list[dict[tuple[str, int], int]]:
    """How often each of our ops is called at each step, with its batch size."""
    seen: list[tuple[str, int]] = []

    def backend(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        def noting(*args: Any) -> Any:
            with Ops(seen):
                return gm(*args)

        return noting

    compiled = dit_rewrite.compile(twin(model), policy, backend=backend)
    found = []
    with torch.no_grad(), compiled.trajectory(len(inputs)):
        for arguments in inputs:
            seen.clear()
            compiled(**arguments)
            found.append(dict(Counter(seen)))
    return found


class Small(nn.Module):
    """One self-attention with two heads of 16 channels, over any number of tokens and samples."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.embed, self.qkv, self.out, self.head = (
            nn.Linear(*sizes) for sizes in ((4, 32), (32, 96), (32, 32), (32, 4))
        )
        prepare(self, torch.float32)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = self.embed(hidden_states) + 0.1 * sincos(timestep, 32).to(hidden_states.dtype)[:, None]
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.head(x + self.out(attended.transpose(1, 2).flatten(2)))


def small_calls(steps: int, batch: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """The first of 15 steps of a trajectory of eight tokens."""
    calls = tiny.calls(15, seed)[:steps]
    return [{k: torch.cat([c[k], c[k][:1]])[:batch] for k in ("hidden_states", "timestep")} for c in calls]
