"""Bad input: each case raises its own error, whose message says what happened and what to do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dit_rewrite import Rule, Where, compile
from dit_rewrite.demo.shapes.model import load, save
from dit_rewrite.errors import (
    BadArgument,
    BadParameter,
    BadTrajectory,
    BrokenUp,
    DamagedWeights,
    GradientsNeeded,
    NoSites,
    NotBoolean,
    NotCaptured,
    PolicyError,
    UnknownPolicy,
    UnknownSymbol,
)
from dit_rewrite.guards import step
from dit_rewrite.module import twin
from dit_rewrite.policies import FORA, Never, parse
from tests.helpers import tiny
from tests.helpers.tiny import calls, fora, outputs, rewritten, same

# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradients_of_a_parameter() -> None:
    model = tiny.build()
    next(model.parameters()).requires_grad_(True)
    compiled = rewritten(model)
    with pytest.raises(GradientsNeeded, match=r"a parameter of the model requires them.*torch\.no_grad\(\)"):
        compiled(**calls(1)[0])
    assert same(outputs(compiled, calls(4)), fora(model, calls(4))), "under no_grad it works"
    with pytest.raises(GradientsNeeded, match="a parameter"):
        compiled(**calls(1)[0])


@pytest.mark.parametrize("name", ["hidden_states", "condition"])
def test_gradients_of_an_input(name: str) -> None:
    model, arguments = tiny.build(), calls(1)[0]
    compiled = rewritten(model)
    arguments[name] = arguments[name].clone().requires_grad_()
    with pytest.raises(GradientsNeeded, match="an input requires them"):
        compiled(**arguments)
    with torch.inference_mode():
        assert torch.equal(compiled(**arguments), model(**arguments))


def test_gradients_enabled_and_not_needed() -> None:
    model, arguments = tiny.build(), calls(1)[0]
    assert torch.is_grad_enabled()
    assert torch.equal(rewritten(model)(**arguments), model(**arguments))


# --- policies ---------------------------------------------------------------------------------------------------------


def test_unknown_symbols() -> None:
    with pytest.raises(UnknownSymbol, match="uses temperature, weather, which guards do not have.*step, num_steps"):
        Rule(sympy.Symbol("weather") < sympy.Symbol("temperature"))
    with pytest.raises(UnknownSymbol, match="uses step, "):  # the same name, but not known to be an integer
        Rule(sympy.Symbol("step") > 2)
    Rule((step > 2) | sympy.true)


@pytest.mark.parametrize("guard", [step + 1, step, 3, None, [step > 2]], ids=str)
def test_guards_that_are_no_boolean(guard: Any) -> None:
    with pytest.raises(NotBoolean, match="is not a Boolean expression. Write a comparison"):
        Rule(guard)


@pytest.mark.parametrize("guard", [True, False, sympy.true, step > 2])
def test_guards_that_are_boolean(guard: Any) -> None:
    assert isinstance(Rule(guard).when, sympy.logic.boolalg.Boolean)


@pytest.mark.parametrize("interval", [0, -3, 2.0, "3", None])
def test_intervals_of_fora(interval: Any) -> None:
    with pytest.raises(BadParameter, match=rf"FORA: interval={interval!r} is out of range. Give .* whole number >= 1"):
        FORA(interval)
    assert FORA(1).rules


def test_kinds_and_anchors_of_fora() -> None:
    with pytest.raises(BadParameter, match="names among attention, mlp, self, cross, joint, parallel"):
        FORA(3, kinds=("attn",))
    with pytest.raises(BadParameter, match=r"Where: kinds=\('ff',\)"):
        Where(("ff",))
    with pytest.raises(BadParameter, match='anchor=\'end\'.*"start" or "paper"'):
        FORA(3, anchor="end")  # type: ignore[arg-type]


def test_a_strategy_that_is_none() -> None:
    with pytest.raises(ValueError, match="forecast"):
        Rule(step > 2, do="forecast")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (
            "",
            UnknownPolicy,
            "Give one of cached_attention, cfg_gate, dicache, ditfastattn, .*, fora, .*, never, .*, tgate",
        ),
        ("fortran:interval=3", UnknownPolicy, "No policy is called 'fortran:interval=3'"),
        ("fora", BadParameter, "fora:interval=…"),
        ("fora:interval", BadParameter, "name=value"),
        ("fora:interval=three", BadParameter, "a whole number >= 1"),
        ("fora:interval=0", BadParameter, "interval=0"),
        ("fora:period=3", BadParameter, "a name among interval, kinds, anchor"),
        ("fora:interval=3,kinds=self+ff", BadParameter, "names among attention"),
        ("never:interval=3", BadParameter, "a name among none"),
    ],
)
def test_policies_as_text(text: str, error: type[PolicyError], says: str) -> None:
    with pytest.raises(error, match=says):
        parse(text)


def test_policies_as_text_that_mean_something() -> None:
    assert parse("never") == Never()
    assert parse("fora:interval=3") == FORA(3)
    assert parse("FORA: interval = 2, anchor=paper ,kinds=self+mlp") == FORA(2, ("self", "mlp"), "paper")


# --- models -----------------------------------------------------------------------------------------------------------


class NormOnly(nn.Module):
    """A residual sum whose branch has no matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.norm(hidden_states)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "no residual sum at all"),
        (NormOnly(), "norm: the summand is computed from the stream without any matrix product"),
    ],
    ids=["no sum", "no contraction"],
)
def test_models_without_sites(model: nn.Module, says: str) -> None:
    model.requires_grad_(False)
    x = torch.ones(2, 4)
    with pytest.raises(NoSites, match=rf"(?s){type(model).__name__} has no residual branch.*{says}.*policies.Never"):
        compile(twin(model), FORA(3), backend="aot_eager")(x)
    assert torch.equal(compile(twin(model), Never(), backend="aot_eager")(x), model(x))


class Broken(nn.Module):
    """A branch that Dynamo splits in two."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = self.up(hidden_states)
        torch._dynamo.graph_break()
        return hidden_states + self.down(hidden)


def test_a_model_that_is_broken_up() -> None:
    """The error names the place of the graph breaks."""
    model = Broken().requires_grad_(False)
    says = r"any of the 2 graphs .* Of 1 graph breaks, 1 are at tests/test_errors.py:\d+: Call to .*TORCH_LOGS"
    with pytest.raises(BrokenUp, match=says):
        compile(model, FORA(3), backend="aot_eager")(torch.ones(2, 4))


def test_a_model_that_is_not_captured() -> None:
    """A call that Dynamo leaves to Python gives one warning."""
    model = nn.Linear(4, 4).requires_grad_(False)
    model.forward = torch.compiler.disable(model.forward)
    compile(model, FORA(3), backend="aot_eager")
    with pytest.warns(
        UserWarning, match="FORA.* has no effect on Linear: Dynamo ran the call without a captured graph"
    ):
        model(torch.ones(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(2, 4))


@pytest.mark.parametrize("damage", ["truncated", "no header", "missing", "names", "shapes"])
def test_damaged_weights(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "weights.safetensors"
    good = nn.Linear(4, 4)
    save(good, path)
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[:-10])
    elif damage == "no header":
        path.write_bytes(b"\0" * 100)
    elif damage == "missing":
        path.unlink()
    elif damage == "names":
        save_file({"weight": torch.ones(4, 4), "offset": torch.ones(4)}, path)
    else:
        save_file({"weight": torch.ones(4, 3), "bias": torch.ones(4)}, path)
    with pytest.raises(DamagedWeights, match=r"(?s)weights\.safetensors cannot be used.*Restore the file, or train it"):
        load(nn.Linear(4, 4), path)
    path.write_bytes(whole)
    assert torch.equal(load(nn.Linear(4, 4), path).weight, good.weight.half().float())


# --- compile and the runtime ------------------------------------------------------------------------------------------


def test_backends_and_their_options() -> None:
    model = tiny.build()
    with pytest.raises(BadArgument, match='backend=\'eager\'.*"inductor", "aot_eager" or a callable'):
        compile(model, FORA(3), backend="eager")
    for more in ({"mode": "max-autotune"}, {"options": {"max_autotune": True}}):
        with pytest.raises(BadArgument, match='none, unless backend is "inductor"'):
            compile(model, FORA(3), backend="aot_eager", **more)
        compile(model, FORA(3), **more)


def test_explaining_what_was_not_captured() -> None:
    compiled = rewritten(tiny.build())
    with pytest.raises(NotCaptured, match=r"explain\(\) needs the captured graph.*Call the compiled model once"):
        compiled.explain()
    outputs(compiled, calls(1))
    assert len(compiled.explain().sites) == tiny.SITES


def test_trajectories_inside_one_another() -> None:
    model = tiny.build()
    compiled = rewritten(model)
    with compiled.trajectory(7):
        found = outputs(compiled, calls(7)[:2])
        with pytest.raises(BadTrajectory, match="Leave the outer context first"), compiled.trajectory(7):
            pass
        found += outputs(compiled, calls(7)[2:])
    assert same(found, fora(model, calls(7))), "the outer trajectory goes on"


@pytest.mark.parametrize("num_steps", [0, -1])
def test_trajectories_without_a_step(num_steps: int) -> None:
    compiled = rewritten(tiny.build())
    expected = pytest.raises(BadTrajectory, match=f"num_steps={num_steps} is not positive. Give num_steps >= 1")
    with expected, compiled.trajectory(num_steps):
        pass
    with compiled.trajectory(1):
        outputs(compiled, calls(1))
