"""The slot of one value: how a guarded graph encodes the value for its slot and decodes it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from dit_rewrite.passes.rewrite.codec import Codec, ValueCodec, combine, inline

BEHIND = 2.0**-7  # after both halves of a value (half_batch.py)


@dataclass(frozen=True)
class Slot:
    """The slot of one value of a site.

    ``read`` are the nodes whose tensors encoding and decoding read. ``first`` is the index of the slot's first tensor
    among those of the site. The slot keeps ``depth`` computed values; decoding takes the weighted sum if depth > 1.
    """

    value: fx.Node
    read: tuple[fx.Node, ...]
    codec: Codec
    first: int
    depth: int = 1

    @cached_property
    def is_plain(self) -> bool:
        """Whether the slot stores the value unchanged."""
        return self.codec.is_plain(self.value.meta["val"], self._read)

    @cached_property
    def examples(self) -> tuple[Tensor, ...]:
        """Fake tensors with the shapes and dtypes of the stored tensors of one computed value."""
        value = self.value.meta["val"]
        return (value,) if self.is_plain else tuple(self.codec.encode(value, self._read))

    @property
    def width(self) -> int:
        """The number of stored tensors of one computed value."""
        return len(self.examples)

    @property
    def _read(self) -> list[Tensor]:
        return [node.meta["val"] for node in self.read]

    def encode(self, graph: fx.Graph, env: Mapping[Any, fx.Node], position: int) -> list[fx.Node]:
        """Append nodes that encode the value, right after it, and return the nodes of the tensors to store."""
        if self.is_plain:
            return [env[self.value]]
        arguments = [env[self.value], *(env[node] for node in self.read)]
        return inline(graph, lambda v, *read: self.codec.encode(v, read), arguments, position, home=position)

    def decode(
        self,
        graph: fx.Graph,
        stored: Sequence[fx.Node],
        env: Mapping[Any, fx.Node],
        position: int,
        base: fx.Node | None = None,
    ) -> fx.Node:
        """Append nodes that reconstruct the value from the `stored` tensors, and return its node.

        `stored` has `width` tensors for each of the `depth` computed values, newest first, and if `depth` > 1 the
        weights. If `base` is given, the codec reads it instead of `read`, and the new nodes come after it; otherwise
        they come right before the position of the value.
        """
        if self.is_plain and self.depth == 1:
            return stored[0]
        arguments = [*stored, *((env[node] for node in self.read) if base is None else (base,))]
        place = position - 1 if base is None else position + BEHIND
        (value,) = inline(graph, lambda *a: (self._value(a),), arguments, place, home=position)
        return value

    def _value(self, tensors: Sequence[Tensor]) -> Tensor:
        count, dtype = self.width, self.value.meta["val"].dtype
        if self.depth == 1:
            return self.codec.decode(tensors[:count], tensors[count:], dtype)
        assert isinstance(self.codec, ValueCodec), "the slot of an attention core has depth 1"
        end = count * self.depth
        history = [tensors[k : k + count] for k in range(0, end, count)]
        return combine(self.codec, history, tensors[end], tensors[end + 1 :], dtype)
