"""The search over compiled segments: the plan's policy runs the searched row; thresholds, interruptions, refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_rewrite
from dit_rewrite.errors import BadParameter, BadTrajectory, FunctionFailed, NoSites, PlanMismatch, RefusalReason
from dit_rewrite.policies import DiTFastAttn, parse
from dit_rewrite.policy.plan import SHARED, WINDOWED, Choice, Plan, PlanRow
from dit_rewrite.policy.serialise import from_json, to_json
from dit_rewrite.policy.strategies import WindowResidual
from dit_rewrite.search.candidates import Candidates
from dit_rewrite.search.segment_runner import ALL, SegmentRunner, greedy_plan
from tests.helpers import tiny
from tests.helpers.broken import broken_blocks
from tests.helpers.image_models import build_flux, flux_calls
from tests.helpers.models import MODELS, output

STEPS = 5
CASE = MODELS["dit"]
SETTINGS: dict[str, Any] = {"steps": STEPS, "conditional": "first", "window": 0.25, "backend": "aot_eager"}
WITHOUT_ASC: dict[str, Any] = {"conditional": None, "strategies": ALL - SHARED}


class Sampler:
    """Calls the model once a step and keeps its outputs. Each call's latent depends on the output before."""

    build: Callable[[], Any] = staticmethod(CASE.build)
    calls: Callable[..., list[dict[str, Any]]] = staticmethod(CASE.inputs)

    def __init__(self, seed: int, steps: int = STEPS, told: int | None = STEPS) -> None:
        self.inputs, self.told, self.outputs = self.calls(steps, seed=seed), told, list[Tensor]()

    def __call__(self, model: Any) -> None:
        self.outputs = []
        if self.told is None:
            self._loop(model)
            return
        with model.trajectory(num_steps=self.told):
            self._loop(model)

    def _loop(self, model: Any) -> None:
        for arguments in self.inputs:
            latent = arguments["hidden_states"]
            moved = latent if not self.outputs else latent + 0.05 * self.outputs[-1][:, : latent.shape[1]]
            self.outputs.append(output(model(**{**arguments, "hidden_states": moved})).clone())


class Tiny(Sampler):
    """Calls a smaller model: it compiles sooner."""

    build, calls = staticmethod(tiny.build), staticmethod(tiny.calls)


class Conditioned(Tiny):
    """The same latents, with another condition."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.inputs = [{**given, "condition": given["condition"] + 1} for given in self.inputs]


class Guided(Sampler):
    """Guidance in two named calls a step: the other class belongs to the unconditional one."""

    def _loop(self, model: Any) -> None:
        change: Tensor | float = 0.0
        for given in self.inputs:
            latent = given["hidden_states"] + change
            for name, labels in (("cond", given["class_labels"]), ("uncond", given["class_labels"] + 1)):
                with model.cache_context(name):
                    found = output(model(**{**given, "hidden_states": latent, "class_labels": labels}))
                self.outputs.append(found.clone())
            change = 0.05 * (3 * self.outputs[-2] - 2 * self.outputs[-1])[:, : latent.shape[1]]


def sampling(calls: list[dict[str, Any]], steps: int = 3) -> Callable[[Any], None]:
    """A sampler that makes these calls within an explicit trajectory."""

    def sample(model: Any) -> None:
        with model.trajectory(num_steps=steps):
            for arguments in calls:
                model(**arguments)

    return sample


def search(samplers: list[Sampler], delta: float, **more: Any) -> Plan:
    torch.compiler.reset()
    return greedy_plan(samplers[0].build(), samplers, delta, **{**SETTINGS, **more})


def test_the_policy_runs_what_the_search_ran() -> None:
    """Two trajectories side by side: the outputs that the samplers used equal the policy's, bit for bit."""
    samplers = [Sampler(0), Sampler(1)]
    plan = search(samplers, 0.4)
    assert plan.table[0] == (Choice.FULL,) * 3
    assert len({choice for row in plan.table for choice in row}) >= 3, "a plan of several choices"
    assert plan.sites == tuple(f"transformer_blocks.{i}.attn1" for i in range(3))
    searched = [list(sampler.outputs) for sampler in samplers]
    torch.compiler.reset()
    model = dit_rewrite.compile(CASE.build(), DiTFastAttn(plan), backend="aot_eager", lowering="segments")
    for sampler, expected in zip(samplers, searched, strict=True):
        with torch.no_grad():
            sampler(model)
        assert all(map(torch.equal, sampler.outputs, expected))
        assert len(sampler.outputs) == len(expected) == STEPS
    assert model.stats().misses == {}
    # at most |S| (|M| + 1) / 2 attempts, a reference and the step itself, against |S| |M|; the first step only itself
    assert 0 < plan.work <= (STEPS * (4 * (3 + 1) / 2 + 2)) / (4 * 3 * STEPS)


def test_guidance_in_two_calls(tmp_path: Path) -> None:
    """Each stream has choices of its own, and the plan's policy runs what the search ran, bit for bit."""
    samplers = [Guided(0), Guided(1)]
    plan = search(samplers, 0.25, **WITHOUT_ASC, path=tmp_path / "plan.json")
    assert (plan.streams, len(plan.sites), plan.steps) == (("cond", "uncond"), 3, STEPS)
    assert plan.table[0] == (Choice.FULL,) * 6
    first, second = ([row[i : i + 3] for row in plan.table] for i in (0, 3))
    assert first != second and all(len(set(sum(half, ()))) > 1 for half in (first, second)), "two plans of some choices"
    assert plan.attention[0] >= 1 > min(plan.attention)
    assert 0 < plan.work <= (2 * (3 + 1) / 2 + 2) / (2 * 3)
    searched = [list(sampler.outputs) for sampler in samplers]
    torch.compiler.reset()
    policy = DiTFastAttn(tmp_path / "plan.json")
    model = dit_rewrite.compile(CASE.build(), policy, backend="aot_eager", lowering="segments")
    for sampler, expected in zip(samplers, searched, strict=True):
        with torch.no_grad():
            sampler(model)
        assert len(expected) == 2 * STEPS and all(map(torch.equal, sampler.outputs, expected))
    assert model.stats().misses == {}


def test_half_a_batch_is_not_shared_between_calls() -> None:
    with pytest.raises(BadParameter, match="conditional='first'.*without ASC: each step has calls of its own for co"):
        search([Guided(0)], 0.1)


def test_thresholds() -> None:
    """Nothing passes a threshold of zero; everything passes one above the largest loss, and the cheapest is taken."""
    assert search([Tiny(0)], 0.0).counts[Choice.FULL] == 2 * STEPS
    cheapest = search([Tiny(0)], 100.0)
    assert cheapest.counts == {**dict.fromkeys(Choice, 0), Choice.FULL: 2, Choice.AST: 2 * (STEPS - 1)}
    assert cheapest.evaluations == 2 * (STEPS - 1)


def test_without_guidance() -> None:
    """Fewer candidates: windows alone."""
    plan = search([Tiny(0)], 100.0, strategies=(Choice.WA_RS,), conditional=None)
    assert plan.counts[Choice.WA_RS] == 2 * (STEPS - 1)
    assert (plan.conditional, plan.window) == (None, 0.25)


def test_a_place_that_refuses_a_choice() -> None:
    """Cross-attention has no window: a choice that a site refuses is never in its plan."""
    case = MODELS["pixart_alpha"]
    settings = {**SETTINGS, "steps": 3, "kinds": ("self", "cross"), "strategies": (Choice.WA_RS, Choice.AST)}
    plan = greedy_plan(case.build(), [sampling(case.inputs(3))], 100.0, **settings)
    chosen = {site: plan.table[1][i] for i, site in enumerate(plan.sites)}
    assert {choice for site, choice in chosen.items() if site.endswith("attn1")} == {Choice.WA_RS}
    assert {choice for site, choice in chosen.items() if site.endswith("attn2")} == {Choice.AST}

    assert plan.evaluations == 3 * 2 * (3 - 1), "a refused choice is not even tried"
    assert plan.notes == (f"WA-RS refused at 3: {RefusalReason.OTHER_TOKENS}",)


# --- candidates in ascending cost -------------------------------------------------------------------------------------


WINDOW = 0.125


def spent(tokens: int, choice: Choice) -> int:
    """FLOPs of one attention of the tiny model at batch two: projections and core, by the paper's formulas."""
    width = tiny.WIDTH
    reach = int(WINDOW * tokens)
    pairs = tokens * (2 * reach + 1) - reach * (reach + 1) if choice in WINDOWED else tokens**2
    halves = 0 if choice is Choice.AST else 1 if choice in SHARED else 2
    return halves * (8 * tokens * width**2 + 4 * width * pairs)


@pytest.mark.parametrize(("tokens", "last"), [(8, (Choice.ASC, Choice.WA_RS)), (128, (Choice.WA_RS, Choice.ASC))])
def test_the_cheapest_candidate_comes_first(monkeypatch: pytest.MonkeyPatch, tokens: int, last: PlanRow) -> None:
    """By their FLOPs at these sizes: half of the batch is cheaper than a window with few tokens, but not with many. No
    candidate passes a threshold of zero, so all are tried."""
    seen: list[Candidates] = []
    orders = Candidates.orders
    monkeypatch.setattr(Candidates, "orders", lambda self, by_cost: seen.append(self) or orders(self, by_cost))
    attempts: list[tuple[int, Choice]] = []
    attempt = SegmentRunner.attempt
    monkeypatch.setattr(SegmentRunner, "attempt", lambda *a: attempts.append(a[1:]) or attempt(*a))
    settings = {**SETTINGS, "steps": 2, "window": WINDOW}
    plan = greedy_plan(tiny.build(), [sampling(tiny.calls(2, tokens=tokens), 2)], 0.0, **settings)
    assert plan.evaluations == 2 * 4
    assert attempts == [(i, c) for i in (0, 1) for c in (Choice.AST, Choice.WA_RS_ASC, *last)]
    (candidates,) = seen
    for place in candidates.places:
        full = candidates.cost(place, Choice.FULL)
        for choice in Choice:
            saved = spent(tokens, Choice.FULL) - spent(tokens, choice)
            assert full - candidates.cost(place, choice) == saved


def test_an_order_that_is_given_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence is tried in its order; a set by cost."""
    attempts: list[Choice] = []
    attempt = SegmentRunner.attempt
    monkeypatch.setattr(SegmentRunner, "attempt", lambda *a: attempts.append(a[2]) or attempt(*a))
    given = (Choice.WA_RS, Choice.ASC, Choice.AST)
    for strategies, expected in ((given, given), (set(given), (Choice.AST, Choice.ASC, Choice.WA_RS))):
        torch.compiler.reset()
        attempts.clear()
        settings = {**SETTINGS, "steps": 2, "strategies": strategies}
        greedy_plan(tiny.build(), [sampling(tiny.calls(2), 2)], 0.0, **settings)
        assert attempts == [*expected, *expected]


def test_what_saves_nothing_is_no_candidate() -> None:
    """A window of all tokens costs what full attention does."""
    settings = {**SETTINGS, "steps": 2, "strategies": [Choice.WA_RS], "window": (7,)}
    plan = greedy_plan(tiny.build(), [sampling(tiny.calls(2), 2)], 100.0, **settings)
    assert (plan.evaluations, plan.counts[Choice.WA_RS]) == (0, 0)
    torch.compiler.reset()
    plan = greedy_plan(tiny.build(), [sampling(tiny.calls(2), 2)], 100.0, **{**settings, "window": (6,)})
    assert (plan.evaluations, plan.counts[Choice.WA_RS]) == (2, 2)


# --- grids, parallel blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 4), "latent"], ids=str)
def test_windows_of_a_grid(tmp_path: Path, grid: Any) -> None:
    """Rows and columns have separate reaches; the plan's policy runs the searched row."""
    sampler = Sampler(0, steps=3, told=3)
    settings = {**SETTINGS, "steps": 3, "strategies": (Choice.WA_RS,), "window": (1, 2), "grid": grid, "metric": "mse"}
    plan = greedy_plan(CASE.build(), [sampler], 100.0, **settings, path=tmp_path / "plan.json")
    assert (plan.window, plan.grid, plan.counts[Choice.WA_RS]) == ((1, 2), grid, 3 * 2)
    assert (plan.metric, Plan.load(tmp_path / "plan.json")) == ("mse", plan)
    first, reused = plan.attention[0], plan.attention[-1]
    assert first > 1 > plan.attention[1] == reused > 0, "equation 1 takes a window more, and equation 2 one alone"
    assert plan.attention_share == pytest.approx(sum(plan.attention) / 3)
    expected = list(sampler.outputs)
    torch.compiler.reset()
    policy = DiTFastAttn(tmp_path / "plan.json")
    assert {rule.do for rule in policy.rules if rule.parts} == {WindowResidual((1, 2), grid)}
    assert policy.name == "DiTFastAttn(delta=100.0, metric=mse)"
    model = dit_rewrite.compile(CASE.build(), policy, backend="aot_eager", lowering="segments")
    with torch.no_grad():
        sampler(model)
    assert all(map(torch.equal, sampler.outputs, expected))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window": (1, 1)}, r"greedy_plan: window=\(1, 1\).*one for each axis of grid=None"),
        ({"window": (1, 1), "grid": (2, 2, 4)}, r"greedy_plan: window=\(1, 1\).*of grid=\(2, 2, 4\)"),
        ({"window": 4}, "greedy_plan: window=4"),
        ({"window": None}, "greedy_plan: window=None"),
        ({"grid": (4, 0)}, "greedy_plan: grid="),
        ({"grid": (3, 3)}, rf"greedy_plan: grid=\(3, 3\).*an attention \({RefusalReason.OTHER_GRID}\)"),
        ({"grid": "latent", "window": (1, 1, 1)}, rf"greedy_plan: grid='latent'.*\({RefusalReason.OTHER_AXES}\)"),
        ({"metric": "lpips"}, "search: metric='lpips'.*relative_error, relative_l2, mse, psnr, ssim, cosine"),
        ({"conditional": "cond"}, "greedy_plan: conditional='cond'"),
        ({"strategies": ["AST", 3]}, "greedy_plan: strategies="),
        ({"kinds": ("cross",)}, r"greedy_plan: kinds=\('cross',\).*kinds of the model's branches: self, mlp"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(changes: dict[str, Any], says: str) -> None:
    """The error comes before any step is searched."""
    with pytest.raises(BadParameter, match=says):
        search([Tiny(0)], 0.1, **changes)


def test_parallel_blocks_are_searched_too() -> None:
    """Those of FLUX have attention and MLP in one projection: AST reuses both, a window replaces the attention only."""
    settings = {**SETTINGS, "steps": 2, "conditional": None}
    joint = parallel = 1
    for choice, kinds in ((Choice.AST, None), (Choice.WA_RS, None), (Choice.AST, ("joint",))):
        torch.compiler.reset()
        more = {"strategies": (choice,), **({} if kinds is None else {"kinds": kinds})}
        plan = greedy_plan(build_flux(layers=1), [sampling(flux_calls(2), 2)], 100.0, **settings, **more)
        if kinds is None:
            assert plan.counts[choice] == joint + parallel == len(plan.sites)
            assert plan.notes == ()
        else:
            assert plan.counts[choice] == joint == len(plan.sites)
            assert plan.notes == (f"{parallel} parallel not searched (kinds: joint)",)


# --- interruptions and refusals ---------------------------------------------------------------------------------------


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    """The sampler fails in its fourth call; a second search replays the finished steps, and finds the same plan."""
    whole = search([Tiny(0)], 0.4)

    class Failing(Tiny):
        def _loop(self, model: Any) -> None:
            self.inputs = self.inputs[:3]
            super()._loop(model)
            raise ConnectionError

    path = tmp_path / "plan.json"
    with pytest.raises(FunctionFailed, match="ConnectionError"):
        search([Failing(0)], 0.4, path=path)
    assert not path.exists()
    for others, says in (
        ({}, "inputs: '[0-9a-f]{16}' there, '[0-9a-f]{16}' here"),
        ({"conditional": "second"}, "conditional: 'first' there, 'second' here; inputs:"),
    ):
        with pytest.raises(PlanMismatch, match=rf"another search \({says}"):
            search([Tiny(1)], 0.4, path=path, **others)
    with pytest.raises(PlanMismatch, match="inputs: "):
        search([Conditioned(0)], 0.4, path=path)
    resumed = search([Tiny(0)], 0.4, path=path)
    assert resumed.table == whole.table
    assert resumed.evaluations == whole.evaluations
    assert Plan.load(path) == resumed
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: search([Tiny(0)], 0.1, conditional=None), BadParameter, "conditional=None"),
        (lambda: search([Tiny(0, told=None)], 0.1), BadTrajectory, "searched only in explicit trajectories"),
        (lambda: search([Tiny(0, steps=2)], 0.1), BadTrajectory, "ended before the last step"),
    ],
    ids=["no half", "not told", "too short"],
)
def test_refusals(build: Callable[[], Plan], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build()


def guided(*names: Sequence[str | None]) -> Callable[[Any], None]:
    """Guidance in several calls a step, told apart by their conditioning. `names` has the names of each step's calls,
    None without one; the last holds for the other steps."""

    def sample(model: Any) -> None:
        with model.trajectory(num_steps=3):
            for step, arguments in enumerate(tiny.calls(3)):
                for place, name in enumerate(names[min(step, len(names) - 1)]):
                    with nullcontext() if name is None else model.cache_context(name):
                        model(**{**arguments, "condition": tiny.condition(7 + place)})

    return sample


def restarted(model: Any) -> None:
    sampling(tiny.calls(3)[:1])(model)
    sampling(tiny.calls(3))(model)


def resized(model: Any) -> None:
    sampling([*tiny.calls(3)[:2], *tiny.calls(3, tokens=12)[2:]])(model)


@pytest.mark.parametrize(
    ("samplers", "says"),
    [
        ([guided((None, None))], "called more than once at step 0: .*Give both halves of the guidance in one batch"),
        ([guided(("a", None))], "called more than once at step 0: .*name each call"),
        ([guided(("a", "a"))], "called more than once at step 0: "),
        ([guided(("a",), ("a", "b"))], "called more than once at step 1: "),
        ([guided(("a", "b"), ("a", "b", "c"))], "At step 1 the denoiser was called for the stream 'c' instead of 'a'"),
        ([guided(("a", "b"), ("a",))], "At step 2 the denoiser was called for the stream 'a' instead of 'b'"),
        ([guided(("a", "b"), ("b", "a"))], "At step 1 the denoiser was called for the stream 'b' instead of 'a'"),
        ([guided((None,), ("a",))], "At step 1 .* called for the stream 'a' with other arguments instead of one"),
        ([guided(("a", "b")), guided(("b", "a"))], "At step 0 the denoiser was called for the stream 'a' instead of"),
        ([restarted], "call for step 1 belongs to step 0 of another trajectory"),
        ([resized], "At step 2 the denoiser was compiled again, for other shapes"),
        ([sampling(tiny.calls(3)), sampling(tiny.calls(3, tokens=12))], "At step 0 the denoiser was compiled again"),
    ],
)
def test_samplers_that_call_otherwise(samplers: list[Any], says: str) -> None:
    """The error names the fault and says what to do."""
    with pytest.raises(BadTrajectory, match=says):
        greedy_plan(tiny.build(), samplers, 0.1, **{**SETTINGS, **WITHOUT_ASC, "steps": 3})


class Halves(torch.nn.Module):
    """Two denoisers in sequence, whose call Dynamo never sees: two whole graphs a call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = tiny.build(), tiny.build()

    @torch._dynamo.disable(recursive=False)
    def forward(self, hidden_states: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        return self.second(self.first(hidden_states, timestep, condition), timestep, condition)


def test_a_model_without_branches() -> None:
    """The error is the same as that of `compile`."""
    model = torch.nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(NoSites, match="Linear has no residual branch"):
        greedy_plan(model, [sampling([{"input": torch.ones(2, 4)}] * 3)], 0.1, **{**SETTINGS, "steps": 3})


@pytest.mark.parametrize("build", [broken_blocks(2).build, lambda: Halves().eval().requires_grad_(False)])
def test_a_model_of_several_graphs_is_refused(build: Callable[[], torch.nn.Module]) -> None:
    calls = tiny.calls(3) if not hasattr(build(), "time") else broken_blocks(2).inputs(3)
    with pytest.raises(BadTrajectory, match=r"several graphs \(graph breaks\).*fullgraph=True"):
        greedy_plan(build(), [sampling(calls)], 0.1, **{**SETTINGS, "steps": 3})


def test_a_plan_of_another_model_or_length(tmp_path: Path) -> None:
    """A policy of a plan checks the model and length that the plan was made for, also from a file and through JSON."""
    plan = search([Sampler(0)], 0.4, path=tmp_path / "plan.json")
    policy = parse(f"ditfastattn:plan={tmp_path / 'plan.json'}")
    assert policy == DiTFastAttn(plan) == from_json(to_json(policy))
    with pytest.raises(PlanMismatch, match="another model"):
        dit_rewrite.compile(MODELS["pixart_alpha"].build(), policy)
    model = dit_rewrite.compile(CASE.build(), policy, backend="aot_eager")
    with pytest.raises(PlanMismatch, match=f"{STEPS} steps, not 9"), model.trajectory(num_steps=9):
        pass
