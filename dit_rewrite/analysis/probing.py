"""Run a model with taps in its graphs: a backend that puts them in, and the runtime that keeps the earlier tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit_rewrite.analysis.modalities import Part, halves
from dit_rewrite.analysis.places import Keys, Place, Places
from dit_rewrite.analysis.statistics import GUIDANCE, Row, measures
from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import Lowering
from dit_rewrite.errors import MissReason, RefusalReason
from dit_rewrite.passes.analysis.branches import Refusal
from dit_rewrite.passes.analysis.graph import copied
from dit_rewrite.passes.analysis.output_sites import find_latent
from dit_rewrite.passes.analysis.sites import find_sites
from dit_rewrite.passes.capture import opaque_attention
from dit_rewrite.passes.capture.capture import Captured
from dit_rewrite.passes.rewrite.batch import Batch, batch_labels
from dit_rewrite.passes.rewrite.batch_rules import rows_of
from dit_rewrite.passes.rewrite.tap import LENT, MOMENTS, TappedGraph, insert_taps
from dit_rewrite.policy.rules import Policy
from dit_rewrite.runtime.cache import stamp_of
from dit_rewrite.runtime.history import Computed
from dit_rewrite.runtime.session import Session
from dit_rewrite.runtime.slots import Transition

Profile = Mapping[Row, Tensor]  # the measures (steps, measures) of each row, for one trajectory


@dataclass(frozen=True)
class Settings:
    """The settings of a measurement; see `analyze`."""

    distances: tuple[int, ...] = (1,)
    keys: Keys = "core"
    heads: bool = False
    window: float | None = None
    conditional: str | None = None

    @property
    def half(self) -> Literal[0, 1] | None:
        """The conditional half of the batch; None if `conditional` is a stream, or there is none."""
        return 0 if self.conditional == "first" else 1 if self.conditional == "second" else None

    @property
    def lender(self) -> str | None:
        """The name of the conditional stream; None if it is a half of the batch, or there is none."""
        return self.conditional if self.half is None else None


@dataclass(frozen=True)
class Label:
    """The row of a comparison, less the stream and the layers before the graph."""

    place: Place
    modality: str
    half: str | None
    head: int | None
    distance: int

    def row(self, stream: Hashable, occurrence: int, offset: int, prefix: str) -> Row:
        site = f"{prefix}{self.place.site}" + (f"@{occurrence}" if occurrence else "")
        layer, named = self.place.layer + offset, str(stream) if self.half is None else self.half
        return Row(
            site, self.place.kind, layer, str(self.place.quantity), self.modality, named, self.head, self.distance
        )


class Collector:
    """The moments of the running trajectories, and the profiles of those that ended."""

    def __init__(self) -> None:
        self._moments: dict[int, list[tuple[int, list[Row], Tensor]]] = {}

    def add(self, trajectory: int, step: int, rows: list[Row], moments: Tensor) -> None:
        """Record the moments of one call of a graph. They stay on the device until `take`."""
        self._moments.setdefault(trajectory, []).append((step, rows, moments))

    def take(self) -> list[Profile]:
        """Return the profile of each trajectory, and forget them."""
        found = [_profile(calls) for _, calls in sorted(self._moments.items())]
        self._moments.clear()
        return found


def _profile(calls: Sequence[tuple[int, list[Row], Tensor]]) -> Profile:
    steps = 1 + max(step for step, _, _ in calls)
    profile: dict[Row, Tensor] = {}
    for step, rows, moments in calls:
        for row, values in zip(rows, measures(moments.cpu()), strict=True):
            if row not in profile:
                profile[row] = torch.full((steps, values.shape[-1]), torch.nan, dtype=torch.float64)
            profile[row][step] = values
    return profile


@dataclass
class TappedRunner:
    """The callable that replaces one captured graph. It keeps the tapped tensors of the last steps in the cache of the
    call's stream, as dispatch keeps the values of sites."""

    index: int
    tapped: TappedGraph
    labels: list[Label]
    num_layers: int
    captured: Captured
    run: Callable[..., Sequence[Any]]
    session: Session
    settings: Settings
    collector: Collector
    prefix: str

    def __post_init__(self) -> None:
        self._static = sorted(self.captured.static)
        self._data = [i for i in range(len(self.captured.placeholders)) if i not in self.captured.static]
        self._depth = max(self.settings.distances)

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        call, count = self.session.call, len(self.tapped.taps)
        if call is None:
            self.session.stats.miss(MissReason.OUTSIDE_CALL)
            return self._outputs(self.run(*args, *self._before([None] * count, {}, None)))
        # a model may run other graphs between its blocks at each step, such as experts for other numbers of tokens
        occurrence, cache, _ = call.enter(self.index, count, ordered=not self._static)
        numbers = call.inputs.number is None
        cache.fit(stamp_of([args[i] for i in self._data], numbers), tuple(args[i] for i in self._static))
        step, lender = call.trajectory.step, self.settings.lender
        past = {now.step: k for k, now in enumerate(cache.past[0].computed)} if count else {}
        there = {d: past[step - d] for d in self.settings.distances if step - d in past}
        lent = None
        if lender is not None and call.stream.name != lender:
            other = call.lent(lender, self.index, occurrence)
            fits = count and other is not None and other.stamp == cache.stamp and other.past[0].age(step) == 0
            lent = [values[0] for values in other.values if values] if fits and other is not None else None
        results = self.run(*args, *self._before(cache.values, there, lent))
        outputs = self._outputs(results)
        if count and step not in past:  # else a solver's second evaluation of the step
            known = {*there, *([LENT] if lent is not None or self.settings.half is not None else [])}
            chosen = [i for i, label in enumerate(self.labels) if label.distance in known]
            rows = [self.labels[i].row(call.stream.name, occurrence, call.layers, self.prefix) for i in chosen]
            moments = results[len(outputs)][torch.tensor(chosen, dtype=torch.long, device=results[len(outputs)].device)]
            self.collector.add(call.trajectory.number, step, rows, moments)
            for i, tensor in enumerate(results[len(outputs) + 1 :]):
                cache.update(i, Transition.FILL, (tensor,), Computed(step), self._depth)
            self.session.note_bytes()
        call.layers += self.num_layers
        args.clear()
        shared = cache.aliased(outputs)  # the caller may change them in place
        return [out.clone() if i in shared else out for i, out in enumerate(outputs)]

    def _outputs(self, results: Sequence[Any]) -> Sequence[Any]:
        """Return the outputs of the model's own graph."""
        count = len(self.tapped.taps)
        return results[: len(results) - count - 1] if count else results

    def _before(
        self, values: Sequence[tuple[Tensor, ...] | None], there: Mapping[int, int], lent: Sequence[Tensor] | None
    ) -> list[Tensor]:
        """Return the earlier tensors of each tap. A tensor of zeros stands for one that does not exist, and a
        comparison with it is not recorded."""
        inputs = []
        for i, (example, stored) in enumerate(zip(self.tapped.examples, values, strict=True)):
            for distance in self.tapped.distances:
                if distance == LENT:
                    found = None if lent is None else lent[i]
                else:
                    found = stored[there[distance]] if stored is not None and distance in there else None
                inputs.append(_zeros(example) if found is None else found)
        return inputs


def _zeros(example: Tensor) -> Tensor:
    made = torch.empty_strided(example.shape, example.stride(), dtype=example.dtype, device=example.device)
    return made.zero_()


class ProbingBackend(Backend):
    """A torch.compile backend that measures a model and changes nothing. `prefix` begins the names of its sites."""

    def __init__(self, model: nn.Module, lowering: Lowering, settings: Settings, prefix: str = "") -> None:
        super().__init__(model, Policy((), "analyze"), lowering)
        self.settings, self.prefix = settings, prefix
        self.collector = Collector()
        self.refused: dict[Refusal, None] = {}
        self.runners: list[TappedRunner] = []

    def reasons(self) -> Iterator[str]:
        """Yield the tensors that are not measured, with the reasons, and the graph breaks that divide branches."""
        for refused in self.refused:
            yield f"{self.prefix}{refused.path or refused.node}: {refused.reason}"
        for place in self.breaks:
            yield f"{self.prefix}{place}: {RefusalReason.GRAPH_BREAK}"

    def _rewrite_alone(self, captured: Captured) -> TappedRunner:  # type: ignore[override]
        found = find_sites(captured.gm, captured.static, captured.conditioning)
        settings = self.settings
        places = Places(captured, found, settings.keys, settings.window, settings.heads, self._is_whole(captured))
        wanted = places.find()
        parts: list[list[Part]] = [[(label, None) for label in place.labels] for place in wanted]
        if settings.half is not None:
            wanted, parts = self._halved(captured, wanted, settings.half)
        distances = (*settings.distances, *([LENT] if settings.lender is not None else []))
        tapped = insert_taps(captured.gm, [place.tap for place in wanted], distances)
        labels = _labels(tapped, wanted, parts)
        self.refused.update(dict.fromkeys((*found.refused, *places.refused)))
        gm = copied(tapped.gm)
        opaque_attention.unmark(gm)
        run = self.lowering.lower(gm, captured.fake_mode)
        runner = TappedRunner(
            len(self.runners), tapped, labels, found.num_layers, captured, run, self.session, settings, self.collector,
            self.prefix,
        )  # fmt: skip
        self.runners.append(runner)
        return runner

    def _halved(
        self, captured: Captured, places: Sequence[Place], first: Literal[0, 1]
    ) -> tuple[list[Place], list[list[Part]]]:
        """Divide each place into the halves of the batch, where both are proven to be independent of each other."""
        latent = find_latent(captured.gm.graph, captured.static | captured.conditioning)
        batch = None if latent is None else rows_of(latent)
        labels = batch_labels(captured.gm.graph, batch, captured.static) if batch is not None and batch > 1 else {}
        nodes = {node.name: node for node in captured.gm.graph.nodes}
        found: list[Place] = []
        parts: list[list[Part]] = []
        for place in places:
            read = [nodes[name] for name in place.tap.read]
            rows = rows_of(read[0])
            apart = all(labels.get(node) in (Batch.LEADING, Batch.EQUAL, Batch.SAME) for node in read)
            if not apart or labels[read[0]] is not Batch.LEADING or batch is None or batch % 2 or rows is None:
                self.refused[Refusal(read[0].name, place.site, RefusalReason.MIXES_SAMPLES)] = None
                found.append(place)
                parts.append([(label, None) for label in place.labels])
                continue
            names, cuts = halves(place.labels, rows, place.tap.cuts, first)
            found.append(replace(place, tap=replace(place.tap, cuts=tuple(cuts))))
            parts.append(names)
        return found, parts


def _labels(tapped: TappedGraph, places: Sequence[Place], parts: Sequence[Sequence[Part]]) -> list[Label]:
    """Return the label of each comparison. Places that differ in nothing else get numbers."""
    seen: Counter[tuple[Any, ...]] = Counter()
    found = []
    for i, place in enumerate(places):
        numbers: dict[tuple[str, str | None, int | None, int], str] = {}
        for cut, head, distance in tapped.comparisons(i):
            modality, half = parts[i][cut]
            key = (modality, half, head, distance)
            whole = (place.site, place.quantity, *key)
            again = seen[whole]
            numbers[key] = f"{modality}#{again}" if again else modality
            found.append(Label(place, numbers[key], half, head, distance))
        seen.update((place.site, place.quantity, *key) for key in numbers)
    return found


assert LENT == GUIDANCE  # the statistics name the distance after its meaning
assert len(MOMENTS) == 6
