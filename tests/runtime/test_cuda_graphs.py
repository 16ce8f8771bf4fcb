"""CUDA graphs with hand-written variants, on a fake device that overwrites all memory that no buffer owns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_rewrite.errors import DecisionReason, GraphReason
from dit_rewrite.runtime.cuda_graphs import CAPTURES, WARM_UP
from dit_rewrite.runtime.decide import Choice
from dit_rewrite.runtime.history import Moment
from tests.helpers.chains import STEPS, W0, Chain, Expected, inputs, odd, verifying


@pytest.mark.parametrize("leak", [False, True])
@pytest.mark.parametrize("plain", [(), (0,), (1,)])
def test_a_trajectory(leak: bool, plain: tuple[int, ...]) -> None:
    """Outputs keep their values, also where the caller writes to one, and where a segment runs without a graph."""
    chain, expected = Chain(leak, plain=plain), Expected()
    given = inputs(STEPS)
    wanted = [expected(x, W0) for x in given]
    found = []
    for x in given:
        z, *view = chain(x.clone(), W0)
        for each in view:
            each.zero_()
        found.append(z)
    assert all(map(torch.equal, found, wanted))
    segments = 2 - len(plain)
    assert chain.stats.captures == 2 * segments
    assert chain.stats.replays == segments * (STEPS - 2 * WARM_UP)
    warm = {GraphReason.WARM_UP: 2 * segments * WARM_UP}
    assert chain.stats.uncaptured == warm | ({GraphReason.READS_DEVICE: STEPS} if plain else {})


class Passing(Chain):
    """A chain whose second segment returns views of its input, to the caller and to its slot."""

    def second(self, y: Tensor, n: int) -> tuple[Tensor, ...]:
        return y.view_as(y), y.view_as(y)


def test_views_of_buffers() -> None:
    """Without a graph, a segment may return views of what another one's graph has written, and will write again."""
    chain, found, wanted = Passing(plain=(1,)), [], []
    for i, x in enumerate(inputs(STEPS)):
        first = x * W0 if i % 2 == 0 else first  # noqa: F821
        second = x + first if i % 2 == 0 else second  # noqa: F821
        wanted.append(x + first + (second if i % 2 else 0))
        found.append(chain(x, W0)[0])
    assert all(map(torch.equal, found, wanted))


def test_an_output_that_is_a_slot() -> None:
    """Whether outputs alias slots is not concluded from a call that a graph has served."""

    def choose(moment: Moment, layer: int, *_: object) -> Choice:
        return Choice(True, DecisionReason.RULE) if layer == 0 and moment.step >= 8 else odd(moment)

    chain = Chain(leak=True, plain=(0,), choose=choose)
    for i, x in enumerate(inputs(14)):
        z, view = chain(x, W0, 3 if i == 10 else 2)
        if i % 2 == 0:
            value = view.clone()
        assert torch.equal(view, value)
        view.zero_()
    assert chain.stats.uncaptured[GraphReason.CHANGED_NUMBER] == 1


def test_an_input_may_be_overwritten_behind_the_call() -> None:
    chain, expected, x = Chain(), Expected(), torch.empty(2, 3)
    for given in inputs(STEPS):
        assert torch.equal(chain(x.copy_(given), W0)[0], expected(given, W0))
        x.fill_(torch.nan)


def test_a_second_trajectory_uses_the_same_graphs() -> None:
    chain = Chain()
    for seed in range(3):
        chain.session.forget()
        expected = Expected()
        for x in inputs(STEPS, seed=seed):
            assert torch.equal(chain(x, W0)[0], expected(x, W0))
    assert chain.stats.captures == 4


def test_a_shape_changes_within_a_trajectory() -> None:
    chain, expected = Chain(), Expected()
    for i, x in enumerate(inputs(STEPS)):
        given = x if i % 6 < 3 else torch.cat([x, x])
        assert torch.equal(chain(given, W0)[0], expected(given, W0, compute=i % 2 == 0 or i % 3 == 0))


def test_moved_weights() -> None:
    """A captured graph reads its weights where they were; where they have moved, it is captured again, a few times."""
    chain, weight = Chain(), W0.clone()
    for turn in range(CAPTURES + 1):
        chain.session.forget()
        expected = Expected()
        for x in inputs(STEPS, seed=turn):
            assert torch.equal(chain(x, weight)[0], expected(x, weight))
        weight.data = torch.randn(3)
    assert chain.stats.uncaptured[GraphReason.MOVED_WEIGHTS] == CAPTURES
    assert chain.stats.uncaptured[GraphReason.WEIGHTS_MOVE] == STEPS / 2 - 1
    assert chain.stats.captures == 3 + CAPTURES


def test_weights_that_are_changed_in_place() -> None:
    """The graph reads the new values. They empty the slots, which a step that computes fills again."""
    chain, expected, weight = Chain(), Expected(), W0.clone()
    for x in inputs(STEPS):
        assert torch.equal(chain(x, weight)[0], expected(x, weight))
        if expected.step % 2 == 0:
            weight.mul_(1.5)


def test_another_number_runs_without_the_graph() -> None:
    chain, expected = Chain(), Expected()
    for i, x in enumerate(inputs(STEPS)):
        n = 3 if i == STEPS - 2 else 2
        assert torch.equal(chain(x, W0, n)[0], expected(x, W0, n))
    assert chain.stats.uncaptured[GraphReason.CHANGED_NUMBER] == 1


def test_a_verified_slot_is_not_overwritten() -> None:
    """A step that computes for a comparison leaves the slot, so it must not write where the slot's value is."""
    chain, expected = Chain(choose=verifying), Expected()
    for i, x in enumerate(inputs(STEPS)):
        kept = expected.values
        assert torch.equal(chain(x, W0)[0], expected(x, W0))
        if i and i % 4 == 0:
            expected.values = kept
    assert chain.stats.uncaptured[GraphReason.SLOT_IN_USE] > 2


def test_another_queue() -> None:
    """Graphs of one pool may not run side by side, so another CUDA stream has a pool of its own."""
    chain, expected = Chain(), Expected()
    for i, x in enumerate(inputs(2 * STEPS)):
        chain.device.current = i // 3 % 2
        chain.session.explicit.clock.num_steps = 2 * STEPS  # type: ignore[union-attr]
        assert torch.equal(chain(x, W0)[0], expected(x, W0))
    first, second = chain.device.pools
    assert first.captures and second.captures


def test_a_failed_capture() -> None:
    chain, expected = Chain(), Expected()
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        for x in inputs(STEPS):
            assert torch.equal(chain(x, W0)[0], expected(x, W0))
            chain.device.pools[0].fails = True
    assert chain.stats.uncaptured[GraphReason.CAPTURE_FAILED] == 2 * (STEPS - 2 * WARM_UP)
    assert not chain.stats.captures


def test_a_capture_by_the_caller() -> None:
    """Where the caller captures calls itself, they run without graphs, on what the slots have."""
    chain, expected = Chain(), Expected()
    for i, x in enumerate(inputs(STEPS)):
        chain.device.current = GraphReason.CAPTURING if i in (7, 9, 10) else 0
        assert torch.equal(chain(x, W0)[0], expected(x, W0))
    assert chain.stats.uncaptured[GraphReason.CAPTURING] == 3
    assert chain.stats.captures == 4, "the graphs from before serve again"


def test_an_observed_call_runs_without_graphs() -> None:
    """The observer keeps values that a replay would overwrite."""
    chain, expected, seen = Chain(), Expected(), []
    for i, x in enumerate(inputs(STEPS)):
        chain.session.observer = seen.append if i > STEPS - 3 else None
        assert torch.equal(chain(x, W0)[0], expected(x, W0))
    assert chain.stats.uncaptured[GraphReason.OBSERVED] == 2 == len(seen)


def test_inference_mode_and_no_grad_share_graphs() -> None:
    chain, expected = Chain(), Expected()
    for i, x in enumerate(inputs(STEPS)):
        with torch.inference_mode(i % 3 == 0), torch.no_grad():
            assert torch.equal(chain(x, W0)[0], expected(x, W0))
    assert chain.stats.captures == 4
