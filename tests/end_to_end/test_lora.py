"""LoRA adapters on a rewritten denoiser, by every method that diffusers has for them, before compiling and after.

Each method is called on the rewritten model and on a plain copy; both must give the same output at every step that
computes. The reuse goes on, with values of the current trajectory only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_rewrite
from dit_rewrite.errors import MissReason
from dit_rewrite.policies import FORA, FirstBlockCache
from dit_rewrite.policy.rules import Policy
from tests.end_to_end.pipelines.registry import PIPELINES
from tests.helpers.image_models import build_flux, flux_calls
from tests.helpers.tiny import same

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")

STEPS = 4
TARGETS = ["context_embedder", "to_q", "ff.net.2", "proj_out"]
Action = Callable[[Any], Any]
build: Callable[[], Any] = partial(build_flux, layers=1)  # sites of two self-attentions and two MLPs


def add(model: Any, name: str = "one", seed: int = 0, rank: int = 2) -> None:
    """Add an adapter with random weights, which becomes the active one."""
    config = peft.LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(config, adapter_name=name)
    model.requires_grad_(False)


def add_second(model: Any) -> None:
    """Add another adapter and activate both."""
    add(model, "two", seed=1)
    model.set_adapters(["one", "two"], [0.7, 0.4])


def load(model: Any, seed: int, **options: Any) -> None:
    """Load an adapter as from a file, with random weights drawn from the seed."""
    other = build()
    add(other, seed=seed)
    weights = peft.get_peft_model_state_dict(other, adapter_name="one")
    model.load_lora_adapter(weights, prefix=None, adapter_name="one", **options)
    model.requires_grad_(False)


ACTIONS: dict[str, Action] = {
    "add": add,
    "add a second": add_second,
    "set scales": lambda model: model.set_adapters(["one", "two"], [0.2, 1.3]),
    "fuse": lambda model: model.fuse_lora(),
    "unfuse": lambda model: model.unfuse_lora(),
    "disable": lambda model: model.disable_lora(),
    "enable": lambda model: model.enable_lora(),
    "delete one": lambda model: model.delete_adapters("two"),
    "unload": lambda model: model.unload_lora(),
    "load": partial(load, seed=2),
    "hot-swap": partial(load, seed=3, hotswap=True),
}
POLICIES: dict[str, tuple[Policy, str, int]] = {  # the steps that compute, and the number of sites with a rule
    "FORA": (FORA(2), "CRCR", 4),
    "FirstBlockCache": (FirstBlockCache(threshold=9.0, warmup=1), "CRRR", 1),
}


@torch.no_grad()
def outputs(model: Any, inputs: list[dict[str, Any]]) -> list[Tensor]:
    """Copies of the model's output at each call."""
    return [model(**arguments)[0].clone() for arguments in inputs]


def rewritten(plain: nn.Module, policy: Policy) -> Any:
    """A copy of the model, compiled."""
    return dit_rewrite.compile(copy.deepcopy(plain), policy, backend="aot_eager")


def check(model: Any, plain: Any, row: str, sites: int) -> list[Tensor]:
    """Run one trajectory of both models and return the plain outputs; computed steps are equal, the others reuse."""
    inputs = flux_calls(len(row))
    expected, before = outputs(plain, inputs), model.stats()
    with model.trajectory(len(row)):
        found = outputs(model, inputs)
    run = model.stats().since(before)
    equal = "".join("C" if torch.equal(a, b) else "R" for a, b in zip(found, expected, strict=True))
    assert equal == row
    assert (run.computed, run.reused) == (row.count("C") * sites, row.count("R") * sites)
    assert run.misses == {}
    return expected


FEW = ("add", "fuse", "unfuse", "unload")


@pytest.mark.parametrize(("name", "names"), [("FORA", tuple(ACTIONS)), ("FirstBlockCache", FEW)])
def test_adapters_change_after_compiling(name: str, names: tuple[str, ...]) -> None:
    """Each method in turn on one rewritten model: it changes the outputs, and reuse goes on."""
    policy, row, sites = POLICIES[name]
    plain = build()
    model = rewritten(plain, policy)
    seen = [check(model, plain, row, sites)]
    for action in map(ACTIONS.__getitem__, names):
        action(model)
        action(plain)
        seen.append(check(model, plain, row, sites))
    moved = [not same(a, b) for a, b in zip(seen, seen[1:], strict=False)]
    assert all(changed for changed, action in zip(moved, names, strict=True) if action not in ("fuse", "unfuse"))


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("FORA", ("add", "add a second", "set scales")),
        ("FORA", ("add", "fuse")),
        ("FORA", ("add", "disable")),
        ("FirstBlockCache", ("add", "add a second")),
    ],
)
def test_adapters_from_before_compiling(name: str, names: tuple[str, ...]) -> None:
    """The sites are those of the model without adapters, and computed steps equal the plain model."""
    policy, row, sites = POLICIES[name]
    plain = build()
    for action in names:
        ACTIONS[action](plain)
    check(rewritten(plain, policy), plain, row, sites)


def grow(model: Any) -> None:
    """Change the adapter's weights in place."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(2)


@pytest.mark.parametrize(
    ("change", "row", "misses"),
    [
        (lambda model: model.set_adapters("one", 0.3), "CRCCCR", {MissReason.CHANGED_GRAPH: 4}),
        (lambda model: model.disable_lora(), "CRCCCR", {MissReason.CHANGED_GRAPH: 4}),
        (lambda model: model.fuse_lora(), "CRCCCR", {MissReason.CHANGED_GRAPH: 4}),
        (grow, "CRCCCR", {MissReason.CHANGED_WEIGHTS: 4}),
    ],
    ids=["set scale", "disable", "fuse", "in place"],
)
def test_adapters_change_within_a_trajectory(change: Action, row: str, misses: dict[MissReason, int]) -> None:
    """The change comes before the fourth step, which would reuse: it computes, and the next step follows the policy.

    Weights that change in place keep the graph; the others have another one. The ops hoisted from the text run again.
    """
    plain, inputs = build(), flux_calls(6)
    add(plain)
    model = rewritten(plain, FORA(2))
    with model.trajectory(6):
        found = outputs(model, inputs[:3])
        change(model)
        found += outputs(model, inputs[3:])
    expected = outputs(plain, inputs[:3])
    change(plain)
    expected += outputs(plain, inputs[3:])
    assert "".join("C" if torch.equal(a, b) else "R" for a, b in zip(found, expected, strict=True)) == row
    stats = model.stats()
    assert (stats.computed, stats.reused) == (4 * row.count("C"), 4 * row.count("R"))
    assert stats.misses == misses
    assert stats.hoists == 2


def test_adapters_of_a_pipeline() -> None:
    """The pipeline's own methods reach the rewritten denoiser: the first step equals the plain pipeline's, and the
    reuse goes on."""
    case = PIPELINES["flux"]

    def first_step(pipe: Any, steps: int) -> Tensor:
        seen: list[Tensor] = []

        def at_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append(tensors["latents"].clone())
            pipe._interrupt = len(seen) == steps
            return tensors

        case.call(pipe, 4, callback_on_step_end=at_step_end)
        return seen[0]

    plain, pipe = case.build(), case.build()
    for each in (plain, pipe):
        each.register_modules(transformer=build())
        add(each.transformer)
    dit_rewrite.enable(pipe, FORA(2), backend="aot_eager", quiet=True)
    seen = []
    for change in PIPELINE_ACTIONS:
        change(pipe), change(plain)
        before = pipe.transformer.stats()
        seen.append(first_step(pipe, 4))
        assert torch.equal(seen[-1], first_step(plain, 1))
        run = pipe.transformer.stats().since(before)
        assert (run.computed, run.reused, run.misses) == (8, 8, {})
    assert not any(torch.equal(a, b) for a, b in zip(seen[:4], seen[1:4], strict=False))


PIPELINE_ACTIONS: tuple[Action, ...] = (
    lambda pipe: pipe.set_adapters("one", 1.0),
    lambda pipe: pipe.set_adapters("one", 0.3),
    lambda pipe: pipe.disable_lora(),
    lambda pipe: pipe.enable_lora(),
    lambda pipe: pipe.fuse_lora(),
    lambda pipe: pipe.unfuse_lora(),
    lambda pipe: pipe.unload_lora_weights(),
)
