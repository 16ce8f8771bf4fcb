"""Which stream of a trajectory a call belongs to.

Evidence, strongest first: the name that `cache_context` gives; the conditioning (tensors by identity and version, or by
value where they are made anew; everything else by value); the place among the calls of a step that share these two,
confirmed by a latent that continues the stream's own. A call that could be either of two streams gets slots of its own,
and so computes.

A tensor that moves from step to step at one place of the arguments (a ControlNet's residuals, a second latent) is data
and no conditioning. That is learned at a stream's second step: the tensor is another one, the old one is gone, and
everything else agrees. Once a tensor has stayed, another one in its place is another condition.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dit_rewrite.errors import Reason
from dit_rewrite.runtime.cache import Bank
from dit_rewrite.runtime.clock import Reading
from dit_rewrite.runtime.conditioning import Conditioning, unequal
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
    moved, though those before still exist.
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

    def forget(self) -> None:
        """Give all slots back."""
        self.banks.clear()
        self.sequence = None


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

    def match(
        self, inputs: Inputs, name: Hashable, reading: Reading, step: int, first: bool
    ) -> tuple[Stream, Reason | None]:
        """The stream of a call, and the reason where it is not one of those before.

        `step` is the one that is under way, and `first` says whether it is the trajectory's first. A stream that is
        not among ``all`` is for this call alone.
        """
        if inputs.opaque:
            return Stream(name), Reason.UNREADABLE_INPUT
        mine = self.alike(inputs, name)
        group = self.conditioned(mine, inputs)
        if not group:
            moved = self._unequal(mine, inputs)
            group = [stream for stream, places in moved.items() if not places]
            if not group:
                return self._moved(moved, inputs, name, reading, step)
            for stream in group:
                stream.conditioning.hold(inputs)  # type: ignore[union-attr]
        now = [stream for stream in group if stream.step == step and reading.same_step is not False]
        if len(group) == 1 and not now:
            return group[0], None
        return self._placed(group, now, inputs, name, reading, first)

    def alike(self, inputs: Inputs, name: Hashable) -> list[Stream]:
        """The streams of this name, or without one, whose calls had the same arguments but for tensors."""
        named = (s for s in self.all if (s.name == name if name is not None else isinstance(s.name, int)))
        return [s for s in named if s.conditioning is not None and s.conditioning.is_like(inputs)]

    @staticmethod
    def conditioned(mine: Sequence[Stream], inputs: Inputs) -> list[Stream]:
        """Those whose conditioning are these very tensors."""
        return [stream for stream in mine if not stream.conditioning.differing(inputs)]  # type: ignore[union-attr]

    @staticmethod
    def _unequal(mine: Sequence[Stream], inputs: Inputs) -> dict[Stream, list[int]]:
        """The places at which each stream's conditioning differs in content."""
        held = [stream.conditioning for stream in mine if stream.conditioning is not None]
        return dict(zip(mine, unequal([(c, c.differing(inputs)) for c in held], inputs), strict=True))

    def _placed(
        self,
        group: list[Stream],
        now: list[Stream],
        inputs: Inputs,
        name: Hashable,
        reading: Reading,
        first: bool,
    ) -> tuple[Stream, Reason | None]:
        """The stream of a call that shares name and conditioning with others; `now` were called in this step.

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
        waiting = [s for s in group if s not in now] or (now if reading.same_step is None else [])
        places = len(now) if len(now) < len(group) else 0
        expected = next((s for s in waiting if s.place == places), None)
        if expected in nearest:
            return expected, None  # type: ignore[return-value]
        if len(nearest) > 1 or any(change[s] < MARGIN * least for s in near if s is not nearest[0]):
            return Stream(name), Reason.AMBIGUOUS_STREAM
        if nearest[0] in waiting or self._is_evaluated_again(nearest[0], reading, least):
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
        self, moved: dict[Stream, list[int]], inputs: Inputs, name: Hashable, reading: Reading, step: int
    ) -> tuple[Stream, Reason | None]:
        """The stream of a call whose conditioning is no stream's: the one whose data moved on, or another one.

        `moved` says where the conditioning of each stream differs.
        """
        waiting = [stream for stream in moved if stream.step != step or reading.same_step is not True]
        following = [stream for stream in waiting if self.follows(stream, moved[stream], name is not None)]
        if len(following) > 1 or reading.same_step is None:
            following = self._going_on(following, inputs, reading)
        if len(following) == 1:
            stream = following[0]
            stream.conditioning.hold(inputs, moved[stream])  # type: ignore[union-attr]
            return stream, None
        added = self.add(name)
        added.suspect = self._suspect(self._going_on(waiting, inputs, reading), moved)
        return added, Reason.NEW_CONDITIONING if moved else Reason.NEW_STREAM

    @staticmethod
    def _going_on(streams: Sequence[Stream], inputs: Inputs, reading: Reading) -> list[Stream]:
        """Those whose latent a call continues, in another step."""
        changes = zip(streams, relative_changes(inputs.latent, [s.last_latent for s in streams]), strict=True)
        return [stream for stream, c in changes if c < CONTINUES and (c > 0 or reading.same_step is False)]

    @staticmethod
    def _suspect(streams: Sequence[Stream], moved: dict[Stream, list[int]]) -> tuple[Stream, list[int]] | None:
        """The stream that is nearest to a call's conditioning, and where they differ; of those called last."""
        last = max((stream.step for stream in streams), default=-1)
        latest = [stream for stream in streams if stream.step == last]
        fewest = min((len(moved[stream]) for stream in latest), default=0)
        nearest = [stream for stream in latest if len(moved[stream]) == fewest]
        return (nearest[0], moved[nearest[0]]) if len(nearest) == 1 else None

    @staticmethod
    def follows(stream: Stream, moved: Sequence[int], named: bool) -> bool:
        """Whether a call may be a stream's though tensors of its conditioning differ, so that these are data.

        That they are data is known where the tensors before do not exist any more, so that no call can have them
        again; or where they moved the same way a step before, and the stream of that time was not called since.
        """
        conditioning, before = stream.conditioning, stream.suspect
        if conditioning is None:
            return False
        gone = conditioning.are_gone(moved) and (named or len(moved) < len(conditioning))
        return gone or (before is not None and before[0].step < stream.step and list(moved) == before[1])

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
