"""Calibrate policies for a model: fit TeaCache's polynomial, or measure MagCache's ratios."""

from __future__ import annotations

import inspect
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import InnerBackend, Lowering
from dit_rewrite.errors import BadParameter, NotAModule, PoorFit, TooFewChanges, TooFewSteps, UnevenStreams
from dit_rewrite.module import attach, twin, unwrapped
from dit_rewrite.passes.analysis.probes import Probes
from dit_rewrite.passes.guards.symbols import drift, similarity, step
from dit_rewrite.policies.checks import one_of, real, threshold_of
from dit_rewrite.policies.measured import MagCache, TeaCache
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.where import Where
from dit_rewrite.proof.callers import calling
from dit_rewrite.runtime.session import Observation

DEGREE = 4  # of TeaCache's polynomial
LEAST = 2 * (DEGREE + 1)  # minimum number of pairs; a polynomial fits fewer too well to be checked by R²
DIGITS = 9  # significant digits of the coefficients
STACK = Where(span="stack")


def calibrate(
    method: Literal["teacache", "magcache"],
    model: torch.nn.Module,
    sample: Callable[[Any], object],
    *,
    threshold: float,
    min_r2: float = 0.5,
    backend: InnerBackend = "inductor",
    **parameters: Any,
) -> Policy:
    """Return a TeaCache or MagCache policy for a model, calibrated on one run that computes everything.

    `sample` runs the sampler, for one or more pictures, with the denoiser that it takes as its argument; `model` itself
    is not changed. "teacache" fits a polynomial of degree 4 that maps the relative L1 change of the modulated input
    between consecutive steps to that of the output. The policy's name contains its R², the explained fraction of the
    variance. "magcache" measures the growth of the stack's change between consecutive steps, averaged over tokens,
    streams and pictures. `threshold` and `parameters` are passed to the policy.

    Raises NotCalibrated if the run lacks the data or R² is below `min_r2`, NotAModule, or BadParameter.
    """
    one_of("calibrate", "method", method, tuple(_METHODS))
    real("calibrate", "min_r2", min_r2, lambda r: r <= 1, "a number up to 1")
    threshold_of("calibrate", threshold)
    known = inspect.signature(TeaCache if method == "teacache" else MagCache).parameters
    for name, value in parameters.items():
        if name not in known or name in ("coefficients", "ratios"):
            raise BadParameter("calibrate", name, value, "a parameter of the policy that is not calibrated")
    model = unwrapped(model)
    if not isinstance(model, torch.nn.Module):
        raise NotAModule(model)
    return _METHODS[method](model, sample, backend, threshold, min_r2, parameters)


# --- TeaCache ---------------------------------------------------------------------------------------------------------


def _teacache(
    model: torch.nn.Module,
    sample: Callable[[Any], object],
    backend: InnerBackend,
    threshold: float,
    min_r2: float,
    parameters: dict[str, Any],
) -> Policy:
    pairs = _changes(model, sample, backend)
    if len(pairs) < LEAST:
        raise TooFewChanges(count=len(pairs), least=LEAST)
    changes, outcomes = zip(*pairs, strict=True)
    coefficients = tuple(float(f"{c:.{DIGITS}g}") for c in polyfit(changes, outcomes, DEGREE))
    r2 = explained(coefficients, pairs)
    if not r2 >= min_r2:
        raise PoorFit(r2, min_r2)
    policy = TeaCache(threshold, coefficients, **parameters)
    return replace(policy, name=f"{policy.name} (R² {r2:.3f})")


def _changes(
    model: torch.nn.Module, sample: Callable[[Any], object], backend: InnerBackend
) -> list[tuple[float, float]]:
    """Return the relative changes of the modulated input and of the output at each step but the last.

    The guard requests both measurements but never holds: no change is below 0. The simplifier cannot conclude that,
    because the changes are rescaled. With lag=1 each step records the measurements of the previous one.
    """
    asked = drift("modulated_input", rescale=(1.0, 0.0)), similarity("output", rescale=(1.0, 0.0))
    policy = Policy((Rule((asked[0] < 0) & (asked[1] < 0), where=STACK),), "calibrate", lag=1)
    made = Backend(model, policy, Lowering.of(backend))
    _run(attach(twin(model), made), sample)
    measured = [numbers for decision in made.stats.decisions for numbers in decision.measured.values()]
    return [(n[asked[0].name], n[asked[1].name]) for n in measured if len(n) == len(asked)]


def polyfit(xs: Sequence[float], ys: Sequence[float], degree: int) -> list[float]:
    """Return the coefficients of the least-squares polynomial, highest power first, as numpy.polyfit does."""
    powers = torch.tensor(xs, dtype=torch.float64)[:, None] ** torch.arange(degree, -1, -1)
    sizes = powers.norm(dim=0)
    right = torch.tensor(ys, dtype=torch.float64)[:, None]
    found = torch.linalg.lstsq(powers / sizes, right, driver="gelsd").solution[:, 0] / sizes
    return [float(c) for c in found]


def explained(coefficients: Sequence[float], pairs: Sequence[tuple[float, float]]) -> float:
    """Return R², the fraction of the variance that a polynomial explains."""
    mean = statistics.fmean(y for _, y in pairs)
    left = sum((y - sum(c * x**p for p, c in enumerate(reversed(coefficients)))) ** 2 for x, y in pairs)
    whole = sum((y - mean) ** 2 for _, y in pairs)
    return 1 - left / whole if whole > 0 else float(left == 0)


# --- MagCache ---------------------------------------------------------------------------------------------------------


def _magcache(
    model: torch.nn.Module,
    sample: Callable[[Any], object],
    backend: InnerBackend,
    threshold: float,
    _: float,
    parameters: dict[str, Any],
) -> Policy:
    made = Backend(model, Policy((Rule(step > 0, where=STACK),), "calibrate"), Lowering.of(backend), force=True)
    growth = Growth(made)
    made.session.observer = growth.see
    _run(attach(twin(model), made), sample)
    tables = list(growth.tables.values())
    if not tables or len(tables[0]) < 2:
        raise TooFewSteps(len(tables[0]) if tables else 0)
    if len({len(table) for table in tables}) > 1:
        raise UnevenStreams(" and ".join(str(n) for n in sorted({len(table) for table in tables})))
    ratios = tuple(statistics.fmean(column) for column in zip(*tables, strict=True))
    return MagCache(ratios, threshold, **parameters)


class Last(NamedTuple):
    """A change of the stream across the stack, and the step at which it was computed."""

    step: int
    value: Tensor


class Growth:
    """Records how the magnitude of the stack's change grows between consecutive steps, per trajectory and stream."""

    def __init__(self, backend: Backend) -> None:
        self.tables: dict[Hashable, list[float]] = defaultdict(list)
        self._backend = backend
        self._last: dict[Hashable, Last] = {}

    def see(self, observation: Observation) -> None:
        """Record a call, whose slots contain the values that it computed."""
        record = observation.record
        stored = [value for slot in observation.slots if slot is not None for value in slot]
        if not stored or observation.position or record.stream is None:
            return
        key = (record.trajectory, record.stream)
        value, last = self._image(observation.graph, stored), self._last.get(key)
        if last is None or last.step != record.step:  # ignore a solver's second call at a step
            self.tables[key].append(1.0 if last is None else grown(value, last.value))
            self._last[key] = Last(record.step, value)

    def _image(self, graph: int, stored: Sequence[Tensor]) -> Tensor:
        """Return the value with the number of tokens of the stream that the output is computed from, or the largest."""
        rewritten = self._backend.rewritten[graph]
        tokens = Probes(rewritten.bound.gm, rewritten.found, rewritten.captured.static).image_tokens()
        fitting = [value for value in stored if value.ndim == 3 and value.shape[1] == tokens]
        return max(fitting or stored, key=Tensor.numel)


def grown(now: Tensor, before: Tensor) -> float:
    """Return the ratio of the L2 norms of the tokens, averaged over tokens."""
    lengths = [value.float().norm(dim=-1) for value in (now, before)]
    return float((lengths[0] / (lengths[1] + 1e-8)).mean())


def _run(model: Any, sample: Callable[[Any], object]) -> None:
    with torch.no_grad(), calling(sample, "in the calibration"):
        sample(model)


_METHODS: dict[str, Callable[..., Policy]] = {"teacache": _teacache, "magcache": _magcache}
