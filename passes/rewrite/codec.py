"""What a slot holds in the place of a value: the stream's change across a span, numbers of fewer bits, or both.

Plain functions of tensors; `inline` writes what they do into a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dit_rewrite.passes.analysis.unbacked import is_dense

_LARGEST = {"int8": 127.0, "fp8": 448.0}  # of e4m3
_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
FORMATS = tuple(_DTYPES)


class Codec(Protocol):
    """What is held for a value, made of it and of what its place reads (a span's base; an attention's query, key, value
    and perhaps mask), and how the value is had again from what is held and from what the place reads then."""

    def is_plain(self, value: Tensor, read: Sequence[Tensor]) -> bool:
        """Whether the value itself is held."""
        ...

    def encode(self, value: Tensor, read: Sequence[Tensor]) -> Sequence[Tensor]:
        """What is held."""
        ...

    def decode(self, held: Sequence[Tensor], read: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The value again, in its `dtype`."""
        ...


@dataclass(frozen=True)
class ValueCodec:
    """The codec of branches and spans: the value, less the base that is read, if one is; in numbers of `name`.

    "int8" and "fp8" have one fp32 scale for each token, so that the token's largest absolute value is the largest
    number. A token that is all zero has scale 1; one that is not finite stays so, by its scale.
    """

    name: str | None = None

    def __str__(self) -> str:
        return repr(self.name)

    def is_plain(self, value: Tensor, read: Sequence[Tensor]) -> bool:
        return not read and not is_converted(value, self.name) and is_dense(value)

    def encode(self, value: Tensor, read: Sequence[Tensor]) -> tuple[Tensor, ...]:
        held = value - read[0] if read else value
        name = self.name if is_converted(value, self.name) else None
        if name is None or name not in _LARGEST:
            held = held if name is None else held.to(_DTYPES[name])
            return (held if is_dense(held) else held.clone(),)  # keys beside queries and values would hold all three
        wide = held.float()
        largest = wide.abs().amax(-1, keepdim=True)
        scale = largest / _LARGEST[name]
        scale = scale.masked_fill(scale == 0, 1.0)  # also where the quotient is too small for fp32
        numbers = (wide / scale).clamp(-_LARGEST[name], _LARGEST[name])
        return (numbers.round() if name == "int8" else numbers).to(_DTYPES[name]), scale

    def decode(self, held: Sequence[Tensor], read: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        value = held[0]
        if len(held) == 2:
            value = value.float() * held[1]
        value = value.to(dtype) if self.name is not None else value
        return self.join(value, read)

    def join(self, value: Tensor, read: Sequence[Tensor]) -> Tensor:
        """What is held with what it is added to, if anything is read."""
        return read[0] + value if read else value


@dataclass(frozen=True)
class DeltaCodec(ValueCodec):
    """The codec of a guided batch: the half that is not computed, less the one that is, number `half`.

    What is read when it is had again is the computed half, twice.
    """

    half: Literal[0, 1] = 0

    def is_plain(self, value: Tensor, read: Sequence[Tensor]) -> bool:
        return False

    def encode(self, value: Tensor, read: Sequence[Tensor]) -> tuple[Tensor, ...]:
        halves = value.chunk(2)
        return super().encode(halves[1 - self.half] - halves[self.half], read)

    def join(self, value: Tensor, read: Sequence[Tensor]) -> Tensor:
        if not read:
            return value
        computed, same = read[0].chunk(2)
        return torch.cat([computed, same + value] if self.half == 0 else [computed + value, same])


def combine(
    codec: ValueCodec, history: Sequence[Sequence[Tensor]], weights: Tensor, read: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """The sum of held values, newest first, by `weights` ``(len(history),)``; plus the base that is read, if one is.

    The sum is taken in fp32 (of float64 values in float64) and then rounded to `dtype`: weights (1, 0, …) give the
    newest value bit for bit. Numbers that are no fractions are taken from the newest.
    """
    if not dtype.is_floating_point:
        return codec.decode(history[0], read, dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    terms = [weights[k].to(wide) * codec.decode(held, (), dtype).to(wide) for k, held in enumerate(history)]
    return codec.join(sum(terms[1:], terms[0]).to(dtype), read)


def is_converted(value: Tensor, store: str | None) -> bool:
    """Whether `store` changes what is held of a value: of tokens, and not of a mere number."""
    return store is not None and value.is_floating_point() and value.ndim >= 2


def inline(
    graph: fx.Graph, function: Callable[..., Sequence[Tensor]], arguments: Sequence[fx.Node], position: float, home: int
) -> list[fx.Node]:
    """Write into `graph` what `function` does with the values of `arguments`; the nodes of its results.

    They are numbered from `position` on, less than 1 further, and belong to the node at `home` (insert_guards.py).
    """
    traced = make_fx(function)(*(node.meta["val"] for node in arguments))
    env: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), arguments, strict=True))
    count = len(traced.graph.nodes)
    for k, node in enumerate(traced.graph.nodes, 1):
        if node.op not in ("placeholder", "output"):
            env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].meta = {"val": node.meta["val"], "position": position + k / (count + 1), "home": home}
    results: Any = traced.graph.output_node().args[0]
    return [env[node] for node in results]
