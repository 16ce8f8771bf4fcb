"""Fuse full attention and the residual to its window attention into one pass over keys and values, if it is faster.

A computing step subtracts window attention from the result O of PyTorch's own attention: the residual is R = O - W.
The op `window_refresh` computes both in one pass. Which is faster depends on the device and the sizes, so it is
measured once for each combination, and the choice is kept on disk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import getitem
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dit_rewrite.compiler.measured_choices import choose
from dit_rewrite.kernels.window_attention import window_refresh, window_reuse
from dit_rewrite.passes.analysis.attention_sites import arguments
from dit_rewrite.passes.capture import opaque_attention
from dit_rewrite.passes.pipeline import Context
from dit_rewrite.torch_compat import unset_fake_temporarily

REUSE, REFRESH = torch.ops.dit_rewrite.window_reuse.default, torch.ops.dit_rewrite.window_refresh.default
_PLACES = ("query", "key", "value", "residual", "window", "grid", "prefix", "attn_mask", "scale", "suffix", "subtract")
_DEFAULTS = {"grid": None, "prefix": 0, "attn_mask": None, "scale": None, "suffix": 0, "subtract": False}
_SHARED = ("query", "key", "value", "attn_mask", "scale")  # arguments that attention and its window must share


class Refresh(NamedTuple):
    """An attention op, the op that computes the residual to its window, and the arguments of the fused op."""

    core: fx.Node
    window: fx.Node
    given: dict[str, Any]


def run(gm: fx.GraphModule, ctx: Context) -> fx.GraphModule:
    """The pass: fuse where the fused op is measured to be faster."""
    fuse(gm, is_faster)
    return gm


def fuse(gm: fx.GraphModule, faster: Callable[[Refresh], bool]) -> int:
    """Replace each refresh of a straight-line graph by one op if `faster` returns True. Returns how many there were."""
    found = [r for node in gm.graph.find_nodes(op="call_function", target=REUSE) if (r := match(node)) and faster(r)]
    for refresh in found:
        _write(gm.graph, refresh)
    if found:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return len(found)


def match(node: fx.Node) -> Refresh | None:
    """Return the refresh that a `window_reuse` node is part of, or None."""
    given: dict[str, Any] = {**_DEFAULTS, **dict(zip(_PLACES, node.args, strict=False)), **node.kwargs}
    core = given.pop("residual")
    if not given.pop("subtract") or core.target is not opaque_attention.OP:
        return None
    full = arguments(core)
    if full["is_causal"] or full["dropout_p"] or full["enable_gqa"]:
        return None
    if any(full[name] is not given[name] and full[name] != given[name] for name in _SHARED):
        return None
    return Refresh(core, node, given)


def _write(graph: fx.Graph, refresh: Refresh) -> None:
    """Insert the fused op before the attention, and replace both results."""
    with graph.inserting_before(refresh.core):
        both = graph.call_function(REFRESH, tuple(refresh.given[name] for name in _PLACES if name in refresh.given))
        both.meta["val"] = (refresh.core.meta["val"], refresh.window.meta["val"])
        for i, replaced in enumerate((refresh.core, refresh.window)):
            item = graph.call_function(getitem, (both, i))
            item.meta = dict(replaced.meta)
            replaced.replace_all_uses_with(item)


class _Spec(NamedTuple):
    """The properties of a tensor that the measured time depends on."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Spec:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def make(self) -> Tensor:
        """Return a tensor of normal random numbers with these properties; a boolean mask is True everywhere.

        Not of ones: a GPU draws less power for constant data, and its clock is higher.
        """
        size = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        if self.dtype == torch.bool:
            flat = torch.ones(size, dtype=self.dtype, device=self.device)
        else:
            flat = torch.randn(size, dtype=self.dtype, device=self.device)
        return flat.as_strided(self.shape, self.stride)


def is_faster(refresh: Refresh) -> bool:
    """Return whether one pass is faster than two on the GPU of this refresh; False if sizes are symbolic.

    On a CPU it returns False, because the op is a naive reference there and PyTorch's attention is not.
    """
    given = {name: a.meta["val"] if isinstance(a, fx.Node) else a for name, a in refresh.given.items()}
    specs = tuple(_Spec.of(given[name]) for name in ("query", "key", "value", "attn_mask") if given[name] is not None)
    known = all(isinstance(n, int) for spec in specs for n in (*spec.shape, *spec.stride))
    if not known or any(spec.device.type != "cuda" for spec in specs):
        return False
    grid = None if given["grid"] is None else tuple(given["grid"])
    return _measured(specs, tuple(given["window"]), grid, given["prefix"], given["scale"], given["suffix"])


@functools.cache
def _measured(
    specs: tuple[_Spec, ...], window: tuple[int, ...], grid: tuple[int, ...] | None, prefix: int, scale: float | None,
    suffix: int,
) -> bool:  # fmt: skip
    """Return whether the fused op is the faster one, as measured now or in an earlier process."""
    with unset_fake_temporarily(), torch.no_grad():
        query, key, value, *mask = (spec.make() for spec in specs)
        seen = mask[0] if mask else None
        where: Any = (list(window), None if grid is None else list(grid), prefix, seen, scale, suffix)

        def two() -> Tensor:
            full = F.scaled_dot_product_attention(query, key, value, seen, scale=scale)
            return window_reuse(query, key, value, full, *where, subtract=True)

        runs: dict[str, Callable[[], object]] = {
            "one": functools.partial(window_refresh, query, key, value, *where),
            "two": two,
        }
        depends_on: dict[str, object] = {
            "tensors": specs,
            "window": window,
            "grid": grid,
            "text": (prefix, suffix),
            "scale": scale,
        }
        return choose("window_refresh", depends_on, runs) == "one"
