"""The public face: `compile`, and the module that it returns."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._pytree import tree_leaves

from dit_rewrite.backend import Backend
from dit_rewrite.errors import (
    DitRewriteError,
    GradientsNeeded,
    NoiseUnknown,
    NoSites,
    NotCaptured,
    PlanMismatch,
    Reason,
)
from dit_rewrite.lowering import Backend as LoweringBackend
from dit_rewrite.lowering import Lowering
from dit_rewrite.passes.capture import one_graph
from dit_rewrite.passes.guards import NOISE
from dit_rewrite.plan import fingerprint
from dit_rewrite.policy import Policy
from dit_rewrite.report import Dump, Report
from dit_rewrite.runtime.inputs import Reader
from dit_rewrite.runtime.stats import Stats
from dit_rewrite.runtime.trajectory import Named, Told


class RewrittenModule(OptimizedModule):
    """A denoiser compiled by `compile`. Shares the original's parameters and forwards its attributes."""

    def __init__(self, model: torch.nn.Module, context: Any, backend: Backend) -> None:
        object.__setattr__(self, "_orig_mod", model)
        super().__init__(model, context)
        self._torchdynamo_orig_callable = model.forward
        object.__setattr__(self, "_backend", backend)
        object.__setattr__(self, "_reader", Reader(model.forward))
        object.__setattr__(self, "_checked", False)

    def __reduce__(self) -> Any:
        raise TypeError("A rewritten module holds compiled code. Pickle the original model, and compile it again.")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the denoiser: a step of one stream of the present trajectory. For inference only.

        Raises GradientsNeeded where autograd would record it, NoSites where the policy has nothing to work on.
        """
        self._refuse_gradients(args, kwargs)
        session = self._backend.session
        call = session.begin(self._reader.read(args, kwargs))
        try:
            with one_graph():
                output = super().__call__(*args, **kwargs)
        except BaseException as error:
            session.abandon(call)
            if isinstance(error, BackendCompilerFailed) and isinstance(error.inner_exception, DitRewriteError):
                raise error.inner_exception from None
            raise
        session.end(call)
        if not self._checked:
            self._check_policy()
            object.__setattr__(self, "_checked", True)
        return output

    def _refuse_gradients(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        if any(p.requires_grad for p in self._orig_mod.parameters()):
            raise GradientsNeeded("a parameter of the model")
        if any(isinstance(a, torch.Tensor) and a.requires_grad for a in tree_leaves((args, dict(kwargs)))):
            raise GradientsNeeded("an input")

    def _check_policy(self) -> None:
        """After the first call all graphs are known: a policy that can do nothing is not passed over in silence."""
        backend = self._backend
        if not backend.policy.rules:
            return
        if not any(r.found.sites for r in backend.rewritten):
            refused = [f"{p.path or p.node}: {p.reason}" for r in backend.rewritten for p in r.found.refused]
            raise NoSites(type(self._orig_mod).__name__, refused)
        if not backend.force and not any(r.reached for r in backend.rewritten):
            warnings.warn(f"{backend.policy} reaches no site of {type(self._orig_mod).__name__}", stacklevel=4)

    @contextlib.contextmanager
    def trajectory(self, num_steps: int | None = None, scheduler: Any = None) -> Iterator[None]:
        """Tell that the calls inside are one run of the sampler, of `num_steps` steps.

        Where only `scheduler` is given, ``len(scheduler.timesteps)`` is read at the first call. In a told trajectory
        nothing is read from the device. Raises BadTrajectory inside another trajectory, or for num_steps < 1, and
        NoiseUnknown where the policy needs the SNR and there is no scheduler to say it.
        """
        session, policy = self._backend.session, self._backend.policy
        if scheduler is None and "snr" in policy.mentions:
            raise NoiseUnknown(policy, scheduler)
        if policy.made_for is not None and num_steps not in (None, policy.made_for.steps):
            raise PlanMismatch(
                f"{policy} was made for {policy.made_for.steps} steps, not {num_steps}.", "Search again."
            )
        session.tell(Told(num_steps, scheduler, noise=bool(policy.mentions & NOISE)))
        try:
            yield
        finally:
            session.told = None
            session.forget()

    @contextlib.contextmanager
    def cache_context(self, name: str, step_index: int | None = None, sigma: float | None = None) -> Iterator[None]:
        """Name the stream ("cond", "uncond", …) of the calls inside, as diffusers' pipelines do.

        `step_index` (from 0) and `sigma`, where given, are the step's.
        """
        session = self._backend.session
        before, session.named = session.named, Named(name, step_index, sigma)
        try:
            yield
        finally:
            session.named = before

    def explain(self) -> Report:
        """What was found and rewritten. Raises NotCaptured before the first call."""
        if not self._backend.rewritten:
            raise NotCaptured("explain()")
        backend = self._backend
        return Report(backend.policy, tuple(backend.rewritten), Counter(backend.session.ran))

    def stats(self) -> Stats:
        """A copy of the counts so far; its rows of decisions are shared."""
        stats = self._backend.stats
        held = self._backend.session.cache_bytes()
        return replace(stats, cache_bytes=held, misses=stats.misses.copy(), trajectories=stats.trajectories.copy())

    def reset(self) -> None:
        """Forget all trajectories and their cached values (of the calling thread)."""
        self._backend.session.forget()
        self._backend.stats.trajectories[Reason.RESET] += 1


def compile(
    model: torch.nn.Module,
    policy: Policy,
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
) -> RewrittenModule:
    """Compile a diffusion transformer so that its residual branches are computed or reused as `policy` says.

    `backend` lowers the rewritten graphs: "inductor" (with torch.compile's `mode` and `options`), "aot_eager" (runs
    them as they are) or a callable ``(graph module, fake inputs) -> callable``. `fullgraph=True` makes a graph break an
    error, `dynamic` is torch.compile's.

    `lowering` is "variants" (a graph for each row of decisions), "segments" (a piece for each block, identical blocks
    compiled once, decisions between them) or "auto": variants up to `max_variants` of them, and segments where there
    are more, or where a guard measures the call that it decides. With `hoist`, what depends on the conditioning alone
    is computed once per trajectory, which is exact. `dump` names a folder that gets every pass's graph and their
    differences.

    The model is compiled at its first call, for inference only. Raises BadParameter for arguments that do not fit.
    """
    if policy.made_for is not None and fingerprint(model) != policy.made_for.model:
        raise PlanMismatch(f"{policy} was made for another model.", "Search a plan for this one, in its dtype.")
    lower = Lowering.of(backend, mode, options, lowering, max_variants)
    observe = Dump(Path(dump)).write if dump is not None else None
    return wrap(model, Backend(model, policy, lower, observe=observe, hoist=hoist), fullgraph, dynamic)


def wrap(
    model: torch.nn.Module, backend: Backend, fullgraph: bool = False, dynamic: bool | None = None
) -> RewrittenModule:
    """A model whose captured graphs go through `backend`."""
    return RewrittenModule(model, isolated(model, backend, fullgraph, dynamic).dynamo_ctx, backend)


def isolated(
    model: torch.nn.Module, backend: LoweringBackend, fullgraph: bool = False, dynamic: bool | None = None
) -> OptimizedModule:
    """torch.compile with recompiles counted for this model alone, where torch can do that (2.13).

    Otherwise every compiled module of one class shares a budget of 8, and then runs eagerly in silence.
    """
    separate = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    more: dict[str, Any] = {"isolate_recompiles": True} if separate else {}
    compiled: Any = torch.compile(model, backend=backend, fullgraph=fullgraph, dynamic=dynamic, **more)
    return compiled
