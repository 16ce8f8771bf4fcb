"""The module that `compile` returns: the user's own object, with another call.

As `torch.nn.Module.compile` does, the object's `_compiled_call_impl` is set, and its class stays what it is: code that
asks for the exact class, as diffusers' `from_pipe` does, `isinstance`, `state_dict`, `save_pretrained`, hooks and LoRA
adapters work as before. Copies and pickles are of the plain module.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from dit_rewrite.compiler.backend import Backend, Rewritten
from dit_rewrite.compiler.lowering import isolated
from dit_rewrite.errors import (
    DitRewriteError,
    GradientsNeeded,
    MissReason,
    NoiseUnknown,
    NotCaptured,
    NotRewritten,
    PolicyForOtherSteps,
    TrajectoryReason,
)
from dit_rewrite.passes.capture.capture import one_graph
from dit_rewrite.passes.guards.symbols import reads_noise
from dit_rewrite.report.explain import Report
from dit_rewrite.report.idle import idle_reason, left_out
from dit_rewrite.report.no_sites import why_no_sites
from dit_rewrite.runtime.clock import Clock, Named
from dit_rewrite.runtime.inputs import Reader
from dit_rewrite.runtime.stats import Stats
from dit_rewrite.runtime.trajectory import Trajectory
from dit_rewrite.torch_compat import (
    BackendCompilerFailed,
    OptimizedModule,
    compiled_by,
    compiled_call,
    set_compiled_call,
    tree_leaves,
)

_STATE = "_dit_rewrite"  # the attribute of a rewritten module that holds its Rewrite
Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Rewrite:
    """What `compile` adds to a module. ``run`` is its compiled call, ``checked`` the graphs that the policy was checked
    against, -1 before the first call; ``compiled_before`` is what `Module.compile` had set."""

    backend: Backend
    run: Callable[..., Any]
    reader: Reader
    compiled_before: Any = None
    checked: int = -1


class _IsRewritten(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return _STATE in getattr(instance, "__dict__", ())


class RewrittenModule(nn.Module, metaclass=_IsRewritten):
    """The methods that a denoiser has once it was given to `compile`; `isinstance` tells whether it was."""

    _backend: Backend

    @contextlib.contextmanager
    def trajectory(self, num_steps: int | None = None, scheduler: Any = None) -> Iterator[None]:
        """Mark that the calls inside are one run of the sampler.

        `scheduler` says at which step each call is, and its noise; its timesteps are read at the first call, and may be
        set inside the context. `num_steps` is needed without one only. A call whose timestep goes back begins another
        trajectory. Raises BadTrajectory inside another trajectory or for arguments that do not fit, and NoiseUnknown
        where the policy needs the SNR and there is no scheduler to say it.
        """
        clock = Clock(num_steps, scheduler, noise=needs_noise(self))
        with inside(self, clock):
            yield

    @contextlib.contextmanager
    def cache_context(self, name: str, **fields: Any) -> Iterator[None]:
        """Name the stream ("cond", "uncond", …) of the calls inside, as diffusers' pipelines do.

        Of the `fields` of diffusers' CacheContext, `step_index` (from 0), `sigma`, `num_inference_steps` and
        `timestep` are read; others are left aside. A hook of diffusers that is on the model sees them all.
        """
        session = self._backend.session
        known = {field: value for field, value in fields.items() if field in Named.__dataclass_fields__}
        before, session.named = session.named, Named(name, **known)
        theirs = getattr(type(self), "cache_context", None)
        try:
            with theirs(self, name, **fields) if theirs is not None else contextlib.nullcontext():
                yield
        finally:
            session.named = before

    def explain(self) -> Report:
        """What was found and rewritten. Raises NotCaptured before the first call."""
        backend = self._backend
        if not backend.rewritten:
            raise NotCaptured("explain()")
        ran, streams = Counter(backend.session.ran), backend.session.num_streams
        return Report(backend.policy, tuple(backend.rewritten), ran, max(streams, 1))

    def stats(self) -> Stats:
        """A copy of the counts so far; its rows of decisions are shared."""
        backend = self._backend
        return backend.stats.copy(cache_bytes=backend.session.cache_bytes())

    def reset(self) -> None:
        """Forget all trajectories and their cached values (of the calling thread)."""
        self._backend.session.forget()
        self._backend.stats.begin(TrajectoryReason.RESET)


def _call(model: nn.Module, rewrite: Rewrite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call of the denoiser: a step of one stream of the present trajectory. For inference only.

    Raises GradientsNeeded where autograd would record it, NoSites where the policy has nothing to work on.
    """
    _refuse_gradients(model, args, kwargs)
    session = rewrite.backend.session
    call = session.begin(rewrite.reader.read(args, kwargs))
    try:
        with one_graph(call.inputs.number), rewrite.backend.capturing():
            output = rewrite.run(*args, **kwargs)
    except BaseException as error:
        session.abandon(call)
        if isinstance(error, BackendCompilerFailed) and isinstance(error.inner_exception, DitRewriteError):
            raise error.inner_exception from None
        raise
    session.end(call)
    if rewrite.checked != len(rewrite.backend.rewritten):
        rewrite.checked = len(rewrite.backend.rewritten)
        gc.collect()  # compiling leaves cycles that hold the call's inputs: these would seem to be kept by the caller
        _check_policy(model, rewrite.backend, call.trajectory)
    return output


def _refuse_gradients(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if not torch.is_grad_enabled():
        return
    if any(p.requires_grad for p in model.parameters()):
        raise GradientsNeeded("a parameter of the model")
    if any(isinstance(a, torch.Tensor) and a.requires_grad for a in tree_leaves((args, dict(kwargs)))):
        raise GradientsNeeded("an input")


def _check_policy(model: nn.Module, backend: Backend, trajectory: Trajectory) -> None:
    """After a call that captured graphs: a policy that can do nothing in them is not passed over in silence."""
    if not backend.policy.rules:
        return
    name = type(model).__name__
    if not backend.rewritten:
        warnings.warn(f"{backend.policy} can do nothing in {name}: {MissReason.NOT_CAPTURED}", stacklevel=4)
        return
    if not any(r.found.sites for r in backend.rewritten):
        raise why_no_sites(model, backend.rewritten, backend.breaks)
    present = [backend.rewritten[i] for i in set(backend.session.ran)]
    if backend.force:
        return
    if not any(r.found.sites for r in present):
        warnings.warn(str(why_no_sites(model, present, backend.breaks)), stacklevel=4)
    elif not any(r.reached for r in present):
        meant = [rule.where for rule in backend.policy.rules if rule.parts]
        hint = left_out(meant, present)
        warnings.warn(f"{backend.policy} reaches no site of {name} as it is now{hint}", stacklevel=4)
    else:
        _warn_of_idleness(name, backend, present, trajectory)


def _warn_of_idleness(name: str, backend: Backend, present: Sequence[Rewritten], trajectory: Trajectory) -> None:
    schedule = None if trajectory.clock is None else trajectory.clock.schedule
    noise = None if schedule is None else trajectory.noise  # without a schedule a cache_context may tell it
    reason = idle_reason(present, trajectory.num_steps, noise)
    if reason is not None:
        warnings.warn(f"{backend.policy} reuses nothing of {name}: {reason}", stacklevel=5)


def needs_noise(model: nn.Module) -> bool:
    """Whether the policy of a rewritten module reads noise levels."""
    return reads_noise(backend_of(model).policy.reads)


@contextlib.contextmanager
def inside(model: nn.Module, clock: Clock) -> Iterator[None]:
    """The calls of a rewritten module inside belong to trajectories of this clock."""
    backend = backend_of(model)
    policy = backend.policy
    if clock.scheduler is None and "snr" in policy.reads:
        raise NoiseUnknown(policy, clock.scheduler)
    if policy.made_for is not None and clock.explicit_num_steps not in (None, policy.made_for.steps):
        raise PolicyForOtherSteps(policy, policy.made_for.steps, clock.explicit_num_steps)
    backend.session.enter(clock)
    try:
        yield
    finally:
        backend.session.leave()


def backend_of(model: nn.Module) -> Backend:
    """The backend of a rewritten module. Raises NotRewritten for a plain one."""
    if not isinstance(model, RewrittenModule):
        raise NotRewritten(type(model).__name__)
    return model._backend


def attach(model: nn.Module, backend: Backend, fullgraph: bool = False, dynamic: bool | None = None) -> RewrittenModule:
    """Rewrite a module in place: its captured graphs go through `backend`. A rewrite that it has is exchanged."""
    detach(model)
    run = isolated(_traceable(model), backend, fullgraph, dynamic)
    rewrite = Rewrite(backend, run, Reader(model.forward), compiled_call(model))
    model.__dict__[_STATE] = rewrite
    model.__dict__["_backend"] = backend
    for name in _METHODS:
        model.__dict__[name] = types.MethodType(vars(RewrittenModule)[name], model)
    model.__dict__["__getstate__"] = lambda: _plain_state(model)
    set_compiled_call(model, lambda *args, **kwargs: _call(model, rewrite, args, kwargs))
    return model  # type: ignore[return-value]  # it has the methods now


def _traceable(self: nn.Module) -> Callable[..., Any]:
    """The plain call of a module, for Dynamo to trace.

    Dynamo starts at no frame of torch's own files, so a class of torch, as Sequential, gets a frame around its call.
    It names modules from `self` on.
    """
    if not getattr(self.forward, "__module__", "").startswith("torch."):
        return self._call_impl
    return lambda *args, **kwargs: self._call_impl(*args, **kwargs)


def detach(model: Module) -> Module:
    """Undo `attach`; a module without a rewrite stays as it is."""
    rewrite = model.__dict__.get(_STATE)
    if rewrite is not None:
        for name in _ATTRIBUTES:
            del model.__dict__[name]
        set_compiled_call(model, rewrite.compiled_before)
    return model


_METHODS = ("trajectory", "cache_context", "explain", "stats", "reset")
_ATTRIBUTES = (_STATE, "_backend", "__getstate__", *_METHODS)


def _plain_state(model: nn.Module) -> dict[str, Any]:
    """What a copy or pickle of a rewritten module holds: no compiled code."""
    state = type(model).__getstate__(model) if hasattr(type(model), "__getstate__") else dict(model.__dict__)
    return {k: v for k, v in state.items() if k not in _ATTRIBUTES and k != "_compiled_call_impl"}


def unwrapped(model: Any) -> Any:
    """The module under `torch.compile`."""
    while isinstance(model, OptimizedModule):
        model = compiled_by(model)
    return model


def twin(model: Module) -> Module:
    """A plain copy of a module that shares its parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(unwrapped(model), {id(tensor): tensor for tensor in shared})
