"""The result of `autopolicy`: a policy, the measurements that it was chosen by, and its file."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dit_rewrite.errors import (
    BadCertificate,
    PolicyError,
    PolicyForOtherModel,
    PolicyForOtherScheduler,
    PolicyForOtherSteps,
)
from dit_rewrite.policies.text import file_of, parse
from dit_rewrite.policy.files import write_whole
from dit_rewrite.policy.plan import describe_scheduler, fingerprint
from dit_rewrite.policy.rules import Policy
from dit_rewrite.policy.serialise import from_json, to_json

T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # Student's, 97.5 %, by degrees of freedom


@dataclass(frozen=True)
class Errors:
    """The relative L2 errors of the images of some seeds, their mean, and the 95 % interval of the mean (Student)."""

    mean: float
    low: float
    high: float
    each: tuple[float, ...]

    @classmethod
    def of(cls, errors: Sequence[float]) -> Errors:
        mean, count = statistics.fmean(errors), len(errors)
        half = math.inf if count < 2 else quantile(count - 1) * statistics.stdev(errors) / math.sqrt(count)
        return cls(mean, max(0.0, mean - half), mean + half, tuple(errors))

    def __str__(self) -> str:
        return f"{self.mean:.4f} ({self.low:.4f} to {self.high:.4f}, {len(self.each)} seeds)"


def quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's distribution, to 1 %."""
    return T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else 1.96 + 2.6 / freedom


@dataclass(frozen=True)
class Control:
    """Fewer steps of a solver, without a policy: its cost over the full run's, and its errors on the held-out seeds."""

    solver: str
    steps: int
    cost: float
    errors: Errors


@dataclass(frozen=True)
class AutoPolicy:
    """The result of `autopolicy`.

    ``policy`` is the policy to use; if the control wins it reuses nothing, and ``control`` is to be run. ``bound`` is
    the bound as text. ``cost`` is the time or the FLOPs, as ``measure`` says, over those of a run that computes
    everything; ``seconds`` is the time of a run if it was measured. ``cache_bytes`` is the predicted size of all caches
    and ``peak_bytes`` the largest size in a run, None in older files. The policy is valid for ``model``, ``steps`` and
    ``scheduler``. ``place``, ``computed`` and ``style`` describe the forecasts: the place, the steps that compute, and
    the weights. ``predicted`` is the objective of the dynamic programme, ``calibration_error`` the mean error of the
    images of the search, and ``errors`` those on held-out seeds. ``rank_correlation`` is Spearman's, of predicted and
    measured errors over the ``trials`` of the search.
    """

    policy: Policy
    bound: str
    measure: Literal["flops", "time"]
    cost: float
    seconds: float | None
    cache_bytes: int
    errors: Errors
    control: Control | None
    winner: Literal["policy", "control"]
    model: str
    steps: int
    scheduler: str | None
    place: str
    computed: tuple[int, ...]
    style: str
    predicted: float
    calibration_error: float
    trials: int
    rank_correlation: float | None
    search_seconds: float
    calibration_seeds: tuple[int, ...]
    held_out_seeds: tuple[int, ...]
    peak_bytes: int | None = None

    @property
    def speedup(self) -> float:
        """How many times as fast as a run that computes everything, by time or FLOPs."""
        return 1 / self.cost

    def __str__(self) -> str:
        lines = [f"autopolicy, {self.bound}: {self._summary()}"]
        if self.control is None:
            lines.append("no control ran: fewer steps of a solver may be better")
        else:
            c = self.control
            lines.append(f"control, {c.solver} with {c.steps} steps: {c.cost:.3f} of the cost, error {c.errors}")
            lines.append(f"the {self.winner} wins")
        return "\n".join(lines)

    def _summary(self) -> str:
        ran = "" if self.peak_bytes is None else f", {self.peak_bytes:,} measured"
        how = f"{len(self.computed)} of {self.steps} steps compute, {self.style} forecasts of the {self.place}"
        cost = f"{self.speedup:.2f} x by {self.measure}, {self.cost:.3f} of the cost, error {self.errors}"
        return f"{cost}; {how}; {self.cache_bytes:,} bytes in caches predicted{ran}"

    def described(self) -> dict[str, str]:
        """Return the certificate as texts by name, in the order in which a report shows them."""
        control = self.control
        ran = "" if self.peak_bytes is None else f"; {self.peak_bytes:,} measured in a run"
        return {
            "bound": self.bound,
            "speed-up": f"{self.speedup:.2f} by {self.measure}, {self.cost:.3f} of the cost of a full run",
            "relative L2 error on held-out seeds (95 % interval)": str(self.errors),
            "control": "none was given" if control is None else f"{control.solver} with {control.steps} steps",
            "cost of the control": "" if control is None else f"{control.cost:.3f} of the cost of a full run",
            "error of the control (95 % interval)": "" if control is None else str(control.errors),
            "winner": self.winner,
            "computed steps": f"{len(self.computed)} of {self.steps}: {', '.join(map(str, self.computed))}",
            "forecasts": f"{self.style} forecasts of the {self.place}",
            "bytes in caches": f"{self.cache_bytes:,} predicted{ran}",
            "scheduler": self.scheduler or "not known",
        }

    def check(self, model: nn.Module, steps: int, scheduler: object = None) -> None:
        """Raise PlanMismatch if the policy was made for another model, number of steps or scheduler."""
        if fingerprint(model) != self.model:
            raise PolicyForOtherModel(self.policy)
        if steps != self.steps:
            raise PolicyForOtherSteps(self.policy, self.steps, steps)
        found = None if scheduler is None else describe_scheduler(scheduler)
        if None not in (found, self.scheduler) and found != self.scheduler:
            raise PolicyForOtherScheduler(self.policy, self.scheduler, found)

    def save(self, path: str | Path) -> None:
        """Write the policy with its certificate as one JSON file, which is also the file of the policy."""
        certificate = {name: value for name, value in asdict(self).items() if name != "policy"}
        content = json.loads(to_json(self.policy)) | {"certificate": certificate}
        write_whole(Path(path), json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> AutoPolicy:
        """Read a file that `save` wrote. Raises BadCertificate for other content, OSError if it cannot be read."""
        try:
            text = Path(path).read_text(encoding="utf-8")
            policy, found = from_json(text), json.loads(text).get("certificate")
            return cls(policy, **_fields(found))
        except (PolicyError, TypeError, ValueError, KeyError) as error:
            raise BadCertificate(path, str(error) or type(error).__name__) from error

    @classmethod
    def of(cls, policy: str) -> AutoPolicy | None:
        """Return the certificate of the text or path of a policy; only files that `save` wrote have one.

        Raises BadCertificate, or the errors of `parse`.
        """
        path = file_of(policy)
        parse(policy)
        if path is None or "certificate" not in json.loads(path.read_text(encoding="utf-8")):
            return None
        return cls.load(path)


def _fields(found: Any) -> dict[str, Any]:
    """Convert the lists and objects of a certificate. Raises ValueError for other fields than those of AutoPolicy."""
    names = {field.name for field in fields(AutoPolicy)} - {"policy"}
    needed = {field.name for field in fields(AutoPolicy) if field.default is MISSING} - {"policy"}
    if not isinstance(found, dict) or not needed <= set(found) <= names:
        wrong = sorted((needed - set(found)) | (set(found) - names)) if isinstance(found, dict) else "all"
        raise ValueError(f"the certificate lacks or adds fields: {wrong}")
    read = dict(found, errors=_errors(found["errors"]))
    for name in ("computed", "calibration_seeds", "held_out_seeds"):
        read[name] = tuple(found[name])
    if found["control"] is not None:
        read["control"] = Control(**dict(found["control"], errors=_errors(found["control"]["errors"])))
    return read


def _errors(found: dict[str, Any]) -> Errors:
    return Errors(**dict(found, each=tuple(found["each"])))
