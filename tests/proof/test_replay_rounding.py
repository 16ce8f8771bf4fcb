"""How far lowered code may be from the float64 replay: rounding errors pass, wrong values fail."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_rewrite.proof import replay
from dit_rewrite.proof.compare import Check

EPS = 2.0**-23


def compared(monkeypatch: pytest.MonkeyPatch, **errors: tuple[float, float]) -> Check:
    """Compares tensors near 2.5; the lowered code and the interpreter are off by these relative roundings."""
    wide = {name: torch.full((4,), 2.5, dtype=torch.float64) for name in errors}
    ours: dict[str, Tensor] = {name: (wide[name] * (1 + a * EPS)).float() for name, (a, _) in errors.items()}
    theirs = {name: (wide[name] * (1 + b * EPS)).float() for name, (_, b) in errors.items()}
    monkeypatch.setattr(replay, "_found", lambda *_: ours)
    check, observation = Check(), SimpleNamespace(record=SimpleNamespace(step=1))
    graph: Any = None
    replay._compare(check, graph, observation, theirs, wide)  # type: ignore[arg-type]
    return check


def test_a_tensor_that_was_rounded_by_luck_hardly_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has the exact value; one or two roundings in the lowered code are no more than in other
    tensors."""
    check = compared(monkeypatch, gates=(2, 0), stream=(3, 2), output=(2, 3))
    assert check.within and not check.exact
    assert check.first_difference is not None and check.first_difference.node == "gates"


@pytest.mark.parametrize(
    ("errors", "node"),
    [
        ({"gates": (40, 0), "stream": (3, 2), "output": (2, 3)}, "gates"),
        ({"gates": (2, 2), "stream": (40, 2), "output": (2, 3)}, "stream"),
        ({"gates": (2, 2), "stream": (40, 2), "output": (1e6, 1e6)}, "stream"),
        ({"gates": (2, 0)}, "gates"),
    ],
    ids=["exact here", "wrong here", "another route elsewhere", "nothing to compare with"],
)
def test_what_is_wrong_stays_wrong(monkeypatch: pytest.MonkeyPatch, errors: dict[str, Any], node: str) -> None:
    """A wrong value fails, even beside a tensor that float64 computed in another way."""
    check = compared(monkeypatch, **errors)
    assert not check.within
    assert check.first_difference is not None and check.first_difference.node == node
