"""Strategies inside attention on named models, against naive references of DiTFastAttn and CachedAttention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from sympy import Eq, Or
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dit_rewrite
from dit_rewrite import BlockwiseReuse, Policy, Reuse, Rule, ShareGuidance, Where, WindowResidual
from dit_rewrite.compiler import state_memory
from dit_rewrite.errors import BadOpArgument, RefusalReason, StatesTooLarge
from dit_rewrite.guards import step
from dit_rewrite.kernels.blockwise_attention import state_bytes
from dit_rewrite.kernels.blockwise_attention.state import State
from dit_rewrite.module import twin
from dit_rewrite.policies import CachedAttention
from dit_rewrite.policy.strategies import Strategy
from dit_rewrite.runtime.session import Observation
from examples.stdit import sincos
from tests.helpers import tiny
from tests.helpers.broken import broken_blocks
from tests.helpers.models import MODELS, output, prepare
from tests.references.ditfastattn import INF, Paper, band, square
from tests.references.fora import ModuleCache

ATTENTION = ("attention", "parallel")
TOLERANCE = 1e-5  # of the largest element: roundings of fp32
slow = pytest.mark.slow


def scheduled(schedule: str, window: WindowResidual, half: int, kinds: tuple[str, ...] = ATTENTION) -> Policy:
    """The policy that follows a schedule of `Paper`."""
    halves: tuple[Literal["first"], Literal["second"]] = ("first", "second")
    share = ShareGuidance(halves[half])
    do: dict[str, Strategy | tuple[Strategy, ...]] = {"A": Reuse(), "W": window, "S": share, "X": (window, share)}
    at = {letter: [i for i, other in enumerate(schedule) if other == letter] for letter in do}
    return Policy(tuple(Rule(Or(*(Eq(step, i) for i in at[x])), do[x], Where(kinds)) for x in do if at[x]))


def run(model: nn.Module, inputs: Sequence[dict[str, Any]], policy: Policy, lowering: str) -> list[Tensor]:
    """The outputs of the rewritten model at each step of an explicit trajectory."""
    compiled = dit_rewrite.compile(twin(model), policy, backend="aot_eager", lowering=lowering)
    with torch.no_grad(), compiled.trajectory(len(inputs)):
        found = [output(compiled(**arguments)).clone() for arguments in inputs]
    assert (compiled.stats().misses, compiled.stats().late_variants) == ({}, 0)
    return found


def plain(model: nn.Module, inputs: Sequence[dict[str, Any]]) -> list[Tensor]:
    """The outputs of the untouched model."""
    with torch.no_grad():
        return [output(model(**arguments)).clone() for arguments in inputs]


def apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """The largest difference at each step, relative to the largest element."""
    pairs = zip(found, expected, strict=True)
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]


# --- DiTFastAttn ------------------------------------------------------------------------------------------------------

EVERYTHING = "FWSWXAFX"  # the second W reads the R of S, the last X that of the F before it
QUARTER = WindowResidual(0.25)
GRID = WindowResidual(1, grid=(4, 4))


@pytest.mark.parametrize(
    ("name", "lowering", "window", "seen", "half"),
    [
        pytest.param("dit", "variants", QUARTER, band(4), 0, id="dit-variants"),
        pytest.param("pixart_alpha", "segments", GRID, square(4, 1), 1, id="pixart-segments"),
        pytest.param("dit", "segments", GRID, square(4, 1), 1, id="dit-segments", marks=slow),
        pytest.param("pixart_alpha", "variants", QUARTER, band(4), 0, id="pixart-variants", marks=slow),
        pytest.param("omnigen", "variants", QUARTER, band(5), 1, id="omnigen-mask", marks=slow),
    ],
)
def test_ditfastattn(name: str, lowering: str, window: WindowResidual, seen: Any, half: int) -> None:
    """All strategies in turn on self-attention: equal to the paper's at every step, within fp32 rounding."""
    case = MODELS[name]
    model, inputs = case.build(), case.inputs(len(EVERYTHING))
    expected = Paper(EVERYTHING, seen, half).run(model, inputs)
    found = run(model, inputs, scheduled(EVERYTHING, window, half, ("self",)), lowering)
    assert max(apart(found, expected)) < TOLERANCE
    changed = [error > 0.05 for error in apart(plain(model, inputs), expected)]
    assert changed == [letter != "F" for letter in EVERYTHING]


def test_the_reference_tells_strategies_apart() -> None:
    """Another half, window or schedule, or a residual that ASC does not refresh, differs by far more than the
    tolerance."""
    model, inputs = MODELS["dit"].build(), MODELS["dit"].inputs(8)
    expected = Paper(EVERYTHING, band(4)).run(model, inputs)
    others = [
        Paper(EVERYTHING, band(4), half=1),
        Paper(EVERYTHING, band(5)),
        Paper(EVERYTHING, square(4, 1)),
        Paper(EVERYTHING, band(4), refresh=False),
        Paper(EVERYTHING.replace("W", "X"), band(4)),
        Paper(EVERYTHING.replace("S", "F"), band(4)),
        Paper(EVERYTHING.replace("W", "F"), band(4)),
    ]
    for other in others:
        assert max(apart(other.run(model, inputs), expected)) > 1000 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "kinds", "seen"),
    [
        pytest.param("flux", ("joint",), band(4, first=6), id="flux-double", marks=slow),
        pytest.param(
            "sd3",
            ("joint",),
            band(4, last=6),
            id="sd3",
        ),
        pytest.param(
            "flux",
            ("joint", "parallel"),
            band(4, first=6),
            id="flux-single",
            marks=slow,
        ),
        pytest.param(
            "cogvideox",
            ("joint",),
            band(8, first=6),
            id="cogvideox",
            marks=slow,
        ),
    ],
)
def test_text_in_joint_attention(name: str, kinds: tuple[str, ...], seen: Any) -> None:
    """Text tokens, before or behind the image's, attend to all tokens and all attend to them; the window is of the
    image."""
    schedule = "FWWFW"
    case = MODELS[name]
    model, inputs = case.build(), case.inputs(len(schedule))
    reference = Paper(schedule, seen, cores=2 if kinds == ("joint",) and name == "flux" else None)
    expected = reference.run(model, inputs)
    found = run(model, inputs, scheduled(schedule, QUARTER, 0, kinds), "variants")
    assert max(apart(found, expected)) < TOLERANCE


# --- when a residual or state is stored -------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    """Records each call of one of our ops that replaces attention, with its batch size."""

    def __init__(self, seen: list[tuple[str, int]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dit_rewrite":
            self.seen.append((func._opname, args[0].shape[0]))
        return func(*args, **(kwargs or {}))


def ops_of(model: nn.Module, inputs: Sequence[dict[str, Any]], policy: Policy) -> list[dict[tuple[str, int], int]]:
    """How often each of our ops is called at each step, with its batch size."""
    seen: list[tuple[str, int]] = []

    def backend(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        def noting(*args: Any) -> Any:
            with Ops(seen):
                return gm(*args)

        return noting

    compiled = dit_rewrite.compile(twin(model), policy, backend=backend)
    found = []
    with torch.no_grad(), compiled.trajectory(len(inputs)):
        for arguments in inputs:
            seen.clear()
            compiled(**arguments)
            found.append(dict(Counter(seen)))
    return found


def test_the_residual_is_made_where_a_later_step_reads_it() -> None:
    """Two attentions: R = O - W costs one window each. It is not made before a step that computes, nor at the last
    step."""
    schedule = "FFWSXAFAWF"
    found = ops_of(tiny.build(), tiny.calls(10), scheduled(schedule, QUARTER, 0))
    whole, half = {("window_reuse", 2): 2}, {("window_reuse", 1): 2}
    assert found == [{}, whole, whole, half, half, {}, whole, {}, whole, {}]


class Small(nn.Module):
    """One self-attention with two heads of 16 channels, over any number of tokens and samples."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.embed, self.qkv, self.out, self.head = (
            nn.Linear(*sizes) for sizes in ((4, 32), (32, 96), (32, 32), (32, 4))
        )
        prepare(self, torch.float32)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = self.embed(hidden_states) + 0.1 * sincos(timestep, 32).to(hidden_states.dtype)[:, None]
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.head(x + self.out(attended.transpose(1, 2).flatten(2)))


def small_calls(steps: int, batch: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """The first of 15 steps of a trajectory of eight tokens."""
    calls = tiny.calls(15, seed)[:steps]
    return [{k: torch.cat([c[k], c[k][:1]])[:batch] for k in ("hidden_states", "timestep")} for c in calls]


def test_a_state_is_filled_once_and_then_changed_in_place() -> None:
    policy = Policy((Rule(step > 0, BlockwiseReuse(0.05, 4)),))
    fill, go_on = {("blockwise_fill", 2): 1}, {("blockwise_attention", 2): 1}
    assert ops_of(Small(), small_calls(4), policy) == [fill, go_on, go_on, go_on]
    again = Policy((Rule(Or(Eq(step, 1), Eq(step, 4)), BlockwiseReuse(0.05, 4)),))
    assert ops_of(Small(), small_calls(6), again) == [fill, go_on, {}, fill, go_on, {}]


# --- CachedAttention --------------------------------------------------------------------------------------------------


def counters(observed: Observation) -> list[list[int]]:
    """For each stored state: the pairs of tile and block recomputed since it was filled, and the pairs looked at."""
    states = (held for held in observed.slots if held is not None and len(held) == len(State._fields) - 3)
    return [held[State._fields.index("counters")][:2].tolist() for held in states]


@pytest.mark.parametrize("lowering", ["variants", "segments"])
@pytest.mark.parametrize("threshold", [-INF, 0.0, 3.0, INF])
def test_thresholds(threshold: float, lowering: str) -> None:
    """-inf and 0 both give plain attention, but 0 reuses unchanged pairs; inf reuses everything from the first step."""
    model, inputs = Small(), small_calls(4)
    inputs[2] = inputs[1]  # nothing changed
    compiled = tiny.rewritten(model, Policy((Rule(step > 0, BlockwiseReuse(threshold, 4)),)), lowering=lowering)
    observed: list[Observation] = []
    compiled._backend.session.observer = observed.append
    seen, kept = [], []
    with compiled.trajectory(4):
        found = []
        for i, arguments in enumerate(inputs):
            with compiled.cache_context("main", step_index=i):  # or equal inputs would count as one step
                found += tiny.outputs(compiled, [arguments])
            seen += counters(observed[-1])
            kept.append(list(compiled.stats().kept_blocks.values()))
    pairs = 2 * 2 * 1 * 2  # batch, heads, tiles of queries, blocks of keys
    assert [count for _, count in seen] == [0, pairs, 2 * pairs, 3 * pairs]
    recomputed = [count for count, _ in seen]
    assert kept == [[], *([(all - again, all)] for again, all in seen[1:])]
    computed = plain(model, inputs)
    if threshold == INF:
        with torch.no_grad(), ModuleCache([model.out]) as cache:
            for cache.reuse, arguments, out in zip((False, True, True, True), inputs, found, strict=True):
                assert apart([out], [model(**arguments)])[0] < TOLERANCE
        assert recomputed == [0, 0, 0, 0] and max(apart(found, computed)) > 0.05
    elif threshold > 0:
        assert 0 < recomputed[1] < pairs and recomputed[2] == recomputed[1]
        assert 0.01 < max(apart(found, computed)) < 0.1
    else:
        assert recomputed == [0, pairs, 2 * pairs, 3 * pairs] if threshold < 0 else [0, pairs, pairs, 2 * pairs]
        assert max(apart(found, computed)) < TOLERANCE


def test_certificates() -> None:
    """The only attention of the model is off by no more than its certificate at each reusing step.

    The layers behind it are linear, so that the error of the output has a bound in terms of the attention's.
    """
    model, inputs = Small(), small_calls(4)
    gain = (model.head.weight @ model.out.weight).abs().sum(1).max().item()
    greatest = []
    for threshold in (0.0, 3.0, INF):
        compiled = tiny.rewritten(model, CachedAttention(threshold, 4, kinds=("self",), certify=True))
        with compiled.trajectory(4):
            found = tiny.outputs(compiled, inputs)
        errors = [(a - b).abs().max().item() for a, b in zip(found, plain(model, inputs), strict=True)]
        certificates = compiled.stats().certificates
        assert [certificate.step for certificate in certificates] == [1, 2, 3]
        for error, certificate in zip(errors[1:], certificates, strict=True):
            assert error <= gain * certificate.bound + 1e-6
        greatest.append((max(errors), max(certificate.bound for certificate in certificates)))
    assert greatest[0][1] < 1e-3 < greatest[1][1] < greatest[2][1] and greatest[1][0] > 1e-3


def test_no_certificates_unless_asked() -> None:
    compiled = tiny.rewritten(Small(), CachedAttention(INF, 4, kinds=("self",)))
    with compiled.trajectory(3):
        tiny.outputs(compiled, small_calls(3))
    assert compiled.stats().certificates == [] and compiled.stats().kept_blocks


@pytest.mark.parametrize("padding", [True, pytest.param(False, marks=slow)], ids=["padded", "not padded"])
def test_cross_attention_with_a_padding_mask(padding: bool) -> None:
    """PixArt's text: the first block reuses the result of the first step, the others compute; padding is ignored."""
    case, steps = MODELS["pixart_alpha"], 3
    model, inputs = case.build(), case.inputs(steps)
    mask = inputs[0]["encoder_attention_mask"]
    assert mask.tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    padded = {"encoder_attention_mask": mask if padding else torch.ones_like(mask)}
    inputs = [{**arguments, **padded} for arguments in inputs]
    thresholds = {"*.0.attn2": INF, "*.[12].attn2": -INF}
    rules = (Rule(step > 0, BlockwiseReuse(t, 3, "paper"), Where(names=names)) for names, t in thresholds.items())
    policy = Policy(tuple(rules))
    found = run(model, inputs, policy, "variants")
    with torch.no_grad(), ModuleCache([model.transformer_blocks[0].attn2]) as cache:  # type: ignore[union-attr, index]
        expected = []
        for cache.reuse, arguments in zip((False, True, True), inputs, strict=True):
            expected.append(output(model(**arguments)))
    assert max(apart(found, expected)) < TOLERANCE
    assert min(apart(found, plain(model, inputs))[1:]) > 0.01
    text = inputs[0]["encoder_hidden_states"].clone()
    text[1, 4:] = 7.0
    other = run(model, [{**arguments, "encoder_hidden_states": text} for arguments in inputs], policy, "variants")
    assert (max(apart(other, found)) < TOLERANCE) is padding


# --- nothing stale ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [True, False], ids=["explicit", "inferred"])
@pytest.mark.parametrize("do", [WindowResidual(0.25), BlockwiseReuse(3.0, 4)], ids=["window", "blockwise"])
def test_nothing_of_one_trajectory_reaches_another(do: Strategy, explicit: bool) -> None:
    """Trajectories A, B cut short, A: both runs of A are equal bit for bit, though a state changes in place; B
    differs."""
    model, policy = Small(), Policy((Rule(step > 0, do),))
    compiled = tiny.rewritten(model, policy)

    def trajectory(seed: int, steps: int) -> list[Tensor]:
        inputs = small_calls(steps, seed=seed)
        if not explicit:
            return tiny.outputs(compiled, inputs)
        with compiled.trajectory(5):
            return tiny.outputs(compiled, inputs)

    first, other, second = trajectory(0, 5), trajectory(1, 3), trajectory(0, 5)
    assert tiny.same(first, second)
    assert tiny.same(other, tiny.outputs(tiny.rewritten(model, policy), small_calls(3, seed=1)))
    assert min(apart(first[:3], other)) > 0.1
    assert max(apart(first, plain(model, small_calls(5)))[1:]) > 10 * TOLERANCE


def test_a_step_that_is_left_out() -> None:
    """The caller gives steps 0, 1, 2 and 4. Step 2 stored nothing for step 4, because step 3 was to compute: 4
    computes."""
    model, inputs = Small(), small_calls(5)
    compiled = tiny.rewritten(model, scheduled("FWFFW", QUARTER, 0))
    found, steps = [], (0, 1, 2, 4)
    with compiled.trajectory(5):
        for i in steps:
            with compiled.cache_context("main", step_index=i):
                found += tiny.outputs(compiled, [inputs[i]])
    expected = Paper("FWFF", band(2)).run(model, [inputs[i] for i in steps])
    assert max(apart(found, expected)) < TOLERANCE


def test_layers_that_become_known_with_the_first_call() -> None:
    """Behind graph breaks a value that a later step may read is stored, though the guard is known only after the
    call."""
    case = broken_blocks(2)
    compiled = tiny.rewritten(case.build(), Policy((Rule(step > 0, QUARTER, Where(fraction=(0, 0.5))),)))
    with compiled.trajectory(3):
        tiny.outputs(compiled, case.inputs(3))
    assert compiled.stats().misses == {}
    assert compiled.stats().reused >= 2


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "batch", "do", "reasons"),
    [
        (Small(), 3, ShareGuidance("first"), {RefusalReason.ODD_BATCH: 1}),
        (Small(), 2, BlockwiseReuse(0.1, 4, "paper"), {RefusalReason.MOVING_KEYS: 1}),
        (Small(causal=True), 2, BlockwiseReuse(0.1, 4), {RefusalReason.CAUSAL: 1}),
        (Small(causal=True), 2, WindowResidual(0.25), {RefusalReason.CAUSAL: 1}),
        (Small(), 2, WindowResidual(1, grid=(3, 3)), {RefusalReason.OTHER_GRID: 1}),
        (Small(), 2, WindowResidual((1, 1), grid="latent"), {RefusalReason.OTHER_AXES: 1}),
    ],
    ids=["odd batch", "moving keys", "causal blocks", "causal window", "another grid", "other axes"],
)
def test_refusals(model: nn.Module, batch: int, do: Strategy, reasons: dict[RefusalReason, int]) -> None:
    """A strategy that is not possible is refused with a reason, and the model computes."""
    inputs = small_calls(2, batch)
    compiled = tiny.rewritten(model, Policy((Rule(step > 0, do),)))
    with pytest.warns(UserWarning, match="reaches no site of Small"):
        found = tiny.outputs(compiled, inputs[:1])
    found += tiny.outputs(compiled, inputs[1:])
    assert dict(Counter(refusal.reason for refusal in compiled.explain().refused)) == reasons
    assert tiny.same(found, plain(model, inputs))


def test_states_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call says so, and not the allocator in the middle of a trajectory."""
    needed = state_bytes((2, 2, 8, 16), (2, 2, 8, 16), torch.float32, 4, kv_static=False)
    for memory in (2 * needed, 2 * needed - 1):
        monkeypatch.setattr(state_memory, "device_memory", lambda _, memory=memory: memory)
        compiled = tiny.rewritten(Small(), Policy((Rule(step > 0, BlockwiseReuse(0.1, 4)),)))
        if memory == 2 * needed:
            tiny.outputs(compiled, small_calls(1))
        else:
            with pytest.raises(StatesTooLarge, match="at 1 sites"):
                tiny.outputs(compiled, small_calls(1))


def test_heads_that_are_too_narrow() -> None:
    """Blockwise attention does not support heads of 8 channels; a window does."""
    compiled = tiny.rewritten(tiny.build(), Policy((Rule(step > 0, BlockwiseReuse(0.1, 4)),)))
    with pytest.warns(UserWarning, match="reaches no site"):
        tiny.outputs(compiled, tiny.calls(1))
    assert [refusal.reason for refusal in compiled.explain().refused] == [RefusalReason.HEAD_SIZE] * 2


@pytest.mark.parametrize(
    ("window", "name"),
    [
        (WindowResidual(8), "window"),
        (WindowResidual((1, 2), grid=(2, 4)), None),
        (WindowResidual((2, 1), grid=(2, 4)), "window"),
        (WindowResidual(7), None),
    ],
    ids=str,
)
def test_windows_that_do_not_fit(window: WindowResidual, name: str | None) -> None:
    """Eight tokens: a larger window raises an error at the first call."""
    compiled = tiny.rewritten(Small(), Policy((Rule(step > 0, window),)))
    if name is None:
        assert len(tiny.outputs(compiled, small_calls(2))) == 2
        assert compiled.stats().reused > 0
        return
    with pytest.raises(BadOpArgument, match=rf"window_reuse: {name}="):
        tiny.outputs(compiled, small_calls(1))
