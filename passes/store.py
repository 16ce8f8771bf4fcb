"""What a slot holds in the place of a value: the stream's change across a span, numbers of fewer bits, or both.

Plain functions of tensors; `inline` writes what they do into a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

_LARGEST = {"int8": 127.0, "fp8": 448.0}  # of e4m3
_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
STORES = tuple(_DTYPES)


def is_packed(value: Tensor, store: str | None) -> bool:
    """Whether `store` changes what is held of a value: of tokens, and not of a mere number."""
    return store is not None and value.is_floating_point() and value.ndim >= 2


def width(value: Tensor, store: str | None) -> int:
    """How many tensors are held for a value."""
    return 2 if store in _LARGEST and is_packed(value, store) else 1


def encode(value: Tensor, base: Tensor | None, store: str | None) -> tuple[Tensor, ...]:
    """What is held of a value: less `base`, if there is one, and in numbers of `store`.

    "int8" and "fp8" have one fp32 scale for each token, so that the token's largest absolute value is the largest
    number. A token that is all zero has scale 1; one that is not finite stays so, by its scale.
    """
    held = value if base is None else value - base
    if store is None or not is_packed(value, store):
        return (held,)
    if store not in _LARGEST:
        return (held.to(_DTYPES[store]),)
    wide = held.float()
    largest = wide.abs().amax(-1, keepdim=True)
    scale = largest / _LARGEST[store]
    scale = scale.masked_fill(scale == 0, 1.0)  # also where the quotient is too small for fp32
    numbers = (wide / scale).clamp(-_LARGEST[store], _LARGEST[store])
    return (numbers.round() if store == "int8" else numbers).to(_DTYPES[store]), scale


def decode(held: Sequence[Tensor], base: Tensor | None, store: str | None, dtype: torch.dtype) -> Tensor:
    """The value again, in its `dtype`."""
    value = held[0]
    if len(held) == 2:
        value = value.float() * held[1]
    value = value.to(dtype) if store is not None else value
    return value if base is None else base + value


def inline(
    graph: fx.Graph, function: Callable[..., Sequence[Tensor]], arguments: Sequence[fx.Node], position: float, home: int
) -> list[fx.Node]:
    """Write into `graph` what `function` does with the values of `arguments`; the nodes of its results.

    They are numbered from `position` on, less than 1 further, and belong to the node at `home` (guard.py).
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
