"""A stream: the calls of a trajectory that share their caches, one in each step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dit_rewrite.errors import StreamReason
from dit_rewrite.runtime.cache import Cache
from dit_rewrite.runtime.clock import Reading
from dit_rewrite.runtime.conditioning import Conditioning
from dit_rewrite.runtime.inputs import Inputs
from dit_rewrite.runtime.tensors import version


@dataclass(eq=False)
class Stream:
    """One stream of a trajectory: its caches, and the properties that identify its calls.

    place: index among the streams with the same name and conditioning. step, entry: step and schedule entry of its last
    call. calls: the number of steps in which it was called. suspect: a stream that this one may continue with different
    tensors at these argument positions, although the old tensors still exist. repeats: its only call was identical to
    that of another stream. first_latent: a copy of the latent of its first step, until it is called in another one.
    """

    name: Hashable
    place: int = 0
    caches: dict[tuple[int, int], Cache] = field(default_factory=dict)
    sequence: tuple[int, ...] | None = None
    num_layers: int | None = None
    conditioning: Conditioning | None = None
    latent: Tensor | None = None
    first_latent: Tensor | None = None
    timestep: float = float("nan")
    step: int = -1
    entry: int | None = None
    calls: int = 0
    suspect: tuple[Stream, list[int]] | None = None
    repeats: bool = False
    _latent_version: int | None = None

    @property
    def last_latent(self) -> Tensor | None:
        """The latent of the last call, or None if it was modified in place since."""
        unchanged = self.latent is not None and version(self.latent) == self._latent_version
        return self.latent if unchanged else None

    @property
    def bytes(self) -> int:
        """Size of its caches in bytes."""
        return sum(cache.bytes for cache in self.caches.values())

    def note(self, inputs: Inputs, step: int, entry: int | None = None) -> None:
        """Record a call of this stream."""
        if self.conditioning is None:
            self.conditioning = Conditioning(inputs)
        if step != self.step:
            self.calls += 1
        if self.calls > 1:
            self.conditioning.settle(self.calls)
        self.step, self.entry = step, entry
        latent = inputs.latent  # a sampler may modify it in place, and inference tensors have no version
        self.latent = latent.clone() if latent is not None and latent.is_inference() else latent
        self.first_latent = None if latent is None or self.calls > 1 else latent.detach().clone()
        self._latent_version = None if self.latent is None else version(self.latent)

    def is_before(self, reading: Reading) -> bool:
        """Return whether its last call was at an earlier entry of the schedule, possibly with the same timestep."""
        return reading.entry is not None and self.entry is not None and self.entry < reading.entry

    def moves(self, inputs: Inputs, places: Sequence[int], again: bool, proven: bool) -> StreamReason | None:
        """Take the conditioning of a call that differs at `places` from that of the last one.

        Unless it is `proven` that these tensors vary, or they were different ones in an earlier step too, they may be
        another prompt: the caches are dropped, and the reason is returned. `again`: the call belongs to the stream's
        last step, as the second evaluation of a second-order solver does.
        """
        conditioning, number = self.conditioning, self.calls + (not again)
        assert conditioning is not None
        vary = proven or conditioning.have_moved(places, number)
        conditioning.move(inputs, places, number, vary)
        if vary:
            return None
        self.forget()
        return StreamReason.MOVED_ONCE

    def forget(self) -> None:
        """Drop all caches."""
        self.caches.clear()
        self.sequence = None
