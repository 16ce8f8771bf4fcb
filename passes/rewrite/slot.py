"""How one value is held by a slot, with how many computed values before it, and what packs and unpacks it in a guarded
graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from dit_rewrite.passes.rewrite.codec import Codec, ValueCodec, combine, inline

BEHIND = 2.0**-7  # behind both halves of a value (half_batch.py)


@dataclass(frozen=True)
class Slot:
    """One value as it is held: `read` are the nodes that packing and unpacking read beside it, `first` is where its
    tensors begin among the site's. With a `depth` above 1 that many computed values are held, and unpacking takes their
    weighted sum."""

    value: fx.Node
    read: tuple[fx.Node, ...]
    codec: Codec
    first: int
    depth: int = 1

    @cached_property
    def is_plain(self) -> bool:
        """The value is held as it is."""
        return self.codec.is_plain(self.value.meta["val"], self._read)

    @cached_property
    def examples(self) -> tuple[Tensor, ...]:
        """The held tensors of the trace, without values."""
        value = self.value.meta["val"]
        return (value,) if self.is_plain else tuple(self.codec.encode(value, self._read))

    @property
    def width(self) -> int:
        """How many tensors are held of one computed value."""
        return len(self.examples)

    @property
    def _read(self) -> list[Tensor]:
        return [node.meta["val"] for node in self.read]

    def pack(self, graph: fx.Graph, env: Mapping[Any, fx.Node], position: int) -> list[fx.Node]:
        """Write what makes the held tensors of the value, right behind it."""
        if self.is_plain:
            return [env[self.value]]
        arguments = [env[self.value], *(env[node] for node in self.read)]
        return inline(graph, lambda v, *read: self.codec.encode(v, read), arguments, position, home=position)

    def unpack(
        self,
        graph: fx.Graph,
        held: Sequence[fx.Node],
        env: Mapping[Any, fx.Node],
        position: int,
        base: fx.Node | None = None,
    ) -> fx.Node:
        """Write what makes the value of the held tensors, right before its place; with a `base` that stands there and
        that they are added to, right behind.

        `held` has `width` tensors for each of the `depth` computed values, newest first, and above depth 1 the weights.
        """
        if self.is_plain and self.depth == 1:
            return held[0]
        arguments = [*held, *((env[node] for node in self.read) if base is None else (base,))]
        place = position - 1 if base is None else position + BEHIND
        (value,) = inline(graph, lambda *a: (self._value(a),), arguments, place, home=position)
        return value

    def _value(self, tensors: Sequence[Tensor]) -> Tensor:
        count, dtype = self.width, self.value.meta["val"].dtype
        if self.depth == 1:
            return self.codec.decode(tensors[:count], tensors[count:], dtype)
        assert isinstance(self.codec, ValueCodec), "what stands in the place of attention holds one state"
        end = count * self.depth
        history = [tensors[k : k + count] for k in range(0, end, count)]
        return combine(self.codec, history, tensors[end], tensors[end + 1 :], dtype)
