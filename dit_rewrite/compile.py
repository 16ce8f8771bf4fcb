"""The public face: `compile`, and `restore`, which undoes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from dit_rewrite.compiler.lowering import InnerBackend
from dit_rewrite.denoiser import compile_denoiser, restore_denoiser
from dit_rewrite.enable import disable, enable
from dit_rewrite.module import RewrittenModule
from dit_rewrite.policy.rules import Policy

__all__ = ["RewrittenModule", "compile", "restore"]


def compile(
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
    cache_limit: int | None = None,
) -> Any:
    """Compile a diffusion transformer so that its residual branches are computed or reused as `policy` says.

    Returns `model` itself, with the methods of RewrittenModule. Its copies are plain. Compiling again exchanges the
    policy, and `restore` undoes it. A model that was given to torch.compile is unwrapped. A diffusers pipeline goes to
    `enable`. `policy` may be text, such as ``"fora:interval=3"``.

    `backend` lowers the rewritten graphs: "inductor" (with torch.compile's `mode` and `options`), "aot_eager" (runs
    them as they are) or a callable ``(graph module, fake inputs) -> callable``. `fullgraph=True` makes a graph break an
    error, `dynamic` is torch.compile's.

    `lowering` is "variants" (a graph for each row of decisions), "segments" (a piece for each block, identical blocks
    compiled once, decisions between them) or "auto": variants up to `max_variants` of them, and segments where there
    are more, or where a guard measures the call that it decides. Values that depend on the conditioning alone are
    computed once per trajectory, which is exact; `disable_passes=("hoist",)` leaves that out. `dump` names a folder
    that gets every pass's graph and their differences. `cache_limit` bounds the bytes that the streams of one
    trajectory hold together; by default it is half of the memory of the model's device.

    The model is compiled at its first call, for inference only. Raises NotAModule for an object that is no model,
    BadArgument for other arguments that do not fit, PlanMismatch for a policy that was searched for another model.
    """
    given: dict[str, Any] = {
        "backend": backend,
        "mode": mode,
        "options": options,
        "fullgraph": fullgraph,
        "dynamic": dynamic,
        "lowering": lowering,
        "max_variants": max_variants,
        "dump": dump,
        "disable_passes": disable_passes,
        "cache_limit": cache_limit,
    }
    return enable(model, policy, **given) if is_pipeline(model) else compile_denoiser(model, policy, **given)


def restore(model: Any) -> Any:
    """Undo `compile` on a model, or `enable` on a pipeline; returns the same object."""
    return disable(model) if is_pipeline(model) else restore_denoiser(model)


def is_pipeline(model: object) -> bool:
    """Whether an object is a pipeline: callable, with named components, and no module itself."""
    return callable(model) and hasattr(model, "components") and not isinstance(model, torch.nn.Module | type)
