"""Runs step by step: the decisions of a policy on the tiny denoiser, and streams that are called in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_rewrite.module import RewrittenModule
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


def interleaved(
    model: RewrittenModule, streams: Mapping[str, Sequence[dict[str, Any]]], keep: Callable[[Any], Tensor]
) -> list[Tensor]:
    """Return what `keep` makes of each output: at each step, the streams are called in turn by their names."""
    found, steps = [], list(zip(*streams.values(), strict=True))
    with torch.no_grad(), model.trajectory(len(steps)):
        for step in steps:
            for name, arguments in zip(streams, step, strict=True):
                with model.cache_context(name):
                    found.append(keep(model(**arguments)))
    return found
