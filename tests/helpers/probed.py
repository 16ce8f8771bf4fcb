"""The values and the inputs of a traced toy, by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from tests.helpers.tracing import Traced
from tests.references.dictionary import Dictionary


def values_of(of: Traced, gm: fx.GraphModule, step: int = 0) -> dict[str, Any]:
    """Return the value of each node of a graph at a step."""
    run = Dictionary(gm, {})
    run.run(*of.arguments[step])
    return run.seen


def of_input(of: Traced, number: int) -> int:
    """Return the position of a toy's input among the inputs of its graph."""
    return [node.name for node in of.captured.placeholders].index(f"inputs_{number}")


def weights(of: Traced) -> dict[str, Tensor]:
    return {node.name: value for node, value in zip(of.captured.placeholders, of.arguments[0], strict=True)}
