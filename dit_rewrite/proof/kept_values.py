"""The values that a replay keeps between steps: rounded as a store defines, summed, or combined with computed ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dit_rewrite.passes.rewrite.codec import Codec, DeltaCodec, ValueCodec
from dit_rewrite.passes.rewrite.tiles import TileCodec

Key = tuple[str, int, str, str]  # stream, position of the graph in its call, site, node of the value
Kept = dict[Key, tuple[Tensor, ...]]  # newest value first


def other_half(half: int, kept: tuple[Tensor, ...], weights: tuple[float, ...] | None) -> Callable[[Tensor], Tensor]:
    def add(both: Tensor) -> Tensor:
        halves = list(both.chunk(2))
        halves[1 - half] = halves[half] + (kept[0] if weights is None else weighted(kept, weights))
        return torch.cat(halves)

    return add


def with_kept_tiles(codec: TileCodec, kept: Kept, key: Key) -> Callable[[Tensor], Tensor]:
    def replace_others(computed: Tensor) -> Tensor:
        held = tuple(tensor.clone() for tensor in kept[key])
        chosen, rows = codec.choose(held)
        kept[key] = held
        return codec.update(held, chosen, rows, computed.index_select(codec.dim, rows)).clone()

    return replace_others


def weighted(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the sum of kept values, newest first, with weights rounded to fp32. Values of weight 0 are not read."""
    if not values[0].is_floating_point():
        return values[0]
    total, wide = None, torch.float64 if values[0].dtype is torch.float64 else torch.float32
    for k, weight in enumerate(torch.tensor(weights, dtype=torch.float32).tolist()):
        term = (values[k] if weight else values[0]).to(wide) * weight
        total = term if total is None else total + term
    assert total is not None
    return total.to(values[0].dtype)


def encoded(
    value: Tensor, codec: Codec, read: Sequence[Tensor], older: Sequence[Tensor], depth: int
) -> tuple[Tensor, ...]:
    """Return the tensors kept for a value: rounded as the store defines, or encoded by an attention codec."""
    if isinstance(codec, DeltaCodec):
        halves = value.chunk(2)
        return (rounded(halves[1 - codec.half] - halves[codec.half], codec.format), *older)[:depth]
    if isinstance(codec, ValueCodec):
        return (rounded(value - read[0] if read else value, codec.format), *older)[:depth]
    return tuple(codec.encode(value, read))


def rounded(value: Tensor, store: str | None) -> Tensor:
    """Return a value after a round trip through a slot: rounded to the format `store`, with one scale per token."""
    if store is None or value.ndim < 2:
        return value
    if store == "bf16":
        return value.to(torch.bfloat16).to(value.dtype)
    wide = value.double() if value.dtype is torch.float64 else value.float()
    most = {"int8": 127, "fp8": 448}[store]
    scale = wide.abs().amax(dim=-1, keepdim=True) / most
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    numbers = wide / scale
    numbers = numbers.round() if store == "int8" else numbers.clamp(-most, most).to(torch.float8_e4m3fn)
    return (numbers.to(wide.dtype) * scale).to(value.dtype)
