"""Compile one denoiser, and undo it. `compile` and `enable` call these functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import InnerBackend, Lowering
from dit_rewrite.compiler.request import Tables
from dit_rewrite.errors import NotAModule, PolicyForOtherModel
from dit_rewrite.module import attach, detach, unwrapped
from dit_rewrite.policies import as_policy
from dit_rewrite.policy.plan import fingerprint
from dit_rewrite.policy.rules import Policy
from dit_rewrite.report.dump import Dump


def compile_denoiser(
    model: Any,
    policy: Policy | str,
    *,
    backend: InnerBackend = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    lowering: str = "auto",
    max_variants: int = 8,
    dump: str | Path | None = None,
    disable_passes: Collection[str] = (),
    memory_budget: int | None = None,
    timing: bool = False,
    tables: Tables = "reuse",
    release: bool = False,
    cuda_graphs: bool = False,
) -> Any:
    """Compile a module; arguments and errors are those of `compile`."""
    model = _module(model)
    policy = as_policy(policy)
    if policy.made_for is not None and fingerprint(model) != policy.made_for.model:
        raise PolicyForOtherModel(policy)
    lower = Lowering.of(backend, mode, options, lowering, max_variants)
    dumps = Dump(Path(dump)) if dump is not None else None
    made = Backend(
        model,
        policy,
        lower,
        watcher=dumps,
        disable_passes=disable_passes,
        memory_budget=memory_budget,
        timing=timing,
        tables=tables,
        release=release,
        cuda_graphs=cuda_graphs,
    )
    return attach(model, made, fullgraph, dynamic)


def restore_denoiser(model: Any) -> Any:
    """Undo `compile_denoiser`. A module that is not rewritten is returned unchanged."""
    return detach(_module(model))


def _module(model: Any) -> torch.nn.Module:
    model = unwrapped(model)
    if not isinstance(model, torch.nn.Module):
        raise NotAModule(model)
    return model
