"""Decisions: hand-written cases, and invariants under random sites, rules and slots."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dit_rewrite.errors import DecisionReason, MissReason, Reason
from dit_rewrite.runtime.decide import HORIZON, NO_SLOT, Choice, Decider, Decisions, SiteSpec
from dit_rewrite.runtime.history import Computed, Moment, Past
from dit_rewrite.runtime.slots import Transition

YES, NO = DecisionReason.RULE, DecisionReason.NO_RULE


def since(step: int) -> Past:
    """Return the past of a slot that was filled at a step."""
    return Past((Computed(step),))


SINCE_0 = since(0)


def always(*_: object) -> Choice:
    return Choice(True, YES)


def never(*_: object) -> Choice:
    return Choice(False, NO)


def site(choose: Any = always, parent: int | None = None, layer: int = 0) -> SiteSpec:
    return SiteSpec("site", "mlp", layer, parent, choose)


def at(step: int, of: int | None = None, **more: Any) -> Moment:
    return Moment(step, of, **more)


def decided(sites: list[SiteSpec], moment: Moment, holds: list[bool], unfit: Reason | None = None) -> Decisions:
    return Decider(sites, moment, [SINCE_0] * len(sites), [0] * len(sites), holds, unfit).decisions()


def test_a_rule_reuses_a_filled_slot() -> None:
    assert decided([site(), site(never)], at(1), [True, True]) == Decisions((True, False), (YES, NO), ())


def test_a_missing_value_is_a_miss_only_where_a_rule_wanted_it() -> None:
    found = decided([site(), site(never), site()], at(1), [False, False, True])
    assert found == Decisions((False, False, True), (MissReason.EMPTY, NO, YES), (MissReason.EMPTY,))


def test_the_reason_of_unfit_slots_is_reported() -> None:
    found = decided([site(), site()], at(1), [False, True], MissReason.CHANGED_INPUT)
    assert found == Decisions((False, True), (MissReason.CHANGED_INPUT, YES), (MissReason.CHANGED_INPUT,))


def test_steps_beyond_the_end_compute() -> None:
    assert decided([site()], at(2, of=3), [True]) == Decisions((True,), (YES,), ())
    assert decided([site()], at(3, of=3), [True]) == Decisions(
        (False,), (MissReason.BEYOND_END,), (MissReason.BEYOND_END,)
    )
    assert decided([site(never)], at(3, of=3), [True]) == Decisions((False,), (NO,), ())
    assert decided([site()], at(10_000), [True]).row == (True,)


def test_a_covered_site_follows_its_parent_in_any_order() -> None:
    """Sites 0 and 2 are inside site 1, and 3 inside 2; their slots are empty and no rule applies to them."""
    sites = [site(never, 1), site(), site(never, 1), site(never, 2)]
    found = decided(sites, at(1), [False, True, False, False])
    assert found == Decisions(
        (True,) * 4, (DecisionReason.COVERED, YES, DecisionReason.COVERED, DecisionReason.COVERED), ()
    )


def test_within_a_computing_parent_each_site_decides() -> None:
    found = decided([site(always, 1), site(never), site(always, 0)], at(1), [True, True, False])
    assert found == Decisions((True, False, True), (YES, NO, DecisionReason.COVERED), ())


def test_arguments_of_a_rule() -> None:
    asked: list[tuple[object, ...]] = []

    def ask(*args: Any) -> Choice:
        asked.append(args[:-1])
        read.append(args[-1]("entropy"))
        return Choice(False, NO)

    read: list[float | None] = []
    sites = [site(ask, layer=0), site(ask, layer=1)]
    moment = Moment(7, 20, 3, 5, sigma=0.5, snr=4.0, stream="cond")
    measured = {(0, "entropy"): 0.25}
    Decider(
        sites, moment, [since(4), SINCE_0], [2, 1], [True, False], measure=lambda *key: measured.get(key)
    ).decisions()
    # the moment, the layer in the model, age (unknown without a value), streak
    assert asked == [(moment, 3, 3, 2), (moment, 4, None, 1)]
    assert read == [0.25, None], "each site reads its own measurements"


@st.composite
def machines(draw: st.DrawFn) -> tuple[list[SiteSpec], list[bool], list[bool]]:
    """Draw a forest of sites in any order, the choice of the rules for each, and which slots are filled."""
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
            expected = (True, DecisionReason.COVERED)
        elif not wanted[i]:
            expected = (False, NO)
        elif beyond or not holds[i]:
            expected = (False, MissReason.BEYOND_END if beyond else MissReason.EMPTY)
            misses.append(expected[1])
        else:
            expected = (True, YES)
        assert (found.row[i], found.reasons[i]) == expected
    assert sorted(found.misses) == sorted(misses)
    if beyond:
        assert True not in found.row


@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 40))
def test_age_and_streak_over_a_trajectory(limit: int, longest: int, steps: int) -> None:
    """Reuse while age <= limit and streak < longest computes every 1 + min(limit, longest) steps."""

    def choose(moment: Moment, layer: int, age: int | None, streak: int, *_: Any) -> Choice:
        return Choice(age is not None and age <= limit and streak < longest, YES)

    sites = [site(choose), site(never)]
    past, streak, rows = [SINCE_0] * 2, [0, 0], []
    for step in range(steps):
        row = Decider(sites, at(step), past, streak, [step > 0] * 2).decisions().row
        rows.append(row)
        for i, reused in enumerate(row):
            streak[i] = streak[i] + 1 if reused else 0
            past[i] = past[i] if reused else since(step)
    period = 1 + min(limit, longest)
    assert rows == [(step % period != 0, False) for step in range(steps)]


# --- sites that read another site's slot, or none ---------------------------------------------------------------------


def test_a_site_that_reads_the_slot_of_another() -> None:
    """Site 0 needs the slot of site 1 and not its own; its age is still its own."""
    asked: list[int | None] = []

    def ask(moment: Moment, layer: int, age: int | None, streak: int, read: Any) -> Choice:
        asked.append(age)
        return Choice(True, YES)

    sites = [replace(site(ask), reads=1), site(never)]
    for own, others in ((False, True), (True, False)):
        found = Decider(sites, at(5), [since(2), since(4)], [0, 0], [own, others]).decisions()
        reason = YES if others else MissReason.EMPTY
        assert found == Decisions((others, False), (reason, NO), () if others else (MissReason.EMPTY,))
    assert asked == [3, None]


def test_a_site_that_reads_no_slot() -> None:
    """It does not depend on the slots, but beyond the explicit number of steps it computes like other sites."""
    sites = [replace(site(), reads=NO_SLOT)]
    for unfit in (None, MissReason.CHANGED_INPUT, MissReason.EMPTY):
        assert decided(sites, at(0), [False], unfit) == Decisions((True,), (YES,), ())
    beyond = decided(sites, at(3, of=3), [False])
    assert beyond == Decisions((False,), (MissReason.BEYOND_END,), (MissReason.BEYOND_END,))


# --- slots that are filled only if they will be read ------------------------------------------------------------------

BRANCH, CORE, HELD = range(3)


def follows(schedule: str, letter: str) -> Any:
    """Reuse at the steps with that letter; the schedule repeats."""

    def choose(moment: Moment, *_: Any) -> Choice:
        return Choice(schedule[moment.step % len(schedule)] == letter, YES)

    return choose


def attention(schedule: str, foreseen: bool = True) -> list[SiteSpec]:
    """Return a branch that is reused at the steps B, the core inside it that is replaced at the steps W, and the site
    whose slot the replacement reads; that slot is filled when the core computes."""
    branch = replace(site(follows(schedule, "B")), foreseen=True)
    core = replace(site(follows(schedule, "W"), BRANCH), reads=HELD, foreseen=foreseen)
    return [branch, core, replace(site(never, CORE), serves=CORE)]


def fills(schedule: str, of: int | None, steps: int) -> str:
    """Return for each step whether the serving slot is filled (f) or not (-), or its core does not compute (.)."""
    sites, holds, letters = attention(schedule), [False] * 3, ""
    for step in range(steps):
        found = decided(sites, at(step, of), holds)
        reason = found.reasons[HELD]
        letters += {DecisionReason.WILL_BE_READ: "f", DecisionReason.UNREAD: "-", DecisionReason.COVERED: "."}[reason]
        assert found.row[HELD] is (reason is not DecisionReason.WILL_BE_READ)
        assert found.misses == (), "a slot that is read was filled"
        holds = [held or not reused for held, reused in zip(holds, found.row, strict=True)]
    return letters


def test_a_serving_slot_is_filled_if_it_will_be_read() -> None:
    """A computing step fills the slot if the next step that does not reuse the branch replaces the core."""
    assert fills("CWWCCWBC", of=8, steps=8) == "f..-f..-"
    assert fills("CBBWCBBC", of=8, steps=8) == "f...-..-"
    assert fills("CBBB", of=4, steps=4) == "-..."
    assert fills("CW", of=2, steps=2) == "f."
    assert fills("CWCW", of=3, steps=3) == "f.-", "no step follows the last one"


def test_without_a_known_end_it_may_be_read() -> None:
    """Without a number of steps the look-ahead is bounded, and a slot that may be read is filled."""
    assert fills("CWCC", of=None, steps=9) == "f.--f.--f"
    assert fills("C" + "B" * HORIZON + "C", of=None, steps=1) == "f"
    assert fills("C" + "B" * (HORIZON - 2) + "CW", of=None, steps=1) == "-"
    assert fills("C" + "B" * (HORIZON - 2) + "WC", of=None, steps=1) == "f"


def test_unpredictable_slots_are_filled() -> None:
    """If a guard of the core or of an enclosing site is measured, the slot is always filled."""
    moment, holds = at(0, of=4), [True] * 3
    assert decided(attention("CCCC"), moment, holds).reasons[HELD] is DecisionReason.UNREAD
    unknown = attention("CCCC", foreseen=False)
    assert decided(unknown, moment, holds) == Decisions((False,) * 3, (YES, YES, DecisionReason.WILL_BE_READ), ())
    branch, core, held = attention("CCCC")
    around = [replace(branch, foreseen=False), core, held]
    assert decided(around, moment, holds).reasons[HELD] is DecisionReason.WILL_BE_READ


@given(st.text("CWB", min_size=1, max_size=12), st.none() | st.integers(1, 12), st.integers(0, 11))
def test_filled_exactly_before_a_read(schedule: str, of: int | None, start: int) -> None:
    """For random schedules: after removing the steps B, exactly the steps C that precede a W fill the slot."""
    schedule = schedule[start % len(schedule) :] + schedule[: start % len(schedule)]
    schedule = "C" + schedule  # the first step must fill the slot
    steps = 2 * len(schedule) if of is None else of
    written = schedule * (3 + HORIZON // len(schedule)) if of is None else (schedule * of)[:of]
    expected = ""
    for step in range(steps):
        rest = written[step + 1 :].replace("B", "")
        expected += "." if written[step] != "C" else "f" if rest.startswith("W") else "-"
    assert fills(schedule, of, steps) == expected


def test_specs_are_values() -> None:
    assert replace(site(), layer=3) == site(layer=3)
    assert site() != site(never)


def test_measurements_are_recorded_and_read_once() -> None:
    """The decisions include each number that a rule read; nothing else is read, and nothing twice."""
    asked: list[tuple[int, str]] = []

    def measure(i: int, name: str) -> float | None:
        asked.append((i, name))
        return None if name == "none" else i + 0.5

    def twice(_: Any, __: int, ___: Any, ____: int, read: Any) -> Choice:
        return Choice(read("drift(self)") == read("drift(self)") == read("none") or True, YES)

    sites = [site(never), site(twice), site(twice, parent=1)]
    found = Decider(sites, at(1), [SINCE_0] * 3, [0] * 3, [True] * 3, measure=measure).decisions()
    assert found.measured == {1: {"drift(self)": 1.5}}
    assert asked == [(1, "drift(self)"), (1, "none")]
    assert decided([site()], at(1), [True]).measured == {}


def test_counts_and_changes_of_slots() -> None:
    """A site that only fills a slot for another one counts neither as computed nor as reused."""
    reasons = (
        YES,
        NO,
        DecisionReason.WILL_BE_READ,
        DecisionReason.UNREAD,
        DecisionReason.COVERED,
        DecisionReason.VERIFIED,
    )
    decisions = Decisions((True, False, False, True, True, False), reasons, ())
    assert decisions.counts == (2, 2)
    assert decisions.used == (0, 5)
    assert decisions.changed == ((1, Transition.FILL), (2, Transition.FILL), (3, Transition.EMPTY))
    assert decisions.kind == (decisions.row, (False,) * 5 + (True,))
