"""The public face: `compile`, and `restore`, which undoes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import Backend as LoweringBackend
from dit_rewrite.compiler.lowering import Lowering
from dit_rewrite.errors import NotAModule, PlanMismatch
from dit_rewrite.module import RewrittenModule, attach, detach, unwrapped
from dit_rewrite.policies import as_policy
from dit_rewrite.policy.plan import fingerprint
from dit_rewrite.policy.rules import Policy
from dit_rewrite.report.explain import Dump

__all__ = ["RewrittenModule", "compile", "restore"]


def compile(
    model: Any,
    policy: Policy | str,
    *,
    backend: LoweringBackend = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    lowering: str = "auto",
    max_variants: int = 8,
    dump: str | Path | None = None,
    hoist: bool = True,
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
    are more, or where a guard measures the call that it decides. With `hoist`, values that depend on the conditioning
    alone are computed once per trajectory, which is exact. `dump` names a folder that gets every pass's graph and their
    differences. `cache_limit` bounds the bytes that the streams of one trajectory hold together; by default it is half
    of the memory of the model's device.

    The model is compiled at its first call, for inference only. Raises NotAModule for an object that is no model,
    BadParameter for other arguments that do not fit, PlanMismatch for a policy that was searched for another model.
    """
    if is_pipeline(model):
        from dit_rewrite.enable import enable

        lowered: dict[str, Any] = {"backend": backend, "mode": mode, "options": options, "lowering": lowering}
        captured: dict[str, Any] = {"fullgraph": fullgraph, "dynamic": dynamic, "hoist": hoist, "dump": dump}
        return enable(model, policy, **lowered, **captured, max_variants=max_variants, cache_limit=cache_limit)
    model = unwrapped(model)
    if not isinstance(model, torch.nn.Module):
        raise NotAModule(model)
    policy = as_policy(policy)
    if policy.made_for is not None and fingerprint(model) != policy.made_for.model:
        raise PlanMismatch(f"{policy} was made for another model.", "Search a plan for this one, in its dtype.")
    lower = Lowering.of(backend, mode, options, lowering, max_variants)
    observe = Dump(Path(dump)).write if dump is not None else None
    made = Backend(model, policy, lower, observe=observe, hoist=hoist, cache_limit=cache_limit)
    return attach(model, made, fullgraph, dynamic)


def restore(model: Any) -> Any:
    """Undo `compile` on a model, or `enable` on a pipeline; returns the same object."""
    if is_pipeline(model):
        from dit_rewrite.enable import disable

        return disable(model)
    model = unwrapped(model)
    if not isinstance(model, torch.nn.Module):
        raise NotAModule(model)
    return detach(model)


def is_pipeline(model: object) -> bool:
    """Whether an object is a pipeline: callable, with named components, and no module itself."""
    return callable(model) and hasattr(model, "components") and not isinstance(model, torch.nn.Module | type)
