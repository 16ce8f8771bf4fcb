"""Run one trajectory of a rewritten model, for the commands that tell about it."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dit_rewrite import policies
from dit_rewrite.cli.progress import progress
from dit_rewrite.cli.verify import Loaded, load
from dit_rewrite.compile import RewrittenModule, compile


def observed(arguments: argparse.Namespace, runs: int = 1, timing: bool = False) -> RewrittenModule:
    """Load the model of a command, rewrite it with the policy, and run its trajectory `runs` times.

    Raises BadModel, the errors of `generate` for pipelines, and those of `compile`.
    """
    policy = policies.parse(arguments.policy)
    loaded = load(arguments)
    model: RewrittenModule = compile(loaded.model, policy, backend=arguments.backend, timing=timing)
    with torch.no_grad(), progress("sampling", runs * len(loaded.calls)) as tick:
        for _ in range(runs):
            with model.trajectory(None if loaded.scheduler else arguments.steps, loaded.scheduler):
                _replay(model, loaded, tick)
    return model


def _replay(model: Any, loaded: Loaded, tick: Callable[[], None]) -> None:
    streams: Sequence[str | None] = loaded.streams or [None] * len(loaded.calls)
    for stream, call in zip(streams, loaded.calls, strict=True):
        with contextlib.nullcontext() if stream is None else model.cache_context(stream):
            model(**call)
        tick()
