"""The streams of a trajectory, and which of them a call belongs to.

Evidence, strongest first: the name that `cache_context` gives; the conditioning (tensors by identity and version, or by
value if they are created anew; everything else by value); the position among the calls of a step that share name and
conditioning, confirmed by a latent that continues that of the stream. A call that matches two streams equally well gets
an empty stream of its own, and computes.

An argument tensor that changes from step to step (a ControlNet residual, a second latent) is *varying*, and not part of
the conditioning. This is learned in the first three steps of a stream: in the second one the tensor is a different one,
the old one was freed, and everything else matches. It may also be a prompt that was exchanged, so the stream loses its
values and computes. If the third step has a different tensor again, it varies. Once a tensor was the same in two steps,
a different one is a different conditioning. Varying tensors do not distinguish streams; the latent does.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from dit_rewrite.errors import StreamReason
from dit_rewrite.runtime.clock import Reading
from dit_rewrite.runtime.conditioning import TensorKind, equal
from dit_rewrite.runtime.inputs import Inputs
from dit_rewrite.runtime.stream import Stream
from dit_rewrite.runtime.tensors import relative_changes

CONTINUES = 0.5  # a latent continues the last one if its relative L2 change is smaller; independent noise has 1.41
MARGIN = 2.0  # a latent belongs to the nearest stream only if all others are farther by this factor
MAX_PLACES = 64  # calls of one conditioning in one step; if there are more, the timestep does not advance
PATIENCE = 2  # steps after which a stream that was called in one step only gives its memory back


Differing = dict[Stream, list[int]]  # the positions at which a stream's conditioning differs from a call's


class Streams:
    """The streams of one trajectory."""

    def __init__(self) -> None:
        self.all: list[Stream] = []

    def named(self, name: Hashable) -> list[Stream]:
        """Return the streams called `name`."""
        return [stream for stream in self.all if stream.name == name]

    def add(self, name: Hashable, place: int = 0) -> Stream:
        """Add a stream. Without a name it gets a number."""
        if name is None:
            numbers = {stream.name for stream in self.all}
            name = next(n for n in range(len(numbers) + 1) if n not in numbers)
        stream = Stream(name, place)
        self.all.append(stream)
        return stream

    def renew(self, stream: Stream | None, name: Hashable) -> Stream:
        """Add a stream, replacing `stream` if that is given."""
        if stream is not None:
            self.all.remove(stream)
        return self.add(name)

    def match(
        self, inputs: Inputs, name: Hashable, reading: Reading, step: int, first: bool
    ) -> tuple[Stream, StreamReason | None]:
        """Return the stream of a call, and a reason if it is a new one.

        step: the current step. first: whether it is the first step of the trajectory. A returned stream that is not in
        ``all`` is used for this call only.
        """
        if inputs.opaque:
            return Stream(name), StreamReason.UNREADABLE_INPUT
        differing = self.differing(self.alike(inputs, name), inputs)
        group = self._conditioned(differing)
        if not group:
            return self._moved(differing, inputs, name, reading, step)
        now = [] if reading.same_step is False else [s for s in group if s.step == step and not s.is_before(reading)]
        if len(group) == 1 and not now and reading.same_step is not None:
            stream, why = group[0], None
        else:
            stream, why = self._placed(group, now, inputs, name, reading, first)
        if stream in group and differing[stream]:
            proven = self._places(differing, TensorKind.VARYING).issuperset(differing[stream])
            again = stream.step == step and reading.same_step is True
            return stream, stream.moves(inputs, differing[stream], again, proven) or why
        if stream in group:
            stream.conditioning.hold(inputs)  # type: ignore[union-attr]
        return stream, why

    def alike(self, inputs: Inputs, name: Hashable) -> list[Stream]:
        """Return the streams called `name` (or unnamed) whose calls had the same arguments except for tensors."""
        named = (s for s in self.all if (s.name == name if name is not None else isinstance(s.name, int)))
        return [s for s in named if s.conditioning is not None and s.conditioning.is_like(inputs)]

    @staticmethod
    def differing(streams: Sequence[Stream], inputs: Inputs, told: bool = True) -> Differing:
        """Return the positions at which the conditioning of each stream differs from that of a call.

        If no stream has the same tensor objects, they are compared by content. `told`: the trajectory is explicit.
        """
        found = {s: s.conditioning.differing(inputs, told) for s in streams if s.conditioning is not None}
        if not all(found.values()):
            return found
        places = [(stream, place) for stream, differing in found.items() for place in differing]
        pairs = [stream.conditioning.pair(inputs, place) for stream, place in places]  # type: ignore[union-attr]
        for (stream, place), same in zip(places, equal(pairs), strict=True):
            if same:
                found[stream].remove(place)
        return found

    @staticmethod
    def _places(differing: Differing, *kinds: TensorKind) -> set[int]:
        """Return the positions of tensors of these kinds in the streams that have a call's conditioning."""
        of = [s.conditioning for s, places in differing.items() if s.conditioning is not None and not places]
        return {place for conditioning in of for place in conditioning.places(*kinds)}

    def _conditioned(self, differing: Differing) -> list[Stream]:
        """Return the streams that may have a call's conditioning, in the order in which they began.

        Positions that move in one of them do not distinguish it from another, unless they are invariant in that one.
        """
        if len(differing) == 1:  # most calls
            return [stream for stream, places in differing.items() if not places]
        of = {stream: stream.conditioning for stream in differing if stream.conditioning is not None}
        moving = self._places(differing, TensorKind.MOVED, TensorKind.VARYING)
        group = [s for s, places in differing.items() if not places]
        return [s for s in differing if s in group or moving.issuperset(differing[s]) and of[s].may_vary(differing[s])]

    def _placed(
        self,
        group: list[Stream],
        now: list[Stream],
        inputs: Inputs,
        name: Hashable,
        reading: Reading,
        first: bool,
    ) -> tuple[Stream, StreamReason | None]:
        """Choose among the streams in `group`, which share name and conditioning; `now` were called in this evaluation.

        Reads the device once, for the relative change of the latent since each stream's last call.
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
        if len(nearest) > 1 and unclaimed:  # streams with one latent are called in the order in which they began
            return unclaimed[0], None
        expected = group[len(now)] if len(now) < len(group) else group[0]
        if expected in unclaimed:
            return expected, None
        if len(nearest) > 1 or any(change[s] < MARGIN * least for s in near if s is not nearest[0]):
            return Stream(name), StreamReason.AMBIGUOUS_STREAM
        if unclaimed or self._is_evaluated_again(nearest[0], reading, least):
            return nearest[0], None
        return self._join(group, name)

    @staticmethod
    def _is_evaluated_again(stream: Stream, reading: Reading, change: float) -> bool:
        """Return whether another call of a stream in one step is the second evaluation of a second-order solver."""
        further = reading.entry is None or stream.entry is None or reading.entry >= stream.entry
        return reading.repeats is not False and further and change > 0

    def _join(self, group: list[Stream], name: Hashable) -> tuple[Stream, StreamReason | None]:
        """Add a stream to a group, unless it has MAX_PLACES streams, so that the timestep does not advance."""
        if len(group) >= MAX_PLACES:
            return Stream(name), StreamReason.TOO_MANY_CALLS
        return self.add(name, 1 + max(stream.place for stream in group)), StreamReason.NEW_STREAM

    def _moved(
        self, differing: Differing, inputs: Inputs, name: Hashable, reading: Reading, step: int
    ) -> tuple[Stream, StreamReason | None]:
        """Return the stream of a call with unknown conditioning: one whose tensors moved, or a new one."""
        waiting = [
            s
            for s in differing
            if step - s.step == 1 or s.step == step and self._may_be_again(s, reading, differing[s])
        ]
        following = [stream for stream in waiting if self.follows(stream, differing[stream], name is not None)]
        following = [s for s in following if not any(set(differing[t]) < set(differing[s]) for t in following)]
        if len(following) != 1 or reading.same_step is not False:  # a single one needs no latent
            following = self._going_on(following, inputs, reading)
        if len(following) == 1 or self._are_one(following, differing):
            stream = following[0]  # of several with one conditioning, the one that began first
            again = stream.step == step and reading.same_step is True
            return stream, stream.moves(inputs, differing[stream], again, self._moved_before(stream, differing[stream]))
        added = self.add(name)
        added.suspect = self._suspect(self._going_on(waiting, inputs, reading), differing)
        return added, StreamReason.NEW_CONDITIONING if differing else StreamReason.NEW_STREAM

    @staticmethod
    def _going_on(streams: Sequence[Stream], inputs: Inputs, reading: Reading) -> list[Stream]:
        """Return the streams whose latent a call continues in another step."""
        changes = zip(streams, relative_changes(inputs.latent, [s.last_latent for s in streams]), strict=True)
        return [stream for stream, c in changes if c < CONTINUES and (c > 0 or reading.same_step is False)]

    @staticmethod
    def _are_one(streams: Sequence[Stream], differing: Differing) -> bool:
        """Return whether all streams had the same conditioning and the same latent in their last calls."""
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
        """Return the stream of the last step that differs from a call at the fewest positions, and these positions.

        None if several differ at equally few.
        """
        last = max((stream.step for stream in streams), default=-1)
        moved = [(s, differing[s]) for s in streams if s.step == last]
        fewest = min((len(places) for _, places in moved), default=0)
        nearest = [pair for pair in moved if len(pair[1]) == fewest]
        return nearest[0] if len(nearest) == 1 else None

    @staticmethod
    def follows(stream: Stream, moved: list[int], named: bool) -> bool:
        """Return whether a call continues a stream although its tensors at the positions `moved` differ.

        This is known if the old tensors were freed, so that no call can pass them again, or if they moved before.
        """
        conditioning = stream.conditioning
        if conditioning is None:
            return False
        gone = conditioning.are_gone(moved) and (named or len(moved) < len(conditioning))
        return gone or Streams._moved_before(stream, moved)

    @staticmethod
    def _moved_before(stream: Stream, moved: list[int]) -> bool:
        """Return whether the same positions changed a step before, and the stream of that step was not called since."""
        before = stream.suspect
        return before is not None and before[0].step < stream.step and moved == before[1]

    @staticmethod
    def _may_be_again(stream: Stream, reading: Reading, moved: list[int]) -> bool:
        """Return whether a call may be the next one of a stream although both may belong to one step."""
        if reading.same_step is not True:
            return True
        conditioning = stream.conditioning
        return (
            conditioning is not None
            and conditioning.have_moved(moved, stream.calls + 1)
            and reading.repeats is not False
        )

    def are_continued(self, inputs: Inputs) -> bool:
        """Return whether the latent of a call continues that of some stream, or there is none to compare. Reads the
        device once."""
        if not self.all or inputs.latent is None:
            return True
        before = [stream.first_latent if stream.calls == 1 else stream.last_latent for stream in self.all]
        return any(change < CONTINUES for change in relative_changes(inputs.latent, before))

    def lapse(self, step: int) -> list[Stream]:
        """Drop the caches of streams that were called in one step only, more than PATIENCE steps ago.

        Returns the streams that had caches. Streams whose conditioning was freed are removed.
        """
        once = [s for s in self.all if s.calls == 1 and step - s.step > PATIENCE and s.conditioning is not None]
        if not once:
            return []
        lapsed = [stream for stream in once if stream.caches]
        for stream in lapsed:
            stream.forget()
            stream.latent = None
            stream.conditioning.release()  # type: ignore[union-attr]
        gone = {id(stream) for stream in once if stream.conditioning.is_gone()}  # type: ignore[union-attr]
        self.all = [stream for stream in self.all if id(stream) not in gone]
        return lapsed

    def evict(self, limit: int, present: Stream) -> list[Stream]:
        """Drop caches until all streams together hold at most `limit` bytes, and return the evicted streams.

        Streams that were called in one step only go first, then the least recently called; `present` is never evicted.
        """
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
