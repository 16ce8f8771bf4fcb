"""Make each call of a diffusers pipeline an explicit trajectory of its rewritten denoisers.

The pipeline stays the same object. Its class is replaced by a subclass of its class, as in torch's `fully_shard`.
"""

from __future__ import annotations

import contextlib
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

from torch import nn

from dit_rewrite.errors import (
    DecisionReason,
    MissReason,
    NoTransformer,
    Reason,
    StreamReason,
    UnreachedReason,
)
from dit_rewrite.module import RewrittenModule, backend_of, detach, inside, needs_noise, unwrapped
from dit_rewrite.runtime.clock import Clock
from dit_rewrite.runtime.stats import Stats

_STATE = "_dit_rewrite"
_WORD = "transformer"  # diffusers names denoisers transformer, transformer_2, unconditional_transformer


@dataclass
class _Enabled:
    """The state that `enable` adds to a pipeline."""

    plain: type
    quiet: bool
    reported: set[str] = field(default_factory=set)


class EnabledPipeline:
    """Base class of enabled pipelines, which adds a trajectory to each call."""

    def __copy__(self) -> Any:
        """A shallow copy shares the components, and is enabled too."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Deep copies and pickles have the original class."""
        plain = self.__dict__[_STATE].plain
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, state, *rest = reduced
        arguments = tuple(plain if argument is type(self) else argument for argument in arguments)
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name != _STATE}
        return (function, arguments, state, *rest)

    def _run(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the original call `plain` as one trajectory of all denoisers, with a shared clock."""
        models = [model for model in denoisers(self).values() if isinstance(model, RewrittenModule)]
        outer = [(model, backend_of(model).session.explicit) for model in models]
        free = [model for model, trajectory in outer if trajectory is None or trajectory.of_run]
        scheduler = getattr(self, "scheduler", None)
        clock = Clock(scheduler=scheduler, noise=any(map(needs_noise, free)))
        before = [model.stats() for model in free]
        with contextlib.ExitStack() as stack:
            for model in free:
                stack.enter_context(inside(model, clock, of_run=True))
            output = plain(self, *args, **kwargs)
        _report(self.__dict__[_STATE], free, before)
        return output


def enabled(pipe: Any, quiet: bool = False) -> Any:
    """Open a trajectory around each call of a pipeline whose denoisers are rewritten. Returns `pipe` itself.

    Unless `quiet`, one line on stderr reports the fraction of reused values after the first run.
    """
    plain: Any = type(pipe) if _STATE not in pipe.__dict__ else pipe.__dict__[_STATE].plain
    pipe.__class__ = _subclass(plain)
    pipe.__dict__[_STATE] = _Enabled(plain, quiet)
    return pipe


def disable(pipe: Any) -> Any:
    """Undo `enabled`, and the rewrite of the denoisers."""
    for model in denoisers(pipe).values():
        detach(model)
    state = pipe.__dict__.pop(_STATE, None)
    if state is not None:
        pipe.__class__ = state.plain
    return pipe


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """Return the denoisers of a pipeline by the names of their components."""
    names = [name for name in getattr(pipe, "components", {}) if _WORD in name.split("_")]
    parts = {name: unwrapped(getattr(pipe, name, None)) for name in names}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def required_denoisers(pipe: Any) -> dict[str, nn.Module]:
    """Return the denoisers of a pipeline by the names of their components. Raises NoTransformer if there is none."""
    found = denoisers(pipe)
    if not found:
        modules = [name for name, part in getattr(pipe, "components", {}).items() if isinstance(part, nn.Module)]
        raise NoTransformer(type(pipe).__name__, modules)
    return found


@cache
def _subclass(plain: type) -> type:
    """Return the enabled subclass of a pipeline class. Python looks up ``__call__`` on the class, not the object."""
    run: Any = plain.__call__

    @wraps(run)  # callers inspect the signature
    def call(self: EnabledPipeline, *args: Any, **kwargs: Any) -> Any:
        return self._run(run, args, kwargs)

    names: dict[str, Any] = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
    }
    names["__call__"] = call
    return types.new_class(plain.__name__, (EnabledPipeline, plain), exec_body=lambda body: body.update(names))


def _report(state: _Enabled, models: list[RewrittenModule], before: list[Stats]) -> None:
    """Report once how much a run reused, and warn once for each reason why a run reused nothing."""
    runs = [model.stats().since(earlier) for model, earlier in zip(models, before, strict=True)]
    policies = [backend_of(model).policy for model in models]
    total, reused = sum(run.computed + run.reused for run in runs), sum(run.reused for run in runs)
    if not total or not any(policy.rules for policy in policies):
        return
    misses = sum((run.misses for run in runs), Counter[Reason]())
    if not reused:
        reason = why_nothing(runs)
        if reason not in state.reported:
            state.reported.add(reason)
            warnings.warn(f"{policies[0]}: none of {total} values was reused: {reason}", stacklevel=3)
    elif not state.quiet and not state.reported:
        state.reported.add("")
        line = f"{policies[0]}: {reused / total:.0%} of {total} values reused, {misses.total()} misses"
        print(line, file=sys.stderr)


_REMEDY: dict[Reason, str] = {
    StreamReason.NEW_CONDITIONING: "compute the prompt embeddings once, before the sampler's loop",
    StreamReason.UNREADABLE_INPUT: "pass tensors, numbers, or containers or dataclasses of them",
    MissReason.NOT_CAPTURED: "find out why Dynamo recompiles (TORCH_LOGS=recompiles), or raise its recompile_limit",
    MissReason.NOISE_UNKNOWN: "use a scheduler with alphas_cumprod or sigmas",
    DecisionReason.NOISE_UNKNOWN: "use a scheduler with alphas_cumprod or sigmas",
    DecisionReason.TOTAL_UNKNOWN: "give the number of steps: model.trajectory(num_steps=...)",
}


def why_nothing(runs: list[Stats]) -> str:
    """Return the most frequent reason why nothing was reused, and a remedy."""
    for counts in ([run.misses for run in runs], [run.streams for run in runs]):
        together = sum(counts, Counter[Reason]())
        if together:
            reason = together.most_common(1)[0][0]
            return f"{reason}; {_REMEDY.get(reason, 'print(pipe.transformer.stats()) lists all reasons')}"
    decided = Counter(reason for run in runs for record in run.records for reason in record.reasons)
    reason = decided.most_common(1)[0][0] if decided else UnreachedReason.NO_RULE
    return f"{reason}; {_REMEDY.get(reason, 'print(pipe.transformer.explain()) shows the guards')}"
