"""The rows of the fidelity benchmark: policies (as text or objects), and the controls with fewer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sympy import Mod, Ne

from benchmarks.fidelity.toys import Toy, calls
from benchmarks.timing import Spread
from dit_rewrite.guards import step
from dit_rewrite.policies import as_policy
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import Forecast
from dit_rewrite.policy.where import Where

STEPS = "fewer steps"  # the family of the controls
UNCACHED = "uncached"
NUMBERS = (8, 10, 11, 13, 14, 17, 18, 25, 26, 34)  # calls of the denoiser by the controls of 50 steps
PLACES = {"branches": Where(), "stack": Where(span="stack"), "output": Where(span="output")}
INTERVALS = (2, 3, 4, 5)
PLACED = (0, 7, 10, 14, 16, 19, 21, 23, 25, 27, 29, 32, 35, 38, 42, 45, 47, 49)
PLANS = (  # searched on the clipped class toy
    # from other noise, by moving single steps of an even plan
    (0, 2, 8, 10, 14, 19, 21, 24, 28, 31, 35, 39, 42, 43, 45, 48, 49),
    (0, 1, 7, 13, 17, 22, 27, 31, 33, 39, 43, 48, 49),
    (0, 1, 11, 14, 22, 27, 32, 37, 43, 48),
    # by `benchmarks.fidelity.plans` on other noise: as placed by the dynamic programme, and after moving single steps
    PLACED,
    (0, 5, 10, 14, 16, 19, 21, 23, 25, 27, 29, 32, 35, 37, 40, 45, 47, 49),
)


@dataclass(frozen=True)
class Recipe:
    """One row: a policy, or a control with `solver`, `steps` and no policy.

    settings: further properties that the claims select rows by. calibrated: the parameters of `policies.calibrate` if
    the policy is calibrated on the toy.
    """

    name: str
    family: str
    policy: Policy | None = None
    solver: str | None = None
    steps: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    calibrated: Mapping[str, Any] | None = None

    @property
    def is_control(self) -> bool:
        """Whether the row has no policy."""
        return self.policy is None and self.calibrated is None

    def key(self) -> dict[str, Any]:
        """Everything that determines the row's figures, apart from the benchmark's settings."""
        policy = None if self.policy is None else repr(self.policy)
        more = {"solver": self.solver, "steps": self.steps, "settings": dict(self.settings)}
        more["calibrated"] = None if self.calibrated is None else dict(self.calibrated)
        return {"name": self.name, "family": self.family, "policy": policy, **more}


@dataclass(frozen=True)
class Result:
    """The measurements of a row, apart from its time.

    computed: calls of the denoiser in which no site was reused. flops: FLOPs of all calls over those of the uncached
    run. error: relative L2 distance to the uncached images of the same sampler with the same number of steps.
    reference_error: relative L2 distance to the images of the reference. Both also exist for each image, for paired
    comparisons. counted: how FLOPs were counted (`fidelity.flops.COUNTED`).
    """

    key: dict[str, Any]
    computed: int
    flops: float
    error: float
    errors: list[float]
    reference_error: float
    reference_errors: list[float]
    cache_bytes: int = 0
    counted: int = 1
    misses: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """ratio: time over that of the uncached model in alternating runs. late_variants: compiled during timed runs."""

    seconds: Spread
    ratio: Spread
    compile_seconds: float = 0.0
    late_variants: int = 0

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Timing:
        spreads = {name: Spread(**found[name]) for name in ("seconds", "ratio")}
        return cls(**spreads, compile_seconds=found["compile_seconds"], late_variants=found["late_variants"])


@dataclass(frozen=True)
class Row:
    """A line of the table: its toy, its errors, and its time if that was measured."""

    toy: str
    result: Result
    timing: Timing | None = None

    @property
    def name(self) -> str:
        return str(self.result.key["name"])

    @property
    def family(self) -> str:
        return str(self.result.key["family"])

    @property
    def time(self) -> float | None:
        """Time over that of the uncached model."""
        return None if self.timing is None else self.timing.ratio.median

    def setting(self, name: str) -> Any:
        return self.result.key["settings"].get(name)


def control(solver: str, steps: int) -> Recipe:
    """Return a control: the uncached model with another solver and fewer steps."""
    return Recipe(f"{solver}, {steps} steps", STEPS, solver=solver, steps=steps, settings={"solver": solver})


def controls(toy: Toy, steps: int) -> list[Recipe]:
    """Return each solver with the fewest steps that reach each number of calls below that of the uncached model."""
    numbers = [n for n in NUMBERS if n < steps]
    return [control(solver, n) for solver in toy.solvers for n in sorted({_steps(solver, n) for n in numbers})]


def _steps(solver: str, number: int) -> int:
    """Return the fewest steps of a solver that call the denoiser at least so often."""
    return next(n for n in range(1, number + 1) if calls(solver, n) >= number)


def forecast(interval: int, order: int, place: str, basis: str = "taylor") -> Recipe:
    """Return a policy that computes in every `interval`-th step and forecasts in between; order 0 is reuse."""
    do = Forecast(order, basis)
    name = f"{'reuse' if order == 0 else f'order {order}'}, {place}, {interval}"
    name += "" if basis == "taylor" else f", {basis}"
    policy = Policy((Rule(Ne(Mod(step, interval), 0), do, PLACES[place]),), name)
    settings = {"interval": interval, "order": order, "place": place, "basis": basis}
    return Recipe(name, "Reuse" if order == 0 else "Forecast", policy, settings=settings)


def forecasts() -> list[Recipe]:
    """Return polynomial forecasts of each place, order and interval, and other bases where they differ (order 2)."""
    plain = [forecast(i, order, place) for place in PLACES for order in (0, 1, 2) for i in INTERVALS]
    others = [("taylorseer", INTERVALS), ("hermite", (3, 5)), ("chebyshev", (3, 5))]
    places = ("branches", "output")
    return plain + [forecast(i, 2, place, basis) for basis, intervals in others for place in places for i in intervals]


def from_text(*texts: str) -> list[Recipe]:
    """Return the rows of policies in command line syntax."""
    return [Recipe(text, text.partition(":")[0], as_policy(text)) for text in texts]


def calibrated(method: str, **parameters: Any) -> Recipe:
    """Return a row whose policy is calibrated on the toy."""
    name = ",".join(f"{key}={value}" for key, value in parameters.items())
    return Recipe(f"{method}:{name}", method, calibrated={"method": method, **parameters})


def even_plan(count: int, steps: int = 50) -> str:
    """Return a plan of so many evenly spaced computed steps, with forecasts of the output between them."""
    return _plan(tuple(round(i * (steps - 1) / (count - 1)) for i in range(count)), steps)


def found_plan(computed: tuple[int, ...], **how: Any) -> str:
    """Return a plan of `PLANS`."""
    return _plan(computed, 50, **how)


def _plan(computed: tuple[int, ...], steps: int, order: int = 2, basis: str = "taylorseer", **more: Any) -> str:
    parameters = {"order": order, "basis": basis, **more}
    named = ",".join(f"{name}={value}" for name, value in parameters.items())
    return f"step_mask:computed=({','.join(map(str, computed))}),num_steps={steps},{named}"


def policies() -> list[Recipe]:
    """Return the policies of all toys. `settings` are the properties of forecasts that the claims select by."""
    return [
        *forecasts(),
        *from_text("dqar:snr_threshold=None", "dqar", "dqar:warmup=0.2,layer_fraction=1.0"),
        *from_text(*(f"first_block_cache:threshold={t}" for t in (0.02, 0.05, 0.1, 0.2))),
        *from_text(*(f"dual_block_cache:front=1,warmup=4,threshold={t},forecast=taylorseer" for t in (0.05, 0.1, 0.2))),
        *from_text("taylorseer:interval=3,order=2,warmup=3", "taylorseer:interval=5,order=2,warmup=3"),
        *from_text(*map(even_plan, (10, 13, 17, 25)), *map(found_plan, PLANS)),
        *from_text(*(found_plan(PLACED, order=1, basis=basis, span=None) for basis in ("taylor", "bdf"))),
        *from_text("hicache:interval=3", "hicache:interval=5", "foca:interval=3", "foca:interval=5"),
        *from_text("spectrum", "spectrum:span=output", "pyramid_attention_broadcast"),
        *from_text(*(f"dicache:threshold={t}" for t in (0.1, 0.2, 0.4))),
        *from_text(
            *(f"speca:error=mean,threshold={t},decay=0.3,max_streak=8,order=2" for t in (0.1, 0.2, 0.4)), "speca"
        ),
        *from_text(*(f"seacache:threshold={t},max_streak=None" for t in (0.05, 0.1, 0.25))),
        *from_text(*(f"easycache:threshold={t}" for t in (0.025, 0.05, 0.1))),
        *(calibrated("magcache", threshold=t) for t in (0.06, 0.12, 0.24)),
        *(calibrated("teacache", threshold=t, min_r2=0.0) for t in (0.1, 0.2, 0.4)),
    ]


def uncached(toy: Toy, steps: int) -> Recipe:
    """Return the uncached row. It has an error to the reference too."""
    return Recipe(UNCACHED, STEPS, solver=toy.sampler, steps=steps, settings={"solver": toy.sampler})


def recipes(toy: Toy, steps: int) -> list[Recipe]:
    """Return all rows of a toy: the uncached model, the controls, the policies."""
    return [uncached(toy, steps), *controls(toy, steps), *policies()]
