"""The codecs of strategies that replace an attention op, on top of the kernels' ops."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from dit_rewrite.errors import RefusalReason
from dit_rewrite.kernels.blockwise_attention import block_size
from dit_rewrite.kernels.blockwise_attention.graph_ops import blockwise_fill, blockwise_step
from dit_rewrite.kernels.blockwise_attention.state import DTYPES, HEAD_SIZES
from dit_rewrite.kernels.window_attention import window_reuse
from dit_rewrite.passes.analysis.attention_sites import arguments, is_of_one_sequence, text_tokens
from dit_rewrite.passes.analysis.condition_keys import Range
from dit_rewrite.passes.analysis.token_grid import TokenGrid
from dit_rewrite.passes.rewrite.codec import Codec
from dit_rewrite.policy.strategies import BlockwiseReuse, Core, WindowResidual


@dataclass(frozen=True)
class Windowed:
    """DiTFastAttn's WA-RS (equations 1 and 2): the slot stores the residual R = O - W, and `decode` returns O' = W + R.

    ``prefix`` and ``suffix``: the tokens of text before and behind the grid.
    """

    reach: tuple[int, ...]
    grid: tuple[int, ...] | None
    prefix: int
    suffix: int
    scale: float | None
    residual: bool = True

    def is_plain(self, value: Tensor, read: Sequence[Tensor]) -> bool:
        return False

    def encode(self, value: Tensor, read: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (self._window(value, read, subtract=True) if self.residual else torch.zeros_like(value),)

    def decode(self, held: Sequence[Tensor], read: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return self._window(held[0], read, subtract=False)

    def _window(self, residual: Tensor, read: Sequence[Tensor], subtract: bool) -> Tensor:
        query, key, values, *mask = read
        where = (self.reach, self.grid, self.prefix, mask[0] if mask else None, self.scale, self.suffix, subtract)
        found: Tensor = window_reuse(query, key, values, residual, *where)
        return found


@dataclass(frozen=True)
class Blockwise:
    """CachedAttention: the slot stores partial results per key block; blocks that may have changed are recomputed."""

    strategy: BlockwiseReuse
    block: int
    scale: float | None
    kv_static: bool
    condition: Range | None = None  # the keys whose blocks may be kept; None: all

    @property
    def keep(self) -> int | None:
        """The number of leading keys that may be kept after `_in_order`."""
        return None if self.condition is None else self.condition[1]

    @property
    def own_queries(self) -> bool:
        """Whether each block stores its queries: equation 14 is about their change since its own recompute."""
        return self.strategy.bound == "paper"

    def is_plain(self, value: Tensor, read: Sequence[Tensor]) -> bool:
        return False

    def encode(self, value: Tensor, read: Sequence[Tensor]) -> Sequence[Tensor]:
        query, key, values, mask = self._in_order(read)
        how = (self.block, self.scale, self.kv_static, self.keep, self.own_queries)
        return blockwise_fill(query, key, values, mask, *how)

    def decode(self, held: Sequence[Tensor], read: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        query, key, values, mask = self._in_order(read)
        how = self.strategy
        options = (how.threshold, self.block, how.bound, self.scale, self.kv_static, how.certify, self.keep)
        return blockwise_step(query, key, values, list(held), mask, *options).to(dtype)

    def _in_order(self, read: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return query, key, value and mask with the condition's keys first; attention does not depend on the order."""
        query, key, values, *mask = map(_float32_for_float64, read)
        seen = mask[0] if mask else None
        if self.condition is None or self.condition[0] == 0:
            return query, key, values, seen
        if seen is not None and seen.shape[-1] > 1:
            seen = _moved_first(seen, self.condition, -1)
        return query, _moved_first(key, self.condition, 2), _moved_first(values, self.condition, 2), seen


def _moved_first(tensor: Tensor, condition: Range, dim: int) -> Tensor:
    first, count = condition
    rest = tensor.shape[dim] - first - count
    before, chosen, behind = tensor.split((first, count, rest), dim)
    return torch.cat((chosen, before, behind), dim)


def _float32_for_float64(tensor: Tensor) -> Tensor:
    """Cast float64, which occurs only in replays, to float32: the blockwise kernels do not support it."""
    return tensor.float() if tensor.dtype is torch.float64 else tensor


@functools.singledispatch
def codec(
    strategy: Core, core: fx.Node, image: int | None, invariant_kv: bool, invariant_mask: bool
) -> Codec | RefusalReason:
    """Return the codec with which a strategy replaces the attention op `core`, or the reason why it cannot.

    Each kind of strategy registers a function for it.

    `image` is the number of tokens of the stream that the model's output is computed from. `invariant_kv`: keys and
    values are trajectory-invariant. `invariant_mask`: the mask is trajectory-invariant, or there is none.
    """
    raise NotImplementedError(f"no codec is registered for {type(strategy).__name__}")


@codec.register
def _windowed(
    strategy: WindowResidual, core: fx.Node, image: int | None, invariant_kv: bool, invariant_mask: bool
) -> Codec | RefusalReason:
    if not is_of_one_sequence(core):
        return RefusalReason.OTHER_TOKENS
    text, last = (0, False) if image is None else text_tokens(core, image)
    tokens: Any = core.meta["val"].shape[2] - text
    if isinstance(strategy.grid, tuple) and math.prod(strategy.grid) != tokens:
        return RefusalReason.OTHER_GRID
    before, behind = (0, text) if last else (text, 0)
    return _window(strategy, core, tokens, before, behind)


def _window(strategy: WindowResidual, core: fx.Node, tokens: int, before: int, behind: int) -> Windowed:
    grid = strategy.grid if isinstance(strategy.grid, tuple) else None
    return Windowed(strategy.reach(tokens), grid, before, behind, arguments(core)["scale"], strategy.residual)


def windowed(strategy: WindowResidual, core: fx.Node, grid: TokenGrid | None) -> Codec | RefusalReason:
    """Return the codec of a window along the `grid` that the graph shows, or the reason why there is none."""
    if not is_of_one_sequence(core):
        return RefusalReason.OTHER_TOKENS
    if grid is None:
        return RefusalReason.NO_TOKEN_GRID
    if not strategy.fits(len(grid.sizes)):
        return RefusalReason.OTHER_AXES
    placed = replace(strategy, grid=grid.sizes)
    return _window(placed, core, math.prod(grid.sizes), grid.prefix, grid.suffix)


@codec.register
def _blockwise(
    strategy: BlockwiseReuse, core: fx.Node, image: int | None, invariant_kv: bool, invariant_mask: bool
) -> Codec | RefusalReason:
    return blockwise(strategy, core, invariant_kv, invariant_mask, None)


def blockwise(
    strategy: BlockwiseReuse, core: fx.Node, invariant_kv: bool, invariant_mask: bool, condition: Range | None
) -> Codec | RefusalReason:
    """Return the codec of CachedAttention, or the reason why there is none, see `codec`.

    `condition`: the keys that belong to the condition, if the strategy asks for them and the graph shows them. In
    cross-attention, whose keys do not change, all keys belong to the condition.
    """
    if not invariant_mask:
        return RefusalReason.MOVING_MASK
    given = arguments(core)
    query, key = given["query"].meta["val"], given["key"].meta["val"]
    if query.dtype not in DTYPES or query.shape[-1] not in HEAD_SIZES:
        return RefusalReason.HEAD_SIZE
    condition = None if invariant_kv or strategy.keys == "all" else condition
    if condition is None and strategy.keys == "condition" and not invariant_kv:
        return RefusalReason.NO_CONDITION_KEYS
    if strategy.bound == "paper" and not invariant_kv and condition is None:
        return RefusalReason.MOVING_KEYS
    if query.device.type == "cuda" and not invariant_kv:
        return RefusalReason.MOVING_KEYS_ON_CUDA
    count = key.shape[2] if condition is None else condition[1]
    block = block_size(count, invariant_kv or condition is not None) if strategy.block is None else strategy.block
    return Blockwise(strategy, min(block, count), given["scale"], invariant_kv, condition)
