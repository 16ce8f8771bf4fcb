"""The decisions of a policy on the tiny denoiser, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dit_rewrite.policy.rules import Policy
from tests.helpers import tiny


def decided(policy: Policy, steps: int, model: nn.Module | None = None) -> dict[str, str]:
    """Return for each guarded site a letter per step: C computed, R reused or forecast. The trajectory is explicit."""
    compiled = tiny.rewritten(tiny.build() if model is None else model, policy)
    with compiled.trajectory(steps):
        tiny.outputs(compiled, tiny.calls(steps))
    return by_site([decision.strategies for decision in compiled.stats().decisions])


def by_site(rows: list[Mapping[str, str]] | list[dict[str, str]]) -> dict[str, str]:
    """Return the letters by site."""
    return {name: "".join("C" if row[name] == "compute" else "R" for row in rows) for name in rows[0]}


def the_row(found: Mapping[str, Any]) -> str:
    """Return the letters of all sites, which must be equal."""
    (did,) = set(found.values())
    return str(did)
