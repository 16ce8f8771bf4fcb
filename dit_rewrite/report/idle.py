"""Find out whether a policy can reuse anything in a trajectory, and if not, why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import sympy

from dit_rewrite.compiler.rewritten import Rewritten
from dit_rewrite.errors import RefusalReason, UnreachedReason
from dit_rewrite.passes.analysis.site import Kind, Part, Site
from dit_rewrite.passes.guards.satisfiability import Verdict, verdict
from dit_rewrite.passes.guards.symbols import NOISE, TOTALS, Predicate, Value, mentions, reads_noise
from dit_rewrite.policy.site_rules import SiteRule, SiteRules
from dit_rewrite.policy.where import FAMILIES, Where

Noise = Callable[[int], tuple[float | None, float | None]]

ENDLESS = 1000  # steps to try if the number of steps is unknown
_STEP_SYMBOLS = frozenset({"step"}) | TOTALS


def idle_reason(rewritten: Sequence[Rewritten], num_steps: int | None, noise: Noise | None = None) -> str | None:
    """Return why the policy of the `rewritten` graphs can reuse nothing in a trajectory of `num_steps` steps.

    Returns None if some site may be reused at some step, or if no site is reached. `noise` returns sigma and SNR of a
    step, None for unknown values; without `noise`, they may have any value. Measurements may have any value too, so a
    returned reason is certain, while None does not guarantee reuse.
    """
    reached = [(graph.found.sites[i], graph.rules[i]) for graph in rewritten for i in graph.reached]
    if not reached or any(_may_reuse(*site, num_steps, noise) for site in dict.fromkeys(reached)):
        return None
    needs = frozenset[str]().union(*(rules.needs for _, rules in reached))
    if num_steps is None and needs & TOTALS:
        return f"{UnreachedReason.TOTAL_UNKNOWN}: use `with model.trajectory(num_steps=…)`"
    if noise is not None and reads_noise(needs) and noise(0) == (None, None):
        return f"{UnreachedReason.NOISE_UNKNOWN}: use `with model.trajectory(scheduler=…)`"
    return _never(rewritten, [site for site, _ in reached], num_steps)


def _never(rewritten: Sequence[Rewritten], sites: Sequence[Site], num_steps: int | None) -> str:
    when = "at any step" if num_steps is None else f"at any of the {num_steps} steps"
    blocks = sorted({site.layer for site in sites})
    count = sum(graph.found.num_layers for graph in rewritten)
    where = f"its {len(sites)} sites, in block{'s' * (len(blocks) > 1)} {_ranges(blocks)} of 0 to {count - 1}"
    reached = {
        rule.where for graph in rewritten for i in graph.reached for rule in graph.rules[i].rules if rule.replaces_part
    }
    return f"no guard can hold {when} at {where}{left_out(reached, rewritten)}"


def _ranges(numbers: Sequence[int]) -> str:
    """Format ascending numbers: ``0 to 3, 7``."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))


def left_out(wheres: Iterable[Where], rewritten: Iterable[Rewritten]) -> str:
    """Return a hint, or "", about sites that exceed the memory budget, or parallel branches (attention and MLP in one
    projection) that no rule selects."""
    rewritten = tuple(rewritten)
    if any(refusal.reason is RefusalReason.OVER_BUDGET for graph in rewritten for refusal in graph.found.refused):
        return "; the slots of its sites exceed the memory budget"
    kinds = frozenset[Kind]().union(*(FAMILIES[kind] for where in wheres for kind in where.kinds if not where.span))
    parallel = sum(site.kind is Kind.PARALLEL for graph in rewritten for site in graph.found.sites)
    if not parallel or not kinds or Kind.PARALLEL in kinds or {Kind.SELF, Kind.MLP} <= kinds:
        return ""
    return f"; the model's {parallel} parallel branches are not among them: add the kind 'parallel' to reuse them too"


def _may_reuse(site: Site, rules: SiteRules, num_steps: int | None, noise: Noise | None) -> bool:
    """Return whether some step may reuse the site. All strategies except sharing guidance need an earlier step."""
    first = 0 if site.part is Part.CFG_SHARED else 1
    known = {} if num_steps is None else {"num_steps": num_steps}
    if (
        all(verdict(rule.predicate.guard, known) is Verdict.NEVER for rule in rules.rules if rule.replaces_part)
        and first
    ):
        return False
    knowable = _STEP_SYMBOLS | (NOISE if noise is not None else frozenset())
    tried = [_Tried.of(rule, knowable) for rule in rules.rules]
    steps = range(first, ENDLESS if num_steps is None else num_steps)
    return any(_applies(tried, _symbols(step, num_steps, noise)) for step in steps)


@dataclass(frozen=True)
class _Tried:
    """A rule, and the conjuncts of its guard that depend only on symbols known for each step."""

    replaces_part: bool
    whole: bool
    needs: frozenset[str]
    parts: tuple[Predicate, ...]

    @classmethod
    def of(cls, rule: SiteRule, knowable: frozenset[str]) -> _Tried:
        parts = [part for part in sympy.And.make_args(rule.predicate.guard) if mentions(part) <= knowable]
        needs = frozenset(rule.predicate.needs)
        noise = {"snr"} if reads_noise(needs) else frozenset[str]()
        return cls(rule.replaces_part, needs <= knowable, (needs | noise) & knowable, tuple(map(Predicate.of, parts)))

    def may_hold(self, symbols: dict[str, Value]) -> bool:
        known = all(symbols.get(name) is not None for name in self.needs)
        return known and all(part.holds(symbols) for part in self.parts)


def _applies(tried: Sequence[_Tried], symbols: dict[str, Value]) -> bool:
    """Return whether the first rule that holds may be one that reuses."""
    for rule in tried:
        if rule.may_hold(symbols) and (rule.replaces_part or rule.whole):
            return rule.replaces_part
    return False


def _symbols(step: int, num_steps: int | None, noise: Noise | None) -> dict[str, Value]:
    sigma, snr = (None, None) if noise is None else noise(step)
    progress = None if num_steps is None else Fraction(step, max(num_steps - 1, 1))
    return {"step": step, "num_steps": num_steps, "progress": progress, "sigma": sigma, "snr": snr}
