"""An interpreter of captured graphs that replaces the values that a policy does not compute."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from dit_rewrite.passes.rewrite.guarded_graph import Guidance
from dit_rewrite.passes.rewrite.half_batch import Batch
from dit_rewrite.torch_compat import tree_map

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Read = Callable[[Sequence[str]], list[Tensor]]  # names of nodes -> their tensors, as the replaced node sees them
Instead = Callable[[Read, Guidance | None], Tensor]


class Replay(fx.Interpreter):
    """Runs a captured graph. The nodes in `instead` return the result of its callable; all others are computed.

    The callables may read the nodes in `keep`, whose tensors are also in ``values`` after `run`. The nodes in `shared`
    see one half of the batch twice in values from outside of them; their guidance says which half. `after` maps nodes
    to functions that are applied to their results.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        instead: Mapping[str, Instead],
        keep: Collection[str],
        shared: Mapping[str, Guidance],
        after: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
    ) -> None:
        super().__init__(gm)
        self.after = after
        self.instead, self.keep, self.shared = instead, keep, shared
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        make = self.instead.get(n.name)
        if make is None:
            result = super().run_node(n)
        else:
            result = make(lambda names: self.seen(names, n.name), self.shared.get(n.name))
        result = self.after[n.name](result) if n.name in self.after else result
        if n.name in self.keep:
            self.values[n.name] = result
        return result

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        guidance = self.shared.get(n.name)
        if guidance is None:
            return super().fetch_args_kwargs_from_env(n)

        def load(node: fx.Node) -> Any:
            return self._seen(self.env[node], node.name, guidance)

        return fx.node.map_arg(n.args, load), fx.node.map_arg(n.kwargs, load)

    def seen(self, names: Sequence[str], by: str) -> list[Tensor]:
        """Return the tensors of kept nodes as the node `by` sees them."""
        guidance = self.shared.get(by)
        return [self._seen(self.values[n], n, guidance) if guidance else self.values[n] for n in names]

    def _seen(self, value: Any, name: str, guidance: Guidance) -> Any:
        outside = name not in self.shared and guidance.labels[name] is Batch.LEADING
        return twice(value, guidance) if outside else value


def twice(value: Any, guidance: Guidance) -> Any:
    """Replace both halves of a batch by the computed half. Tuples are converted element by element."""
    if not isinstance(value, Tensor):
        return type(value)(twice(item, guidance) for item in value)
    half = value.chunk(2)[guidance.half]
    return torch.cat([half, half])


class Replay64(Replay):
    """Runs the graph in float64, also where it names other dtypes: the reference for measuring rounding errors."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return super().run(*tree_map(widen, args), **kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, tree_map(_wide_dtype, args), tree_map(_wide_dtype, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return widen(super().get_attr(target, args, kwargs))


def widen(value: Any) -> Any:
    """Cast a floating-point tensor to float64; return other values unchanged."""
    return value.double() if isinstance(value, Tensor) and value.dtype in FLOATS else value


def _wide_dtype(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in FLOATS else value
