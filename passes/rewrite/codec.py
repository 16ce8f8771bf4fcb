"""Codecs: the formats in which slots store values.

A codec may store the difference between a value and a base tensor, convert it to fewer bits, or both. Codecs are
functions of tensors; `inline` writes their ops into a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dit_rewrite import torch_compat
from dit_rewrite.passes.analysis.unbacked import is_dense

_LARGEST = {"int8": 127.0, "fp8": 448.0}  # fp8 is e4m3
_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
FORMATS = tuple(_DTYPES)


class Codec(Protocol):
    """Encodes a value as stored tensors and decodes it again.

    `read` are the tensors that the site reads even if it is reused: the base of a span, or query, key, value and mask
    of an attention. `encode` gets those of the computing step, `decode` those of the reusing step.
    """

    def is_plain(self, value: Tensor, read: Sequence[Tensor]) -> bool:
        """Return whether the slot stores the value unchanged."""
        ...

    def encode(self, value: Tensor, read: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the tensors to store."""
        ...

    def decode(self, stored: Sequence[Tensor], read: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Reconstruct the value, with the given `dtype`, from the stored tensors."""
        ...


@dataclass(frozen=True)
class ValueCodec:
    """The codec of branches and spans. It stores the value, minus the base if `read` has one, in `format`.

    `format` is one of `FORMATS`, or None for the dtype of the value. "int8" and "fp8" also store an fp32 scale per
    token, with shape ``(..., 1)``, that maps the largest absolute value of the token to the largest number of the
    format. A token of zeros has scale 1. A token that is not finite has a scale that is not finite, and stays so.
    """

    format: str | None = None

    def __str__(self) -> str:
        return repr(self.format)

    def is_plain(self, value: Tensor, read: Sequence[Tensor]) -> bool:
        return not read and not is_converted(value, self.format) and is_dense(value)

    def encode(self, value: Tensor, read: Sequence[Tensor]) -> tuple[Tensor, ...]:
        difference = value - read[0] if read else value
        format = self.format if is_converted(value, self.format) else None
        if format is None or format not in _LARGEST:
            stored = difference if format is None else difference.to(_DTYPES[format])
            return (stored if is_dense(stored) else stored.clone(),)  # a view of a fused QKV would keep all of it alive
        wide = difference.float()
        largest = wide.abs().amax(-1, keepdim=True)
        scale = largest / _LARGEST[format]
        scale = scale.masked_fill(scale == 0, 1.0)  # the quotient may also underflow to 0
        numbers = (wide / scale).clamp(-_LARGEST[format], _LARGEST[format])
        return (numbers.round() if format == "int8" else numbers).to(_DTYPES[format]), scale

    def decode(self, stored: Sequence[Tensor], read: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        value = stored[0]
        if len(stored) == 2:
            value = value.float() * stored[1]
        value = value.to(dtype) if self.format is not None else value
        return self.join(value, read)

    def join(self, value: Tensor, read: Sequence[Tensor]) -> Tensor:
        """Add the base to a decoded difference, if `read` has one."""
        return read[0] + value if read else value


@dataclass(frozen=True)
class DeltaCodec(ValueCodec):
    """The codec of a guided batch. It stores the difference of its halves: the other half minus half number `half`.

    A reusing step computes only half number `half`. `decode` reads that half repeated twice along dim 0.
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
    """Return the weighted sum of stored values, plus the base if `read` has one.

    `history` has the stored tensors of each value, newest first; `weights` is an fp32 tensor of shape
    ``(len(history),)``. The sum is computed in fp32 (float64 for float64 values) and rounded to `dtype`, so that
    weights (1, 0, …) give the newest value bit for bit. If `dtype` is not floating-point, returns the newest value.
    """
    if not dtype.is_floating_point:
        return codec.decode(history[0], read, dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    terms = [weights[k].to(wide) * codec.decode(stored, (), dtype).to(wide) for k, stored in enumerate(history)]
    return codec.join(sum(terms[1:], terms[0]).to(dtype), read)


def is_converted(value: Tensor, format: str | None) -> bool:
    """Return whether a slot converts `value` to `format`. It converts floating-point tensors of at least 2 dims."""
    return format is not None and value.is_floating_point() and value.ndim >= 2


def inline(
    graph: fx.Graph, function: Callable[..., Sequence[Tensor]], arguments: Sequence[fx.Node], position: float, home: int
) -> list[fx.Node]:
    """Trace `function` with the values of `arguments` and append its ops to `graph`. Returns the result nodes.

    The new nodes get positions between `position` and `position` + 1, and belong to the node at position `home`
    (insert_guards.py).
    """
    examples = [node.meta["val"] for node in arguments]
    with torch_compat.detect_fake_mode(examples) or nullcontext():  # for tensors that `function` creates
        traced = make_fx(function)(*examples)
    env: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), arguments, strict=True))
    count = len(traced.graph.nodes)
    for k, node in enumerate(traced.graph.nodes, 1):
        if node.op not in ("placeholder", "output"):
            env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].meta = {"val": node.meta["val"], "position": position + k / (count + 1), "home": home}
    results: Any = traced.graph.output_node().args[0]
    return [env[node] for node in results]
