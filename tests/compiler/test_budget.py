"""A memory budget caches the sites that save most time per byte, and names the others."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

import dit_rewrite
from dit_rewrite.compiler.budget import Candidate, not_chosen
from dit_rewrite.compiler.roofline import Roofline
from dit_rewrite.errors import BadArgument, RefusalReason
from dit_rewrite.guards import step
from dit_rewrite.policies import FORA, Never, TaylorSeer
from dit_rewrite.policy.plan import Choice
from dit_rewrite.policy.rules import Policy, Rule
from dit_rewrite.policy.strategies import ReuseTiles
from dit_rewrite.policy.where import Where
from tests.helpers import tiny
from tests.report.test_prediction import plan, run

# one FLOP is one byte is one second, so that the order of the sites does not depend on the machine
EVEN = Roofline(*[((1.0, 1.0), (1e12, 1e12))] * 3)
SLOT = 2 * 8 * tiny.WIDTH * 4  # of a branch of the tiny model: two samples of 8 tokens, float32


@pytest.fixture(autouse=True)
def _even_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Roofline, "of", staticmethod(lambda device, dtype: EVEN))


def test_most_time_per_byte_first() -> None:
    """A site that is too large for the rest does not keep a smaller one out; one without bytes always fits."""
    small, large, dense, free = (Candidate((i,), s, b) for i, (s, b) in enumerate([(1, 10), (9, 80), (5, 20), (1, 0)]))
    every = [small, large, dense, free]
    assert not_chosen(every, 110) == []
    assert not_chosen(every, 100) == [0]
    assert not_chosen(every, 99) == [1]
    assert not_chosen(every, 20) == [0, 1]
    assert not_chosen(every, 0) == not_chosen(every, -5) == [0, 1, 2]
    assert not_chosen([Candidate((0, 1), 1, 20), Candidate((2,), 1, 10)], 20) == [0, 1]


def left_out(model: Any) -> list[str]:
    return [r.path for r in model.explain().refused if r.reason is RefusalReason.OVER_BUDGET]


@pytest.mark.parametrize("number", range(tiny.SITES + 1))
def test_the_slots_fit(number: int) -> None:
    """Attention has more FLOPs than the MLP, and is cached first, of two attentions that whose branch moves more bytes;
    the peak stays below the budget."""
    none = nullcontext() if number else pytest.warns(UserWarning, match="exceed the memory budget")
    with none:
        model = run(FORA(3), 6, memory_budget=number * SLOT + SLOT // 2)
    order = ["blocks.1.attn", "blocks.0.attn", "blocks.1.mlp", "blocks.0.mlp"]
    assert sorted(left_out(model)) == sorted(order[number:])
    assert model.stats().peak_bytes == model.explain().stream_bytes == number * SLOT
    assert model.stats().streams == {}
    text = str(model.explain())
    assert text.count(f"({RefusalReason.OVER_BUDGET})") == tiny.SITES - number


def test_without_a_budget_every_site_is_cached() -> None:
    model = run(FORA(3), 6)
    assert left_out(model) == []
    assert model.stats().peak_bytes == tiny.SITES * SLOT


def test_the_chosen_sites_follow_the_policy() -> None:
    """A forecast that keeps two values takes twice the bytes; what is left out computes at every step."""
    model = run(TaylorSeer(3), 6, memory_budget=4 * SLOT)
    assert sorted(left_out(model)) == ["blocks.0.mlp", "blocks.1.mlp"]
    decided = [d.strategies for d in model.stats().decisions]
    assert all(set(d) == {"blocks.0.attn", "blocks.1.attn"} for d in decided)
    assert dit_rewrite.predict(model, num_steps=6).counts == model.explain().prediction.counts


def test_sites_that_save_more_steps_come_first() -> None:
    """The first attention is reused at two steps, the second at one."""
    policy = plan(Choice.FULL, Choice.AST, Choice.AST)
    late = dit_rewrite.Rule(dit_rewrite.guards.step > 1, where=dit_rewrite.Where(names="blocks.0.attn"))
    early = dit_rewrite.Rule(dit_rewrite.guards.step > 0, where=dit_rewrite.Where(names="blocks.1.attn"))
    model = run(dit_rewrite.Policy((late, early)), 3, memory_budget=SLOT)
    assert left_out(model) == ["blocks.0.attn"]
    assert left_out(run(policy, 3, memory_budget=2 * SLOT)) == []


def test_two_named_streams_share_it() -> None:
    model = dit_rewrite.compile(tiny.build(), FORA(3), backend="aot_eager", memory_budget=4 * SLOT)
    conditions = {name: tiny.condition(i) for i, name in enumerate(("cond", "uncond"))}
    calls = {name: tiny.calls(4, given=given) for name, given in conditions.items()}
    with model.trajectory(4):
        for step in range(4):
            for name in conditions:
                with model.cache_context(name):
                    tiny.outputs(model, [calls[name][step]])
    assert sorted(left_out(model)) == ["blocks.0.mlp", "blocks.1.mlp"]
    assert model.stats().peak_bytes == 4 * SLOT
    assert not model.stats().streams


def test_a_budget_that_hoisted_values_exceed() -> None:
    """They are computed once anyway; a policy that guards nothing is not the budget's concern."""
    assert left_out(run(Never(), 3, memory_budget=0)) == []


@pytest.mark.parametrize("budget", [-1, 1.5, True, "1 GiB"])
def test_another_budget_is_refused(budget: Any) -> None:
    with pytest.raises(BadArgument, match="memory_budget"):
        dit_rewrite.compile(tiny.build(), FORA(3), memory_budget=budget)


@pytest.mark.parametrize("shares", [(0.75, 0.25), (0.25, 0.75)])
def test_tiles_save_the_share_that_is_not_computed(shares: tuple[float, float]) -> None:
    """Of two branches of which tiles are recomputed, the one with fewer of them saves more."""
    rules = [Rule(step > 0, ReuseTiles(share, 2), Where(("mlp",), layers=(i, i + 1))) for i, share in enumerate(shares)]
    model = run(Policy(tuple(rules)), 6, memory_budget=SLOT + SLOT // 2)
    assert left_out(model) == [f"blocks.{int(shares[0] < shares[1])}.mlp.tiles"]
