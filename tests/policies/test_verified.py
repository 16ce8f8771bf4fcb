"""SpeCa beside its source's loop over module hooks, and DiCache beside its own, with their forecasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import factorial, inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_rewrite import verify
from dit_rewrite.errors import BadParameter, DecisionReason, MissReason
from dit_rewrite.policies import DiCache, SpeCa, parse
from dit_rewrite.policy.rules import Policy
from examples.stdit import sincos
from tests.helpers import tiny
from tests.helpers.records import Decided, relative, splitting

STEPS, LAYERS = 20, 3
ERROR = {"elementwise": "forecast_error(verified, elementwise=True)", "mean": "forecast_error(verified)"}

# --- SpeCa ------------------------------------------------------------------------------------------------------------


@dataclass
class SpecaSource:
    """`cal_type`, `derivative_approximation`, `taylor_formula` and the check of one block, with the source's names.

    Steps count up, as in its FLUX. Unlike the source, the step goes on with the output that the checked block computed.
    """

    base_threshold: float
    decay_rate: float
    floor: float
    min_taylor_steps: int
    max_taylor_steps: int
    first_enhance: int
    max_order: int
    layer: int
    metric: str
    step: int = -1
    type: str = "none"
    taylor_step_counter: int = 0
    check: bool = False
    last_layer_error: float | None = None
    activated_steps: list[int] = field(default_factory=list)
    cache: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    row: str = ""
    compared: dict[int, float] = field(default_factory=dict)  # the compared error, by step

    def cal_type(self) -> None:
        self.step += 1
        if self.type == "full":
            self.type, self.taylor_step_counter, self.check, self.last_layer_error = "Taylor", 1, False, None
        else:
            threshold = max(self.base_threshold * self.decay_rate ** (self.step / STEPS), self.floor)
            self.check = self.taylor_step_counter >= self.min_taylor_steps
            error, first = self.last_layer_error, self.step < self.first_enhance
            reached_max = self.taylor_step_counter >= self.max_taylor_steps
            if error is not None and not first and not reached_max:
                self.compared[self.step] = error
            full = first or reached_max or (error is not None and error > threshold and self.check)
            self.type = "full" if full else "Taylor"
            self.taylor_step_counter = 0 if full else self.taylor_step_counter + 1
        if self.type == "full":
            self.activated_steps.append(self.step)
        checked = self.type == "Taylor" and self.check
        self.row += "C" if self.type == "full" else "V" if checked else "F"
        self.errors: list[float] = []

    def branch(self, layer: int, module: nn.Module, output: Tensor) -> Tensor:
        if self.type == "full":
            self.cache[module] = self.derivative_approximation(self.cache.get(module, []), output)
            return output
        distance = self.step - self.activated_steps[-1]
        forecast = sum(d * distance**i / factorial(i) for i, d in enumerate(self.cache[module]))
        assert isinstance(forecast, Tensor)
        if not (self.check and layer == self.layer):
            return forecast
        if self.metric == "mean":
            self.errors.append(relative(forecast.double(), output.double()))
        else:
            self.errors.append(float(((forecast - output).abs() / (output.abs() + 1e-10)).mean()))
        self.last_layer_error = max(self.errors)
        return output

    def derivative_approximation(self, before: list[Tensor], feature: Tensor) -> list[Tensor]:
        factors, distance = [feature], self.activated_steps[-1] - self.activated_steps[-2] if before else 0
        for factor in before[: self.max_order]:
            factors.append((factors[-1] - factor) / distance)
        return factors


@torch.no_grad()
def speca(source: SpecaSource, parts: Sequence[Sequence[str]] = (("attn",), ("mlp",))) -> tuple[Any, list[Tensor]]:
    """A run of the plain model under the source's rule."""
    model = tiny.build(LAYERS)
    hooks = [model.register_forward_pre_hook(lambda *_: source.cal_type())]
    for layer, block in enumerate(model.blocks):
        for (name,) in parts:
            part = getattr(block, name)
            hooks.append(part.register_forward_hook(lambda m, _, out, layer=layer: source.branch(layer, m, out)))
    return source, [model(**arguments).clone() for arguments in tiny.calls(STEPS)]


CASES: dict[str, dict[str, Any]] = {
    "the source's": {},
    "one check a run": {"min_streak": 4, "order": 1},
    "from the first on": {"min_streak": 0, "warmup": 1, "order": 2, "error": "mean"},
    "another block": {"min_streak": 1, "max_streak": 8, "layer": 1, "order": 1, "error": "mean"},
    "no decay": {"decay": 1.0, "min_streak": 1, "order": 2, "warmup": 6, "error": "mean"},
    "never more than one": {"max_streak": 1, "order": 1},
}


def source_of(threshold: float, floor: float, given: Mapping[str, Any]) -> SpecaSource:
    layer = range(LAYERS)[given.get("layer", -1)]
    counts = given.get("min_streak", 2), given.get("max_streak", 5), given.get("warmup", 3), given.get("order", 4)
    return SpecaSource(threshold, given.get("decay", 0.01), floor, *counts, layer, given.get("error", "elementwise"))


def decided(given: Mapping[str, Any], threshold: float) -> Decided:
    source, _ = speca(source_of(threshold, 0.0, given))
    decay = source.decay_rate
    return Decided(source.row, [error / decay ** (step / STEPS) for step, error in source.compared.items()] or [1.0])


def by_step(policy: Policy) -> tuple[Any, list[Tensor]]:
    model = tiny.rewritten(tiny.build(LAYERS), policy)
    with model.trajectory(STEPS):
        outputs = tiny.outputs(model, tiny.calls(STEPS))
    return model.stats(), outputs


LETTERS = {"compute": "C", "forecast": "F", "verify": "V"}


@pytest.mark.parametrize("given", CASES.values(), ids=list(CASES))
def test_speca_is_its_source(given: dict[str, Any]) -> None:
    """Its decisions, the errors behind them, and the model's outputs."""
    threshold, row = splitting(lambda t: decided(given, t))
    source, expected = speca(source_of(threshold, 0.0, given))
    stats, found = by_step(SpeCa(threshold, floor=0.0, **given))
    layer = source.layer
    rows = {
        name: "".join(LETTERS[d.strategies[name]] for d in stats.decisions) for name in stats.decisions[0].strategies
    }
    others = row.replace("V", "F")
    assert rows == {name: row if f"blocks.{layer}." in name else others for name in rows}
    assert row.startswith("CF") and (given.get("max_streak") == 1 or {"C", "F", "V"} <= set(row))
    measured = {d.step: d.measured["blocks.0.mlp"] for d in stats.decisions if "blocks.0.mlp" in d.measured}
    error = ERROR[given.get("error", "elementwise")]
    assert {step: numbers[error] for step, numbers in measured.items()} == pytest.approx(source.compared, rel=1e-2)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (stats.late_variants, stats.recompiles, stats.variants) == (0, 0, 3 if "V" in row else 2)


def test_speca_decays_to_its_floor() -> None:
    """An error that passes the first threshold fails the later ones; above the floor it passes to the end."""
    given = {"error": "mean", "order": 1, "decay": 1e-9}
    largest = max(speca(source_of(1e9, 1e9, given))[0].compared.values())
    rows = []
    for floor in (0.0, 2 * largest):
        source, _ = speca(source_of(2 * largest, floor, given))
        stats, _ = by_step(SpeCa(2 * largest, floor=floor, **given))
        rows.append("".join(LETTERS[d.strategies["blocks.2.mlp"]] for d in stats.decisions))
        assert rows[-1] == source.row
    assert rows[1] == "CFCFFVVVCFFVVVCFFVVV" and rows[0].count("C") > rows[1].count("C")


def test_a_verified_slot_stays_as_it_is() -> None:
    """Forecasts after a verified step, also at the verified block, use the values of the last computed steps."""
    kept = {"min_streak": 1, "max_streak": 3, "warmup": 1, "order": 0, "error": "mean"}
    stats, _ = by_step(SpeCa(1e9, **kept))
    ages = [d.strategies["blocks.2.mlp"] for d in stats.decisions[:9]]
    assert ages == ["compute", "forecast", "verify", "verify", "compute", "forecast", "verify", "verify", "compute"]
    source, _ = speca(source_of(1e9, 0.0, kept))
    errors = [d.measured["blocks.2.mlp"][ERROR["mean"]] for d in stats.decisions if d.measured]
    assert errors == pytest.approx(list(source.compared.values()), rel=1e-4)


@pytest.mark.parametrize("place", [None, "block"])
def test_an_error_of_nan_computes(place: Any) -> None:
    """The MLP of the checked block gives NaN: no error is proven small, however large the threshold."""
    model = tiny.build(LAYERS)
    with torch.no_grad():
        model.blocks[2].mlp[2].bias.fill_(nan)
    compiled = tiny.rewritten(model, SpeCa(1e9, floor=1e9, order=1, span=place))
    with compiled.trajectory(12):
        tiny.outputs(compiled, tiny.calls(12))
    row = ["C" if set(d.strategies.values()) == {"compute"} else "F" for d in compiled.stats().decisions]
    assert "".join(row) == "CFCFFFCFFFCF"
    assert {d.reasons[name] for d in compiled.stats().decisions[6:7] for name in d.reasons} == {DecisionReason.NO_RULE}


def test_speca_of_blocks() -> None:
    """Forecasts of the change across each block, verified at the last block."""
    stats, _ = by_step(SpeCa(1e9, floor=1e9, order=1, span="block"))
    rows = [tuple(d.strategies[f"blocks.{i}"] for i in range(3)) for d in stats.decisions[3:9]]
    forecast, verified = ("forecast",) * 3, ("forecast", "forecast", "verify")
    assert rows == [forecast, forecast, verified, verified, verified, ("compute",) * 3]


def test_nobody_told_how_many_steps() -> None:
    """The decay depends on the number of steps: rules without a measurement go on, and the other steps compute."""
    model = tiny.rewritten(tiny.build(LAYERS), SpeCa(1e9, floor=1e9, order=1))
    tiny.outputs(model, tiny.calls(12))
    row = "".join(LETTERS[d.strategies["blocks.0.mlp"]] for d in model.stats().decisions)
    assert row == "CFCFFFCFFFCF"
    assert model.stats().decisions[6].reasons["blocks.0.mlp"] is DecisionReason.TOTAL_UNKNOWN


# --- DiCache ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def dicache(threshold: float, depth: int, retention: float) -> tuple[Decided, list[Tensor], list[float]]:
    """`dicache_forward`, with its names: its decisions and outputs, and its gammas before they are clipped."""
    model, outputs, gammas, row, compared = tiny.build(LAYERS), [], [], "", []
    residual_window, probe_residual_window, accumulated = [], [], 0.0
    previous_probe_states = None
    for cnt, arguments in enumerate(tiny.calls(STEPS)):
        signal = sincos(arguments["timestep"], tiny.WIDTH) + arguments["condition"]
        x = model.embed(arguments["hidden_states"])
        probe = x
        for block in model.blocks[:depth]:
            probe = block(probe, signal)
        should_calc = cnt <= int(retention * STEPS) or cnt == STEPS - 1
        if should_calc:
            accumulated = 0.0
        else:
            accumulated += relative(probe, previous_probe_states)
            compared.append(accumulated)
            should_calc = not accumulated < threshold
            accumulated = 0.0 if should_calc else accumulated
        previous_probe_states = probe
        if should_calc:
            h = probe
            for block in model.blocks[depth:]:
                h = block(h, signal)
            residual_window.append(h - x)
            probe_residual_window.append(probe - x)
        elif len(residual_window) >= 2:
            indicator = probe - x
            way = (probe_residual_window[-1] - probe_residual_window[-2]).abs().mean()
            gamma = (indicator - probe_residual_window[-2]).abs().mean() / way
            gammas.append(float(gamma))
            gamma = gamma.clip(1, 1.5)
            h = x + residual_window[-2] + gamma * (residual_window[-1] - residual_window[-2])
        else:
            h = x + residual_window[-1]
        row += "C" if should_calc else "F"
        outputs.append(model.head(h))
    return Decided(row, compared), outputs, gammas


@pytest.mark.parametrize(("depth", "retention"), [(1, 0.2), (2, 0), (1, 0)])
def test_dicache_is_its_source(depth: int, retention: float) -> None:
    """Its decisions, the model's outputs, and the ratios that weight its forecasts; with one value, reuse."""
    threshold, row = splitting(lambda t: dicache(t, depth, retention)[0])
    _, expected, gammas = dicache(threshold, depth, retention)
    stats, found = by_step(DiCache(threshold, depth, retention))
    (name,) = stats.decisions[0].strategies
    assert "".join(LETTERS[d.strategies[name]] for d in stats.decisions) == row and {"C", "F"} == set(row[5:-1])
    symbol = "advance(first_block)" if depth == 1 else f"advance(first_{depth}_blocks)"
    measured = [d.measured[name][symbol] for d in stats.decisions if symbol in d.measured.get(name, {})]
    assert measured == pytest.approx(gammas, rel=1e-3)
    assert min(gammas) < 1.5 and max(gammas) > 1, "some are not clipped"
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert stats.recompiles == 0


def test_dicache_of_a_probe_that_stands_still() -> None:
    """The change of the probe is 0, and its ratio NaN: such a step computes, and reports the reason."""
    model = tiny.build(LAYERS)
    with torch.no_grad():
        for part in (model.blocks[0].gates, model.blocks[0].attn, model.blocks[0].mlp):
            for parameter in part.parameters():
                parameter.zero_()
    compiled = tiny.rewritten(model, DiCache(1e9, retention=0.2))
    with compiled.trajectory(8):
        tiny.outputs(compiled, tiny.calls(8))
    stats = compiled.stats()
    assert (stats.reused, stats.misses[MissReason.NO_WEIGHTS]) == (0, 5)


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [SpeCa(1e9, floor=1e9, order=2), SpeCa(1e9, floor=1e9, order=1, span="block", store="bf16"),
     DiCache(1e9), DiCache(1e9, store="int8"), DiCache(1e9, lag=1)],
    ids=str,
)  # fmt: skip
def test_computed_steps_are_exact_and_forecasts_are_replayed(policy: Policy) -> None:
    result = verify(tiny.build(LAYERS), tiny.calls(12), policy, backend="aot_eager")
    assert result.exact and result.reused > 0, result


BAD: list[tuple[Any, dict[str, Any]]] = [
    *[(SpeCa, {"threshold": n}) for n in (-0.1, inf, nan, None, True, "x")],
    *[(SpeCa, {"decay": n}) for n in (0, -1, 1.1, nan, None)],
    *[(SpeCa, {"floor": n}) for n in (-0.1, inf, nan, None)],
    *[(SpeCa, {"min_streak": n}) for n in (-1, 1.0, None, True)],
    *[(SpeCa, {"max_streak": n}) for n in (0, 1.0, None)],
    *[(SpeCa, {"warmup": n}) for n in (0, 1.0, None)],
    *[(SpeCa, {"order": n}) for n in (-1, 9, 1.0, None)],
    *[(SpeCa, {"layer": n}) for n in (None, 1.0, True)],
    *[(SpeCa, {"error": n}) for n in ("l2", None, 1)],
    *[(SpeCa, {"span": n}) for n in ("stack", "output", 1)],
    *[(SpeCa, {"store": n}) for n in ("int8", "fp4", 1)],
    (SpeCa, {"kinds": ("conv",)}),
]


@pytest.mark.parametrize(("build", "given"), BAD, ids=lambda each: getattr(each, "__name__", str(each)))
def test_out_of_range(build: Any, given: dict[str, Any]) -> None:
    with pytest.raises(BadParameter, match=f"{next(iter(given))}="):
        build(**given)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("speca", SpeCa()),
        (
            "speca:threshold=7,decay=0.3,floor=0.1,max_streak=8,order=1,kinds=self+mlp",
            SpeCa(7, 0.3, 0.1, max_streak=8, order=1, kinds=("self", "mlp")),
        ),
        ("speca:error=mean,span=block,layer=-2,store=bf16", SpeCa(error="mean", span="block", layer=-2, store="bf16")),
        ("dicache:depth=2,retention=0", DiCache(depth=2, retention=0)),
    ],
)
def test_as_text(text: str, policy: Policy) -> None:
    assert parse(text) == policy
