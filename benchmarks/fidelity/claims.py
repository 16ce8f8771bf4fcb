"""The claims of the fidelity benchmark: policies against fewer steps, forecasts against reuse, and targets.

A control is the uncached model with fewer steps of any solver. Its cost is counted like that of the policy: in calls of
the denoiser, in FLOPs, or in time. A policy is compared with the best control of equal cost: the smallest error of any
control that costs no more, or the error of a solver interpolated log-linearly between two numbers of steps. A claim
holds if all its comparisons do; without any comparison it is open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

from benchmarks.fidelity.rows import STEPS, UNCACHED, Row
from benchmarks.record import Claim, Evidence

Cost = Callable[[Row], float | None]
Error = Literal["error", "reference_error"]
NEAR = 1.1  # an error up to this factor above another counts as equally good
SAVING = 4  # claims against fewer steps cover policies that cost at least 1/SAVING of the uncached model
TARGETS: dict[str, dict[int, dict[int, float]]] = {  # toy, order, interval -> error
    "class": {1: {2: 0.011, 3: 0.017, 4: 0.031}},
    "text": {2: {2: 0.012, 3: 0.017, 4: 0.026}},
}
OF_CONTROL = {2: 0.5, 3: 0.5, 4: 0.77}  # largest share of the best control's error, class toy
ABOUT = 1  # allowed extra calls, since policies with a warm-up compute once more
BEST: dict[str, dict[int, float]] = {"class": {17: 0.012}}  # toy, calls -> target of the best policy


def by_flops(row: Row) -> float:
    return row.result.flops


def by_time(row: Row) -> float | None:
    return row.time


def by_calls(row: Row) -> float:
    return float(row.result.computed)


def best_control(rows: Sequence[Row], cost: Cost, limit: float, error: Error = "error") -> tuple[float, str] | None:
    """Return the smallest error of fewer steps at that cost, and its solver; None if no control is that cheap."""
    solvers = {row.setting("solver") for row in rows if row.family == STEPS}
    found = [(value, s) for s in sorted(solvers) for value in _errors(rows, s, cost, limit, error)]
    return min(found, default=None)


def _errors(rows: Sequence[Row], solver: str, cost: Cost, limit: float, error: Error) -> Iterator[float]:
    """Yield a solver's errors: of each control that costs no more, and interpolated at the cost."""
    points = sorted(
        (at, getattr(row.result, error))
        for row in rows
        if row.family == STEPS and row.setting("solver") == solver and (at := cost(row)) is not None
    )
    yield from (value for at, value in points if at <= limit)
    for (at, value), (later, next_value) in pairwise(points):
        if at < limit < later:
            yield between(value, next_value, (limit - at) / (later - at))


def between(a: float, b: float, share: float) -> float:
    """Interpolate linearly between two logarithms, or between the values if one is 0."""
    return a ** (1 - share) * b**share if a > 0 and b > 0 else a + (b - a) * share


def against_fewer_steps(rows: Sequence[Row], cost: Cost, error: Error) -> list[Evidence]:
    """Compare each policy with a saving of up to SAVING with the best control of equal cost."""
    evidence = []
    for row in (r for r in rows if r.family != STEPS):
        limit = cost(row)
        control = best_control(rows, cost, limit, error) if limit is not None else None
        if limit is not None and control is not None and 1 / SAVING <= limit < 1:
            own = getattr(row.result, error)
            evidence.append(
                {"row": row.name, "family": row.family, "cost": limit, "error": own, "fewer_steps": control[0],
                 "solver": control[1], "held": own < control[0]}
            )  # fmt: skip
    return evidence


def fewer_steps(toy: str, rows: Sequence[Row]) -> list[Claim]:
    """Return the claims of each family and of all policies at equal time and equal FLOPs, and of all to the reference.

    Those of all policies are two: in every setting, and in most of them.
    """
    targets: dict[Error, str] = {"error": "the uncached images", "reference_error": "the reference"}
    costs: dict[str, Cost] = {"time": by_time, "FLOPs": by_flops}
    claims = []
    for error, target in targets.items():
        for name, cost in costs.items():
            evidence = against_fewer_steps(rows, cost, error)
            bound = f"closer to {target} in every setting up to a {SAVING}-fold saving"
            for family in dict.fromkeys(e["family"] for e in evidence) if error == "error" else ():
                own = [e for e in evidence if e["family"] == family]
                claims.append(Claim.of(f"{toy}: {family} beats fewer steps at equal {name}", bound, own))
            what = "A policy beats" if error == "error" else "Judged by the reference, a policy beats"
            every = Claim.of(f"{toy}: {what} fewer steps at equal {name}", bound, evidence)
            claims += [every, _in_most_settings(toy, every)]
    return claims


def _in_most_settings(toy: str, every: Claim) -> Claim:
    """Return the claim that most comparisons of another claim hold."""
    count = len(every.evidence)
    held = 2 * sum(e["held"] for e in every.evidence) > count if count else None
    name = every.claim.removeprefix(f"{toy}: ")
    bound = every.bound.replace("in every setting", "in more than half of the settings")
    return Claim(f"{toy}: In most settings, {name[0].lower()}{name[1:]}", bound, held, every.evidence)


def _forecast(rows: Sequence[Row], order: int, interval: int, place: str, basis: str = "taylor") -> Row | None:
    wanted = {"order": order, "interval": interval, "place": place, "basis": basis}
    return next((r for r in rows if all(r.setting(k) == v for k, v in wanted.items())), None)


def _pair(a: Row, b: Row, share: float = 1.0) -> Evidence:
    """Compare a's error with a share of b's."""
    errors = [a.result.error, b.result.error]
    return {"row": a.name, "against": b.name, "error": errors, "held": errors[0] <= share * errors[1]}


def forecast_beats_reuse(toy: str, rows: Sequence[Row]) -> Claim:
    made = [r for r in rows if (r.setting("order") or 0) > 0]
    pairs = [(r, _forecast(rows, 0, r.setting("interval"), r.setting("place"))) for r in made]
    evidence = [_pair(a, b) for a, b in pairs if b is not None]
    return Claim.of(f"{toy}: A forecast beats reuse", "less error at the same place and interval", evidence)


def output_as_good(toy: str, rows: Sequence[Row], other: str) -> Claim:
    made = [r for r in rows if r.setting("place") == "output" and r.setting("order") > 0]
    pairs = [(r, _forecast(rows, r.setting("order"), r.setting("interval"), other, r.setting("basis"))) for r in made]
    evidence = [_pair(a, b, NEAR) for a, b in pairs if b is not None]
    name = f"{toy}: Forecasting the output is as good as forecasting {'the stack' if other == 'stack' else other}"
    return Claim.of(name, f"at most {NEAR - 1:.0%} more error at the same order, basis and interval", evidence)


def targets(toy: str, rows: Sequence[Row]) -> list[Claim]:
    """Compare, for each order and interval, the best place with a bound and with the best control of equal calls."""
    claims = []
    for order, bounds in TARGETS.get(toy, {}).items():
        evidence = []
        for interval, bound in bounds.items():
            made = [r for place in ("branches", "stack", "output") if (r := _forecast(rows, order, interval, place))]
            row = min(made, key=lambda r: r.result.error, default=None)
            if row is not None:
                evidence.append(_target(row, bound, rows, OF_CONTROL[interval] if toy == "class" else math.inf))
        text = ", ".join(f"{bound} at {interval}" for interval, bound in bounds.items())
        text += "; and 0.5, 0.5 and 0.77 of the best control's at as many calls" if toy == "class" else ""
        claims.append(Claim.of(f"{toy}: Order {order} at its best place is as close as was aimed at", text, evidence))
    return claims


def _target(row: Row, bound: float, rows: Sequence[Row], share: float) -> Evidence:
    control = best_control(rows, by_calls, by_calls(row)) or (math.inf, "none")
    return _met(row, min(bound, share * control[0]), control)


def best_at(toy: str, rows: Sequence[Row], number: int) -> Claim:
    """Return the best policy that computes in about so many calls, and spends few FLOPs in the others."""
    whole = next((r.result.computed for r in rows if r.name == UNCACHED), 0)
    most = number + ABOUT
    near = [
        r for r in rows if r.family != STEPS and r.result.computed <= most and r.result.flops * whole <= most + ABOUT
    ]
    row, control = min(near, key=lambda r: r.result.error, default=None), best_control(rows, by_calls, most)
    aim, evidence = BEST.get(toy, {}).get(number, math.inf), []
    if row is not None and control is not None:
        evidence = [_met(row, min(aim, control[0]), control)]
    text = "less error than the best of fewer steps" + (f", and at most {aim}" if aim < math.inf else "")
    return Claim.of(f"{toy}: The best policy at about {number} computed steps", text, evidence)


def _met(row: Row, bound: float, control: tuple[float, str]) -> Evidence:
    """Compare a row with a bound, and add the best control."""
    own = row.result.error
    return {"row": row.name, "calls": row.result.computed, "error": own, "bound": bound, "fewer_steps": control[0],
            "solver": control[1], "held": own <= bound}  # fmt: skip


def judge(rows: Sequence[Row]) -> list[Claim]:
    """Return all claims, toy by toy, evaluated on the available rows."""
    claims: list[Claim] = []
    for toy in dict.fromkeys(row.toy for row in rows):
        own = [row for row in rows if row.toy == toy]
        claims += fewer_steps(toy, own)
        claims += [forecast_beats_reuse(toy, own), *(output_as_good(toy, own, p) for p in ("branches", "stack"))]
        claims += targets(toy, own)
        claims += [best_at(toy, own, number) for number in (17, 10)]
    return claims
