"""Which stream of a trajectory a call belongs to.

Evidence, strongest first: the name that `cache_context` gives; the conditioning (tensors by identity and version, or by
value where they are made anew; everything else by value); the place among the calls of a step that share these two,
confirmed by a latent that continues the stream's own. A call that could be either of two streams gets slots of its own,
and so computes.

A tensor that moves from step to step at one place of the arguments (a ControlNet's residuals, a second latent) is data
and no conditioning. That is learned at a stream's second step: the tensor is another one, the old one is gone, and
everything else agrees. Once a tensor has stayed, another one in its place is another condition. What is data for one
stream tells it apart from no other: the latent does.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dit_rewrite.errors import Reason
from dit_rewrite.runtime.cache import Bank
from dit_rewrite.runtime.clock import Reading
from dit_rewrite.runtime.conditioning import Conditioning, equal
from dit_rewrite.runtime.inputs import Inputs
from dit_rewrite.runtime.tensors import relative_changes, version

CONTINUES = 0.5  # a latent whose relative L2 change is below this continues the last; independent noise has 1.41
MARGIN = 2.0  # a latent is one stream's and no other's where it is nearer to that by this factor
MAX_PLACES = 64  # calls of one conditioning in one step; more of them are no step but a timestep that stands still
PATIENCE = 2  # steps after which a stream that was called only once gives its memory back


@dataclass(eq=False)
class Stream:
    """One stream of a trajectory: its slots, and what tells its calls apart.

    ``place`` numbers the streams of one name and conditioning; ``step`` and ``entry`` are those of the last call,
    ``calls`` counts the steps it was called in. ``suspect``: it may be another stream whose tensors at these places
    moved, though those before still exist. ``repeats``: its only call was that of another one.
    """

    name: Hashable
    place: int = 0
    banks: dict[tuple[int, int], Bank] = field(default_factory=dict)
    sequence: tuple[int, ...] | None = None
    num_layers: int | None = None
    conditioning: Conditioning | None = None
    latent: Tensor | None = None
    timestep: float = float("nan")
    step: int = -1
    entry: int | None = None
    calls: int = 0
    suspect: tuple[Stream, list[int]] | None = None
    repeats: bool = False
    _latent_version: int | None = None

    @property
    def last_latent(self) -> Tensor | None:
        """The latent of the last call; None where it was changed in place since."""
        unchanged = self.latent is not None and version(self.latent) == self._latent_version
        return self.latent if unchanged else None

    @property
    def bytes(self) -> int:
        """Bytes that its slots keep alive."""
        return sum(bank.bytes for bank in self.banks.values())

    def note(self, inputs: Inputs, step: int, entry: int | None = None) -> None:
        """Note a call that is this stream's."""
        if self.conditioning is None:
            self.conditioning = Conditioning(inputs)
        if step != self.step:
            self.calls += 1
        if self.calls > 1:
            self.conditioning.settle()
        self.step, self.entry = step, entry
        latent = inputs.latent  # a sampler may change it in place, which inference tensors do not count
        self.latent = latent.clone() if latent is not None and latent.is_inference() else latent
        self._latent_version = None if self.latent is None else version(self.latent)

    def is_before(self, reading: Reading) -> bool:
        """Whether its last call is at an earlier entry of the schedule, perhaps of the same timestep."""
        return reading.entry is not None and self.entry is not None and self.entry < reading.entry

    def forget(self) -> None:
        """Give all slots back."""
        self.banks.clear()
        self.sequence = None


Differing = dict[Stream, list[int]]  # the places at which a stream's conditioning is another than a call's


class Streams:
    """The streams of one trajectory."""

    def __init__(self) -> None:
        self.all: list[Stream] = []

    def named(self, name: Hashable) -> list[Stream]:
        """The streams of a name."""
        return [stream for stream in self.all if stream.name == name]

    def add(self, name: Hashable, place: int = 0) -> Stream:
        """Another stream; one that nobody named gets a number."""
        if name is None:
            numbers = {stream.name for stream in self.all}
            name = next(n for n in range(len(numbers) + 1) if n not in numbers)
        stream = Stream(name, place)
        self.all.append(stream)
        return stream

    def renew(self, stream: Stream | None, name: Hashable) -> Stream:
        """Another stream, in the place of one before if that is given."""
        if stream is not None:
            self.all.remove(stream)
        return self.add(name)

    def match(
        self, inputs: Inputs, name: Hashable, reading: Reading, step: int, first: bool
    ) -> tuple[Stream, Reason | None]:
        """The stream of a call, and the reason where it is not one of those before.

        `step` is the one that is under way, and `first` says whether it is the trajectory's first. A stream that is
        not among ``all`` is for this call alone.
        """
        if inputs.opaque:
            return Stream(name), Reason.UNREADABLE_INPUT
        differing = self.differing(self.alike(inputs, name), inputs)
        group = self._conditioned(differing)
        if not group:
            return self._moved(differing, inputs, name, reading, step)
        now = [] if reading.same_step is False else [s for s in group if s.step == step and not s.is_before(reading)]
        if len(group) == 1 and not now and reading.same_step is not None:
            stream, why = group[0], None
        else:
            stream, why = self._placed(group, now, inputs, name, reading, first)
        if stream in group:
            stream.conditioning.hold(inputs, differing[stream])  # type: ignore[union-attr]
        return stream, why

    def alike(self, inputs: Inputs, name: Hashable) -> list[Stream]:
        """The streams of this name, or without one, whose calls had the same arguments but for tensors."""
        named = (s for s in self.all if (s.name == name if name is not None else isinstance(s.name, int)))
        return [s for s in named if s.conditioning is not None and s.conditioning.is_like(inputs)]

    @staticmethod
    def differing(mine: Sequence[Stream], inputs: Inputs, by_value: bool = True) -> Differing:
        """At which places each stream has another conditioning than a call.

        With `by_value`, tensors of equal content are the same, where no stream has the very tensors of the call.
        """
        found = {s: s.conditioning.differing(inputs) for s in mine if s.conditioning is not None}
        if not by_value or not all(found.values()):
            return found
        places = [(stream, place) for stream, differing in found.items() for place in differing]
        pairs = [stream.conditioning.pair(inputs, place) for stream, place in places]  # type: ignore[union-attr]
        for (stream, place), same in zip(places, equal(pairs), strict=True):
            if same:
                found[stream].remove(place)
        return found

    @staticmethod
    def _conditioned(differing: Differing) -> list[Stream]:
        """The streams that may have a call's conditioning, in the order in which they began.

        What is data for one of them tells it apart from no other, unless it stayed the same there.
        """
        of = {stream: stream.conditioning for stream in differing if stream.conditioning is not None}
        data = {place for stream, places in differing.items() if not places for place in of[stream].data}
        group = [s for s, places in differing.items() if not places]
        return [s for s in differing if s in group or data.issuperset(differing[s]) and of[s].is_new(differing[s])]

    def _placed(
        self,
        group: list[Stream],
        now: list[Stream],
        inputs: Inputs,
        name: Hashable,
        reading: Reading,
        first: bool,
    ) -> tuple[Stream, Reason | None]:
        """The stream of a call that shares name and conditioning with others; `now` were called for this evaluation.

        Reads the device once, for the change of the latent since each stream's last call.
        """
        if first and reading.same_step and len(now) == len(group):
            return self._join(group, name)
        change = dict(zip(group, relative_changes(inputs.latent, [s.last_latent for s in group]), strict=True))
        siblings = [s for s in now if change[s] == 0]  # other calls of this step on the same latent
        near = [s for s in group if change[s] < CONTINUES and s not in siblings]
        if not near:
            return self._join(group, name)
        least = min(change[s] for s in near)
        nearest = [s for s in near if change[s] == least]
        unclaimed = [s for s in nearest if s not in now] or (nearest if reading.same_step is None else [])
        if len(nearest) > 1 and unclaimed:  # of one latent: in the order in which they began
            return unclaimed[0], None
        expected = group[len(now)] if len(now) < len(group) else group[0]
        if expected in unclaimed:
            return expected, None
        if len(nearest) > 1 or any(change[s] < MARGIN * least for s in near if s is not nearest[0]):
            return Stream(name), Reason.AMBIGUOUS_STREAM
        if unclaimed or self._is_evaluated_again(nearest[0], reading, least):
            return nearest[0], None
        return self._join(group, name)

    @staticmethod
    def _is_evaluated_again(stream: Stream, reading: Reading, change: float) -> bool:
        """Whether a further call of a stream in one step is a second-order solver's second evaluation."""
        further = reading.entry is None or stream.entry is None or reading.entry >= stream.entry
        return reading.repeats is not False and further and change > 0

    def _join(self, group: list[Stream], name: Hashable) -> tuple[Stream, Reason | None]:
        """Another stream of a group, unless there are so many that the timestep stands still."""
        if len(group) >= MAX_PLACES:
            return Stream(name), Reason.TIMESTEP_STILL
        return self.add(name, 1 + max(stream.place for stream in group)), Reason.NEW_STREAM

    def _moved(
        self, differing: Differing, inputs: Inputs, name: Hashable, reading: Reading, step: int
    ) -> tuple[Stream, Reason | None]:
        """The stream of a call whose conditioning is no stream's: the one whose data moved on, or another one."""
        waiting = [s for s in differing if step - s.step == 1 or s.step == step and reading.same_step is not True]
        following = [stream for stream in waiting if self.follows(stream, differing[stream], name is not None)]
        following = [s for s in following if not any(set(differing[t]) < set(differing[s]) for t in following)]
        if len(following) != 1 or reading.same_step is not False:  # where one alone can be meant, the latent may leap
            following = self._going_on(following, inputs, reading)
        if len(following) == 1 or self._are_one(following, differing):
            stream = following[0]  # of one conditioning, the first that began
            stream.conditioning.hold(inputs, differing[stream])  # type: ignore[union-attr]
            return stream, None
        added = self.add(name)
        added.suspect = self._suspect(self._going_on(waiting, inputs, reading), differing)
        return added, Reason.NEW_CONDITIONING if differing else Reason.NEW_STREAM

    @staticmethod
    def _going_on(streams: Sequence[Stream], inputs: Inputs, reading: Reading) -> list[Stream]:
        """Those whose latent a call continues in another step."""
        changes = zip(streams, relative_changes(inputs.latent, [s.last_latent for s in streams]), strict=True)
        return [stream for stream, c in changes if c < CONTINUES and (c > 0 or reading.same_step is False)]

    @staticmethod
    def _are_one(streams: Sequence[Stream], differing: Differing) -> bool:
        """Whether streams had one conditioning and one latent at their last calls."""
        first = streams[0] if streams else None
        return first is not None and all(
            differing[s] == differing[first]
            and s.latent is first.latent
            and s.step == first.step
            and s.conditioning.shares(first.conditioning, differing[s])  # type: ignore[union-attr,arg-type]
            for s in streams
        )

    @staticmethod
    def _suspect(streams: Sequence[Stream], differing: Differing) -> tuple[Stream, list[int]] | None:
        """The stream that is nearest to a call's conditioning, and where they differ; of those called last."""
        last = max((stream.step for stream in streams), default=-1)
        moved = [(s, differing[s]) for s in streams if s.step == last]
        fewest = min((len(places) for _, places in moved), default=0)
        nearest = [pair for pair in moved if len(pair[1]) == fewest]
        return nearest[0] if len(nearest) == 1 else None

    @staticmethod
    def follows(stream: Stream, moved: list[int], named: bool) -> bool:
        """Whether a call is a stream's though tensors of its conditioning are others, so that these are data.

        That they are data is known where the tensors before do not exist any more, so that no call can have them
        again; or where they moved the same way a step before, and the stream of that time was not called since.
        """
        conditioning = stream.conditioning
        if conditioning is None:
            return False
        gone = conditioning.are_gone(moved) and (named or len(moved) < len(conditioning))
        before = stream.suspect
        return gone or (before is not None and before[0].step < stream.step and moved == before[1])

    def lapse(self, step: int) -> list[Stream]:
        """Take the slots from streams that were called in one step and not again soon after; those that had any."""
        once = [s for s in self.all if s.calls == 1 and step - s.step > PATIENCE and s.conditioning is not None]
        lapsed = [stream for stream in once if stream.banks]
        for stream in lapsed:
            stream.forget()
            stream.latent = None
            stream.conditioning.release()  # type: ignore[union-attr]
        gone = {id(stream) for stream in once if stream.conditioning.is_gone()}  # type: ignore[union-attr]
        self.all = [stream for stream in self.all if id(stream) not in gone]
        return lapsed

    def evict(self, limit: int, present: Stream) -> list[Stream]:
        """Take slots from streams until all together hold at most `limit` bytes: those called once first, then those
        whose last call is longest ago; never from the `present` one."""
        evicted, sizes = [], {stream: stream.bytes for stream in self.all}
        total = sum(sizes.values())
        for stream in sorted(self.all, key=lambda s: (s.calls > 1, s.step)):
            if total <= limit:
                break
            if stream is not present and sizes[stream]:
                stream.forget()
                total -= sizes[stream]
                evicted.append(stream)
        return evicted
