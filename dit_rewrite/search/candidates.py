"""The candidates of a plan search: the possible choices of each attention, their cost, and the ones left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property

from dit_rewrite.compiler.rewritten import Rewritten
from dit_rewrite.errors import BadParameter
from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.site import Kind, Part, Site
from dit_rewrite.policy.plan import WINDOWED, Choice

REPLACED: dict[Choice, frozenset[Part]] = {  # the parts of a site that a choice does not compute
    Choice.FULL: frozenset(),
    Choice.AST: frozenset({Part.BRANCH, Part.CFG_SHARED, Part.CORE, Part.CORE_STATE}),
    Choice.ASC: frozenset({Part.CFG_SHARED}),
    Choice.WA_RS: frozenset({Part.CORE, Part.CORE_STATE}),
    Choice.WA_RS_ASC: frozenset({Part.CFG_SHARED, Part.CORE, Part.CORE_STATE}),
}
_CHOICE = {Part.CORE: Choice.WA_RS, Part.CFG_SHARED: Choice.ASC}  # the choice that needs a part


class Candidates:
    """The possible choices at each place of a graph that was rewritten with a policy that allows all `choices`.

    A place is an attention of the model; its parts are separate sites.
    """

    def __init__(self, rewritten: Rewritten, choices: Sequence[Choice]) -> None:
        self.rewritten, self.choices = rewritten, tuple(choices)
        self.sites: tuple[Site, ...] = rewritten.partition.sites
        self.places = tuple(dict.fromkeys(site.place for site in self.sites))
        self._costs: dict[object, int] = {}

    def check_grid(self, grid: object) -> None:
        """Raise BadParameter if a grid was given, and no attention can have a window along it."""
        if grid is not None and WINDOWED & set(self.choices) and all(site.part is not Part.CORE for site in self.sites):
            reasons = dict.fromkeys(
                str(r.reason) for r in self.rewritten.found.refused if r.path.endswith(f".{Part.CORE}")
            )
            raise BadParameter("greedy_plan", "grid", grid, f"one that fits an attention ({'; '.join(reasons)})")

    def orders(self, by_cost: bool) -> tuple[tuple[Choice, ...], ...]:
        """Return the candidates of each place, sorted by cost or in the given order.

        Choices that do not save FLOPs compared with full attention are left out.
        """
        found = []
        for place in self.places:
            useful = [c for c in self._possible(place) if self.cost(place, c) < self.cost(place, Choice.FULL)]
            ranked = sorted(useful, key=lambda c: self.cost(place, c)) if by_cost else useful  # noqa: B023
            found.append(tuple(ranked))
        return tuple(found)

    def _possible(self, place: str) -> list[Choice]:
        parts = {site.part for site in self.sites if site.place == place}
        needed = {choice: {Part.BRANCH} if choice is Choice.AST else REPLACED[choice] for choice in self.choices}
        return [choice for choice in self.choices if needed[choice] <= parts]

    def cost(self, place: str, choice: Choice) -> int:
        """Return the FLOPs of the model with this choice at one place and full attention at all others.

        The computation of window residuals is not included: an earlier step computes them. Places with equal kinds,
        shapes and parts cost the same, so they are counted once.
        """
        key = (self._likeness[place], choice)
        if key not in self._costs:
            row = tuple(
                site.part is Part.CORE_STATE or (site.place == place and site.part in REPLACED[choice])
                for site in self.sites
            )
            self._costs[key] = cost.total_flops(self.rewritten.straight(row).gm.graph)
        return self._costs[key]

    @cached_property
    def _likeness(self) -> dict[str, object]:
        nodes = {node.name: node for node in self.rewritten.gm.graph.nodes}

        def parts(place: str) -> object:
            own = [site for site in self.sites if site.place == place]
            shapes = [tuple(cost.shape(nodes[name].meta["val"]) for name in (*s.values, *s.inputs)) for s in own]
            return tuple((s.part, s.kind, s.flops, shape) for s, shape in zip(own, shapes, strict=True))

        return {place: parts(place) for place in self.places}

    def notes(self, kinds: Sequence[str]) -> tuple[str, ...]:
        """Return notes on the attentions that are not searched, and on the refused candidates with their reasons."""
        attention = [s for s in self.rewritten.found.sites if s.part is Part.BRANCH and s.kind is not Kind.MLP]
        left = Counter(site.kind for site in attention if site.place not in self.places)
        lines = [f"{count} {kind} not searched (kinds: {', '.join(kinds)})" for kind, count in left.items()]
        refused = Counter(
            (choice, refusal.reason)
            for refusal in self.rewritten.found.refused
            if (choice := self._refused_choice(refusal.path)) is not None
        )
        lines += [f"{choice} refused at {count}: {reason}" for (choice, reason), count in refused.items()]
        return tuple(lines)

    def _refused_choice(self, name: str) -> Choice | None:
        """Return the choice that needs a refused part of a searched place, or None."""
        for part, choice in _CHOICE.items():
            if choice in self.choices and name.removesuffix(f".{part}") in self.places and name.endswith(f".{part}"):
                return choice
        windowed = Choice.WA_RS in self.choices or Choice.WA_RS_ASC in self.choices
        return Choice.WA_RS if windowed and name in self.places else None  # the branch has no attention core
