"""Compute full attention and the residual to its window attention in the fastest way.

A computing step subtracts window attention from the result O of PyTorch's own attention: the residual is R = O - W.
The op `window_refresh` computes both in one pass over keys and values, and `window_residual` has FlexAttention or
FlashAttention compute W. Which is fastest depends on the device and the sizes, so it is measured once for each
combination, and the choice is kept on disk.
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
from dit_rewrite.kernels.window_attention import window_refresh, window_residual, window_reuse
from dit_rewrite.kernels.window_attention.libraries import available, version
from dit_rewrite.passes.analysis.attention_sites import arguments
from dit_rewrite.passes.capture import opaque_attention
from dit_rewrite.passes.pipeline import Context
from dit_rewrite.torch_compat import unset_fake_temporarily

REUSE, REFRESH = torch.ops.dit_rewrite.window_reuse.default, torch.ops.dit_rewrite.window_refresh.default
RESIDUAL = torch.ops.dit_rewrite.window_residual.default
ONE, TWO = "one", "two"  # how a refresh is computed: in one pass, or by two ops; or the name of a library
_PLACES = ("query", "key", "value", "residual", "window", "grid", "prefix", "attn_mask", "scale", "suffix", "subtract")
_DEFAULTS = {"grid": None, "prefix": 0, "attn_mask": None, "scale": None, "suffix": 0, "subtract": False}
_SHARED = ("query", "key", "value", "attn_mask", "scale")  # arguments that attention and its window must share


class Refresh(NamedTuple):
    """An attention op, the op that computes the residual to its window, and the arguments of the fused op."""

    core: fx.Node
    window: fx.Node
    given: dict[str, Any]


def run(gm: fx.GraphModule, ctx: Context) -> fx.GraphModule:
    """The pass: rewrite each refresh in the way that is measured to be fastest."""
    fuse(gm, fastest)
    return gm


def fuse(gm: fx.GraphModule, choice: Callable[[Refresh], str]) -> int:
    """Rewrite each refresh of a straight-line graph, unless `choice` returns TWO. Returns how many were rewritten."""
    refreshes = [r for node in gm.graph.find_nodes(op="call_function", target=REUSE) if (r := match(node))]
    found = [(refresh, by) for refresh in refreshes if (by := choice(refresh)) != TWO]
    for refresh, by in found:
        if by == ONE:
            _write(gm.graph, refresh)
        else:
            _write_by(gm.graph, refresh, by)
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


def _write_by(graph: fx.Graph, refresh: Refresh, by: str) -> None:
    """Let a library compute window attention, and subtract it from the result of the attention."""
    given, window = refresh.given, refresh.window
    tensors = tuple(given[name] for name in ("query", "key", "value"))
    where = tuple(given[name] for name in ("window", "grid", "prefix", "scale", "suffix"))
    with graph.inserting_before(window):
        node = graph.call_function(RESIDUAL, (*tensors, refresh.core, by, *where))
    node.meta = dict(window.meta)
    window.replace_all_uses_with(node)


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


def fastest(refresh: Refresh) -> str:
    """Return which way is fastest on the GPU of this refresh; TWO if sizes are symbolic.

    On a CPU it returns TWO, because the op is a naive reference there and PyTorch's attention is not.
    """
    given = {name: a.meta["val"] if isinstance(a, fx.Node) else a for name, a in refresh.given.items()}
    specs = tuple(_Spec.of(given[name]) for name in ("query", "key", "value", "attn_mask") if given[name] is not None)
    known = all(isinstance(n, int) for spec in specs for n in (*spec.shape, *spec.stride))
    if not known or any(spec.device.type != "cuda" for spec in specs):
        return TWO
    grid = None if given["grid"] is None else tuple(given["grid"])
    return _measured(specs, tuple(given["window"]), grid, given["prefix"], given["scale"], given["suffix"])


@functools.cache
def _measured(
    specs: tuple[_Spec, ...], window: tuple[int, ...], grid: tuple[int, ...] | None, prefix: int, scale: float | None,
    suffix: int,
) -> str:  # fmt: skip
    """Return which way is fastest, as measured now or in an earlier process; TWO if none runs."""
    with unset_fake_temporarily(), torch.no_grad():
        query, key, value, *mask = (spec.make() for spec in specs)
        seen = mask[0] if mask else None
        where: Any = (list(window), None if grid is None else list(grid), prefix, seen, scale, suffix)

        def two() -> Tensor:
            full = F.scaled_dot_product_attention(query, key, value, seen, scale=scale)
            return window_reuse(query, key, value, full, *where, subtract=True)

        def library(by: str) -> Tensor:
            full = F.scaled_dot_product_attention(query, key, value, scale=scale)
            return window_residual(query, key, value, full, by, list(window), where[1], prefix, scale, suffix)

        libraries = available(query, window, prefix, suffix, masked=seen is not None)
        runs: dict[str, Callable[[], object]] = {
            ONE: functools.partial(window_refresh, query, key, value, *where),
            TWO: two,
            **{by: functools.partial(library, by) for by in libraries},
        }
        depends_on: dict[str, object] = {
            "tensors": specs,
            "window": window,
            "grid": grid,
            "text": (prefix, suffix),
            "scale": scale,
            "libraries": [(by, version(by)) for by in libraries],
        }
        return choose("window_refresh", depends_on, runs, may_fail=libraries) or TWO
