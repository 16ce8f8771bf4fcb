"""Windows of two and three axes: against dense masks in float64, replayed, and refused with reasons."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dit_rewrite
from dit_rewrite import Policy, Rule, Where, WindowResidual
from dit_rewrite.errors import RefusalReason
from dit_rewrite.guards import step
from dit_rewrite.module import twin
from dit_rewrite.policy.serialise import from_json, to_json
from tests.end_to_end.test_attention_replay import replayed
from tests.helpers import tiny
from tests.helpers.attention import ATTENTION, TOLERANCE, apart, run, scheduled
from tests.helpers.models import MODELS
from tests.helpers.tracing import Attention, Toy, heads, linear, merged, tokens
from tests.references.ditfastattn import Paper, box

SCHEDULE = "FWWXFW"
slow = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:policy re")  # what is refused is said


def in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def image_or_frames(count: int) -> Tensor:
    """The masks of Latte's attentions: over the 4 x 4 tokens of a frame, and over 3 frames."""
    return box((4, 4), (1, 1))(count) if count == 16 else box((3,), (1,))(count)


@pytest.mark.parametrize(
    ("name", "window", "seen"),
    [
        pytest.param("sd3", WindowResidual((1, 2), grid="latent"), box((4, 4), (1, 2), last=6), id="sd3"),
        pytest.param("sd3", WindowResidual((1, 2), grid=(4, 4)), box((4, 4), (1, 2), last=6), id="given", marks=slow),
        pytest.param(
            "cogvideox",
            WindowResidual((0, 0.5, 1), grid="latent"),
            box((2, 4, 4), (0, 2, 1), first=6),
            id="cogvideox",
        ),
        pytest.param("latte", WindowResidual(1, grid="latent"), image_or_frames, id="latte", marks=slow),
    ],
)
def test_the_paper_with_dense_masks(name: str, window: WindowResidual, seen: Any) -> None:
    """Reached at every step, and far from what full attention gives."""
    case = MODELS[name]
    model, inputs = case.build(), case.inputs(len(SCHEDULE))
    double = [{k: in_float64(v) if k != "image_rotary_emb" else v for k, v in call.items()} for call in inputs]
    exact = copy.deepcopy(model).double()
    expected = Paper(SCHEDULE, seen).run(exact, double)
    found = run(model, inputs, scheduled(SCHEDULE, window, 0, ("self", "joint")), "variants")
    assert max(apart([each.double() for each in found], expected)) < TOLERANCE
    full = Paper("F" * len(SCHEDULE), seen).run(exact, double)
    assert [error > 0.01 for error in apart(full, expected)] == [letter != "F" for letter in SCHEDULE]


def test_a_window_of_a_video_is_replayed() -> None:
    """By the graph interpreter, to within the rounding of half a batch."""
    policy = scheduled("FWAXSW", WindowResidual((0, 1, 1), grid="latent"), 1)
    _, check = replayed(MODELS["cogvideox"], policy, "variants", 6, exact=False)
    assert check.within, check.first_difference


def test_a_policy_is_saved_with_its_grid() -> None:
    for window, grid in (((1, 0.5), "latent"), ((2, 1, 1), (3, 4, 4)), (0.25, (4, 4)), (3, None)):
        policy = Policy((Rule(step > 0, WindowResidual(window, grid), Where(("self",))),))
        assert from_json(to_json(policy)) == policy


def test_tokens_that_are_given_as_a_sequence() -> None:
    """The graph of FLUX shows no rows and columns; a grid may be given."""
    case = MODELS["flux"]
    for window, reason in (
        (WindowResidual((1, 1), grid="latent"), RefusalReason.NO_TOKEN_GRID),
        (WindowResidual((1, 1), grid=(4, 4)), None),
    ):
        torch.compiler.reset()
        policy = Policy((Rule(step > 0, window, Where(ATTENTION)),))
        model = dit_rewrite.compile(twin(case.build()), policy, backend="aot_eager")
        with torch.no_grad(), model.trajectory(1):
            model(**case.inputs(1)[0])
        windows = [refusal.reason for refusal in model.explain().refused if refusal.path.endswith(".core")]
        assert windows == ([reason] * 4 if reason else [])


def test_text_that_is_not_shown() -> None:
    """A joint attention over two texts: which of three parts the image is, is known from the latent's grid alone."""

    def body(m: Toy, latent: Tensor, text: Tensor) -> Tensor:
        x = m.patch(latent).flatten(2).transpose(1, 2)
        for block in (m.first, m.second):
            parts = [block.q(text), block.k(x), block.v(text)]
            y = heads(torch.cat(parts, 1))
            out = merged(F.scaled_dot_product_attention(y, y, y))
            x = x + block.out(out[:, 5:11])
            text = text + block.out(out[:, :5]) + block.out(out[:, 11:])
        return m.head(x)

    parts = {"patch": nn.Conv2d(3, 8, 2, 2), "first": Attention(), "second": Attention(), "head": linear()}
    model, inputs = Toy(body, **parts), (tokens(0, 2, 3, 4, 6), tokens(1, 2, 5, 8))
    for grid, reasons in (((2, 3), {RefusalReason.NO_TEXT_TOKENS}), ("latent", set())):
        torch.compiler.reset()
        compiled = tiny.rewritten(model, Policy((Rule(step > 0, WindowResidual(1, grid)),)))
        with torch.no_grad(), compiled.trajectory(1):
            compiled(*inputs)
        assert {r.reason for r in compiled.explain().refused if r.path.endswith(".core")} == reasons
