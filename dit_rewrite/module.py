"""The module that `compile` returns: the user's object with a rewritten call.

As in `torch.nn.Module.compile`, only the object's `_compiled_call_impl` is set, and its class stays the same. So code
that compares classes, such as diffusers' `from_pipe`, `isinstance`, `state_dict`, `save_pretrained`, hooks and LoRA
adapters work as before. Copies and pickles are not rewritten.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import isolated
from dit_rewrite.compiler.rewritten import Rewritten
from dit_rewrite.errors import (
    DitRewriteError,
    GradientsNeeded,
    MissReason,
    NoiseUnknown,
    NotCaptured,
    NotRewritten,
    PolicyForOtherScheduler,
    PolicyForOtherSteps,
    TrajectoryReason,
)
from dit_rewrite.passes.capture.capture import one_graph
from dit_rewrite.passes.guards.symbols import reads_noise
from dit_rewrite.policy.plan import describe_scheduler
from dit_rewrite.report.explain import Report
from dit_rewrite.report.idle import idle_reason, left_out
from dit_rewrite.report.no_sites import why_no_sites
from dit_rewrite.report.prediction import predict_model
from dit_rewrite.runtime.clock import Clock, Named
from dit_rewrite.runtime.hooks import HookedCalls
from dit_rewrite.runtime.inputs import Reader
from dit_rewrite.runtime.stats import Stats, TimedCall
from dit_rewrite.runtime.trajectory import Trajectory
from dit_rewrite.torch_compat import (
    BackendCompilerFailed,
    OptimizedModule,
    compiled_by,
    compiled_call,
    set_compiled_call,
    tree_leaves,
)

_STATE = "_dit_rewrite"  # the attribute of a rewritten module with its Rewrite
Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Rewrite:
    """The state that `compile` adds to a module. ``compiled_before`` is the call that `Module.compile` had set,
    ``checked`` the number of captured graphs against which the policy was checked, -1 before the first call."""

    backend: Backend
    calls: HookedCalls
    reader: Reader
    compiled_before: Any = None
    checked: int = -1


class _IsRewritten(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, nn.Module) and _STATE in instance.__dict__  # pipelines have such a state too


class RewrittenModule(nn.Module, metaclass=_IsRewritten):
    """The methods that `compile` adds to a module. `isinstance` returns whether a module is rewritten."""

    _backend: Backend

    @contextlib.contextmanager
    def trajectory(self, num_steps: int | None = None, scheduler: Any = None) -> Iterator[None]:
        """Open an explicit trajectory: the calls inside belong to one run of the sampler.

        The step and the noise of each call are read from `scheduler`. Its timesteps are read at the first call, so they
        may be set inside the context. Only without a scheduler is `num_steps` needed. A call whose timestep goes back
        begins a new trajectory. Raises BadTrajectory inside another trajectory or for invalid arguments, and
        NoiseUnknown if the policy needs the SNR and there is no scheduler.
        """
        clock = Clock(num_steps, scheduler, noise=needs_noise(self))
        with inside(self, clock):
            yield

    @contextlib.contextmanager
    def cache_context(self, name: str, **fields: Any) -> Iterator[None]:
        """Name the stream ("cond", "uncond", …) of the calls inside, as diffusers' pipelines do.

        Of the `fields` of diffusers' CacheContext, `step_index` (from 0), `sigma`, `num_inference_steps` and
        `timestep` are used; others are ignored. diffusers' hooks on the model receive all fields.
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

    def explain(self, num_steps: int | None = None, scheduler: Any = None) -> Report:
        """Return a report of the sites and how they were rewritten. Raises NotCaptured before the first call.

        It predicts the costs of `num_steps` steps, or of the steps of a `scheduler` whose timesteps are set. By default
        the number of steps is that of the trajectory in which the model was captured, if it was explicit. The first
        prediction measures the machine in a few seconds, and writes the result to the user's cache folder.
        """
        backend = self._backend
        if not backend.rewritten:
            raise NotCaptured("explain()")
        ran, streams = Counter(backend.session.ran), backend.session.num_streams
        predict = functools.partial(predict_model, backend, self, backend.policy, num_steps, scheduler)
        released = backend.weights.bytes if backend.release else None
        rewritten = tuple(backend.rewritten)
        return Report(backend.policy, rewritten, ran, max(streams, 1), predict, self.stats(), released)

    def stats(self) -> Stats:
        """Return a copy of the statistics so far. The copy shares the rows of decisions."""
        backend = self._backend
        return backend.stats.copy(**backend.sizes())

    def reset(self) -> None:
        """Discard all trajectories of the calling thread and their cached values."""
        self._backend.session.forget()
        self._backend.stats.begin(TrajectoryReason.RESET)


def _call(model: nn.Module, rewrite: Rewrite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one call of the denoiser: a step of one stream of the current trajectory.

    Raises GradientsNeeded if autograd would record the call, and NoSites if the model has no site.
    """
    _refuse_gradients(model, args, kwargs)
    session = rewrite.backend.session
    call = session.begin(rewrite.reader.read(args, kwargs))
    try:
        with one_graph(call.inputs.number), rewrite.backend.capturing():
            output = rewrite.calls.current()(*args, **kwargs)
    except BaseException as error:
        session.abandon(call)
        if isinstance(error, BackendCompilerFailed) and isinstance(error.inner_exception, DitRewriteError):
            raise error.inner_exception from None
        raise
    session.end(call)
    if rewrite.checked != len(rewrite.backend.rewritten):
        if rewrite.checked >= 0:  # at the end of the first call, `first_call` does
            gc.collect()
        rewrite.checked = len(rewrite.backend.rewritten)
        _check_policy(model, rewrite.backend, call.trajectory)
    return output


def _timed(model: nn.Module, rewrite: Rewrite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one call and record its time, which waits for the device before and after it."""
    backend = rewrite.backend
    stats, graphs = backend.stats, len(backend.rewritten)
    variants, reused = stats.variants, stats.reused
    wait_for_device()
    began = time.perf_counter()
    output = _call(model, rewrite, args, kwargs)
    wait_for_device()
    seconds = time.perf_counter() - began
    compiles = (variants, graphs) != (stats.variants, len(backend.rewritten))
    stats.time(TimedCall(backend.session.known, seconds, stats.reused - reused, compiles))
    return output


def wait_for_device() -> None:
    """Wait until a GPU, if there is one, has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _refuse_gradients(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if not torch.is_grad_enabled():
        return
    if any(p.requires_grad for p in model.parameters()):
        raise GradientsNeeded("a parameter of the model")
    if any(isinstance(a, torch.Tensor) and a.requires_grad for a in tree_leaves((args, dict(kwargs)))):
        raise GradientsNeeded("an input")


def _check_policy(model: nn.Module, backend: Backend, trajectory: Trajectory) -> None:
    """Warn or raise after a call that captured graphs if the policy has no effect on them."""
    if not backend.policy.rules:
        return
    name = type(model).__name__
    if not backend.rewritten:
        warnings.warn(f"{backend.policy} has no effect on {name}: {MissReason.NOT_CAPTURED}", stacklevel=4)
        return
    if not any(r.found.sites for r in backend.rewritten):
        raise why_no_sites(model, backend.rewritten, backend.breaks)
    present = [backend.rewritten[i] for i in set(backend.session.ran)]
    if backend.force:
        return
    if not any(r.found.sites for r in present):
        warnings.warn(str(why_no_sites(model, present, backend.breaks)), stacklevel=4)
    elif not any(r.reached for r in present):
        wheres = [rule.where for rule in backend.policy.rules if rule.parts]
        hint = left_out(wheres, present)
        warnings.warn(f"{backend.policy} reaches no site of {name} in its present graphs{hint}", stacklevel=4)
    else:
        _warn_of_idleness(name, backend, present, trajectory)


def _warn_of_idleness(name: str, backend: Backend, present: Sequence[Rewritten], trajectory: Trajectory) -> None:
    schedule = None if trajectory.clock is None else trajectory.clock.schedule
    noise = None if schedule is None else trajectory.noise  # without a schedule, a cache_context may provide it
    reason = idle_reason(present, trajectory.num_steps, noise)
    if reason is not None:
        warnings.warn(f"{backend.policy} reuses nothing of {name}: {reason}", stacklevel=5)


def needs_noise(model: nn.Module) -> bool:
    """Return whether the policy of a rewritten module needs noise levels."""
    return reads_noise(backend_of(model).policy.reads)


@contextlib.contextmanager
def inside(model: nn.Module, clock: Clock, of_run: bool = False) -> Iterator[None]:
    """Open an explicit trajectory of a rewritten module with the given clock; see `Session.enter`. Raises NoiseUnknown,
    PolicyForOtherSteps, PolicyForOtherScheduler or BadTrajectory."""
    backend = backend_of(model)
    policy = backend.policy
    if clock.scheduler is None and "snr" in policy.reads:
        raise NoiseUnknown(policy, clock.scheduler)
    if policy.made_for is not None and clock.explicit_num_steps not in (None, policy.made_for.steps):
        raise PolicyForOtherSteps(policy, policy.made_for.steps, clock.explicit_num_steps)
    made = None if policy.made_for is None or clock.scheduler is None else policy.made_for.scheduler
    if made is not None and made != (found := describe_scheduler(clock.scheduler)):
        raise PolicyForOtherScheduler(policy, made, found)
    trajectory = backend.session.enter(clock, of_run)
    try:
        yield
    finally:
        backend.session.leave(trajectory)


def backend_of(model: nn.Module) -> Backend:
    """Return the backend of a rewritten module. Raises NotRewritten for other modules."""
    if not isinstance(model, RewrittenModule):
        raise NotRewritten(type(model).__name__)
    return model._backend


def attach(model: nn.Module, backend: Backend, fullgraph: bool = False, dynamic: bool | None = None) -> RewrittenModule:
    """Rewrite a module in place so that `backend` compiles its graphs. An existing rewrite is replaced."""
    detach(model)
    traced = _traceable(model)
    # partial: Dynamo compares backends by identity, and may share code between calls with one of them
    calls = HookedCalls(model, lambda: isolated(traced, functools.partial(backend), fullgraph, dynamic), traced)
    model.__dict__[_STATE] = rewrite = Rewrite(backend, calls, Reader(model.forward), compiled_call(model))
    model.__dict__["_backend"] = backend
    for name in _METHODS:
        model.__dict__[name] = types.MethodType(vars(RewrittenModule)[name], model)
    model.__dict__["__getstate__"] = lambda: _plain_state(model)
    call = _timed if backend.timing else _call
    set_compiled_call(model, lambda *args, **kwargs: call(model, rewrite, args, kwargs))
    return model  # type: ignore[return-value]  # it has the methods of RewrittenModule now


def _traceable(self: nn.Module) -> Callable[..., Any]:
    """Return the original call of a module, for Dynamo to trace.

    Dynamo does not trace frames in torch's own files, so the call of a torch class such as Sequential is wrapped in a
    frame of this file. The parameter is called `self` because Dynamo derives module names from it.
    """
    if not getattr(self.forward, "__module__", "").startswith("torch."):
        return self._call_impl
    return lambda *args, **kwargs: self._call_impl(*args, **kwargs)


def detach(model: Module) -> Module:
    """Undo `attach`, and close the backend. A module that is not rewritten is returned unchanged."""
    rewrite = model.__dict__.get(_STATE)
    if rewrite is not None:
        rewrite.backend.close()
        for name in _ATTRIBUTES:
            del model.__dict__[name]
        set_compiled_call(model, rewrite.compiled_before)
    return model


_METHODS = ("trajectory", "cache_context", "explain", "stats", "reset")
_ATTRIBUTES = (_STATE, "_backend", "__getstate__", *_METHODS)


def _plain_state(model: nn.Module) -> dict[str, Any]:
    """Return the state for copies and pickles of a rewritten module, without the rewrite and compiled code."""
    state = type(model).__getstate__(model) if hasattr(type(model), "__getstate__") else dict(model.__dict__)
    return {k: v for k, v in state.items() if k not in _ATTRIBUTES and k != "_compiled_call_impl"}


def unwrapped(model: Any) -> Any:
    """Return the module inside wrappers of `torch.compile`."""
    while isinstance(model, OptimizedModule):
        model = compiled_by(model)
    return model


def twin(model: Module) -> Module:
    """Return a copy of a module that is not rewritten, and shares its parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(unwrapped(model), {id(tensor): tensor for tensor in shared})
