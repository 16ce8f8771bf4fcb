"""The decision machine, as a function: cases by hand, and its laws under random sites, rules and slots."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dit_rewrite.errors import Reason
from dit_rewrite.runtime.decide import Decisions, Moment, SiteSpec, decide

YES, NO = Reason.RULE, Reason.NO_RULE


def always(*_: object) -> tuple[bool, Reason]:
    return True, YES


def never(*_: object) -> tuple[bool, Reason]:
    return False, NO


def site(choose: Any = always, parent: int | None = None, layer: int = 0) -> SiteSpec:
    return SiteSpec("site", "mlp", layer, parent, choose)


def at(step: int, of: int | None = None, **more: Any) -> Moment:
    return Moment(step, of, **more)


def decided(sites: list[SiteSpec], moment: Moment, holds: list[bool], unfit: Reason | None = None) -> Decisions:
    return decide(sites, moment, [0] * len(sites), [0] * len(sites), holds, unfit)


def test_a_rule_reuses_what_is_held() -> None:
    assert decided([site(), site(never)], at(1), [True, True]) == Decisions((True, False), (YES, NO), ())


def test_a_missing_value_is_a_miss_only_where_a_rule_wanted_it() -> None:
    found = decided([site(), site(never), site()], at(1), [False, False, True])
    assert found == Decisions((False, False, True), (Reason.EMPTY, NO, YES), (Reason.EMPTY,))


def test_the_reason_why_slots_do_not_fit_is_told() -> None:
    found = decided([site(), site()], at(1), [False, True], Reason.CHANGED_INPUT)
    assert found == Decisions((False, True), (Reason.CHANGED_INPUT, YES), (Reason.CHANGED_INPUT,))


def test_the_end_is_where_it_was_told() -> None:
    assert decided([site()], at(2, of=3), [True]) == Decisions((True,), (YES,), ())
    assert decided([site()], at(3, of=3), [True]) == Decisions((False,), (Reason.BEYOND_END,), (Reason.BEYOND_END,))
    assert decided([site(never)], at(3, of=3), [True]) == Decisions((False,), (NO,), ())
    assert decided([site()], at(10_000), [True]).row == (True,)


def test_a_covered_site_follows_its_parent_in_any_order() -> None:
    """Sites 0 and 2 lie within site 1, and 3 within 2; they hold nothing and no rule speaks of them."""
    sites = [site(never, 1), site(), site(never, 1), site(never, 2)]
    found = decided(sites, at(1), [False, True, False, False])
    assert found == Decisions((True,) * 4, (Reason.COVERED, YES, Reason.COVERED, Reason.COVERED), ())


def test_within_a_computing_parent_each_site_decides() -> None:
    found = decided([site(always, 1), site(never), site(always, 0)], at(1), [True, True, False])
    assert found == Decisions((True, False, True), (YES, NO, Reason.COVERED), ())


def test_what_a_rule_is_asked() -> None:
    asked: list[tuple[object, ...]] = []

    def ask(*args: Any) -> tuple[bool, Reason]:
        asked.append(args[:-1])
        read.append(args[-1]("entropy"))
        return False, NO

    read: list[float | None] = []
    sites = [site(ask, layer=0), site(ask, layer=1)]
    moment = Moment(7, 20, 3, 5, sigma=0.5, snr=4.0, stream="cond")
    decide(sites, moment, [4, 0], [2, 1], [True, False], measure=lambda i, name: {(0, "entropy"): 0.25}.get((i, name)))
    # the moment, the layer in the model, age (unknown without a value), streak
    assert asked == [(moment, 3, 3, 2), (moment, 4, None, 1)]
    assert read == [0.25, None], "each site reads its own measurements"


@st.composite
def machines(draw: st.DrawFn) -> tuple[list[SiteSpec], list[bool], list[bool]]:
    """A forest of sites in any order, what the rules say of each, and which slots hold a value."""
    count = draw(st.integers(1, 7))
    order = draw(st.permutations(range(count)))
    parents: dict[int, int | None] = {}
    for i, node in enumerate(order):
        parents[node] = draw(st.sampled_from([None, *order[:i]]))
    flags = st.lists(st.booleans(), min_size=count, max_size=count)
    wanted, holds = draw(flags), draw(flags)
    return [site(always if wanted[i] else never, parents[i]) for i in range(count)], wanted, holds


@given(machines(), st.integers(0, 9), st.none() | st.integers(1, 9))
def test_only_proof_permits_reuse(
    machine: tuple[list[SiteSpec], list[bool], list[bool]], step: int, of: int | None
) -> None:
    sites, wanted, holds = machine
    found = decided(sites, at(step, of), holds)
    beyond = of is not None and step >= of
    misses = []
    for i, spec in enumerate(sites):
        around = spec.parent
        while around is not None and not found.row[around]:
            around = sites[around].parent
        if around is not None:
            expected = (True, Reason.COVERED)
        elif not wanted[i]:
            expected = (False, NO)
        elif beyond or not holds[i]:
            expected = (False, Reason.BEYOND_END if beyond else Reason.EMPTY)
            misses.append(expected[1])
        else:
            expected = (True, YES)
        assert (found.row[i], found.reasons[i]) == expected
    assert sorted(found.misses) == sorted(misses)
    if beyond:
        assert True not in found.row


@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 40))
def test_age_and_streak_over_a_trajectory(limit: int, longest: int, steps: int) -> None:
    """Reuse while age <= limit and streak < longest: a computation every 1 + min(limit, longest) steps."""

    def choose(moment: Moment, layer: int, age: int | None, streak: int, *_: Any) -> tuple[bool, Reason]:
        return (age is not None and age <= limit and streak < longest), YES

    sites = [site(choose), site(never)]
    computed_at, streak, rows = [0, 0], [0, 0], []
    for step in range(steps):
        row = decide(sites, at(step), computed_at, streak, [step > 0] * 2).row
        rows.append(row)
        for i, reused in enumerate(row):
            streak[i] = streak[i] + 1 if reused else 0
            computed_at[i] = computed_at[i] if reused else step
    period = 1 + min(limit, longest)
    assert rows == [(step % period != 0, False) for step in range(steps)]


def test_specs_are_values() -> None:
    assert replace(site(), layer=3) == site(layer=3)
    assert site() != site(never)
