"""Lower a straight-line graph with "inductor", "aot_eager" (which runs the graph itself), or a custom callable."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from dit_rewrite import torch_compat
from dit_rewrite.errors import BadArgument
from dit_rewrite.passes.analysis import unbacked
from dit_rewrite.torch_compat import FakeTensorMode
from dit_rewrite.torch_compat.kernel_builds import KernelBuilds

InnerBackend = str | Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]
Compiled = Callable[..., Sequence[Any]]
PARTITIONS = ("auto", "variants", "segments")


@dataclass(frozen=True)
class Lowering:
    """How graphs are compiled. `options` are Inductor's config patches.

    `partition` is "variants" (a straight-line graph per row of decisions), "segments" (parts of the graph that dispatch
    runs one after the other), or "auto": variants if there are at most `max_variants` and no decision waits for a
    measurement of its own call. Raises BadArgument for an unknown backend or partition, or options that the backend
    does not accept.
    """

    backend: InnerBackend = "inductor"
    options: Mapping[str, Any] = field(default_factory=dict)
    partition: str = "auto"
    max_variants: int = 8

    def __post_init__(self) -> None:
        if self.partition not in PARTITIONS:
            raise BadArgument("compile", "lowering", self.partition, f"one of {', '.join(PARTITIONS)}")
        if self.max_variants < 1:
            raise BadArgument("compile", "max_variants", self.max_variants, "a whole number >= 1")

    @classmethod
    def of(
        cls,
        backend: InnerBackend,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        partition: str = "auto",
        max_variants: int = 8,
    ) -> Lowering:
        """Create a Lowering from arguments of torch.compile; `mode` names a set of Inductor options."""
        if not callable(backend) and backend not in ("inductor", "aot_eager"):
            raise BadArgument("compile", "backend", backend, '"inductor", "aot_eager" or a callable')
        patches = dict(torch_compat.inductor_options(mode)) if mode is not None else {}
        patches.update(options or {})
        if patches and backend != "inductor":
            raise BadArgument("compile", "mode or options", patches, 'none, unless backend is "inductor"')
        return cls(backend, patches, partition, max_variants)

    @property
    def owns_outputs(self) -> bool:
        """Whether outputs of compiled code stay valid; CUDA graphs overwrite theirs at the next replay."""
        return not self.options.get("triton.cudagraphs", False)

    @property
    def lays_out(self) -> bool:
        """Whether the backend chooses strides within the graph; otherwise ops need the strides of the trace."""
        return self.backend == "inductor"

    def lower(
        self, gm: fx.GraphModule, fake_mode: FakeTensorMode | None, builds: KernelBuilds | None = None
    ) -> Compiled:
        """Compile a straight-line graph for the fake inputs in its placeholders' metadata.

        Kernels that are not built yet are added to `builds`, if that is given.
        """
        if self.backend == "aot_eager":
            return gm.forward
        unbacked.bind_inputs(gm, fake_mode)
        inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        with _quiet(fake_mode), contextlib.nullcontext() if builds is None else builds.started():
            run = self._compile(gm, inputs)
        return run if self.owns_outputs else _cloning(run)

    def _compile(self, gm: fx.GraphModule, inputs: list[Any]) -> Compiled:
        if callable(self.backend):
            return self.backend(gm, inputs)
        run: Compiled = torch_compat.inductor()(gm, inputs, config_patches=dict(self.options))
        return run


@contextlib.contextmanager
def _quiet(fake_mode: FakeTensorMode | None) -> Iterator[None]:
    """A separate tracing context without autograd and without autocast, whose casts are in the graph already."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_compat.tracing(fake_mode))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch_compat.no_autocast())
        yield


def _cloning(run: Compiled) -> Compiled:
    def cloned(*args: Any) -> Sequence[Any]:
        return [out.clone() if isinstance(out, torch.Tensor) else out for out in run(*args)]

    return cloned


def new_guards(fake_mode: FakeTensorMode | None, before: int) -> tuple[sympy.Basic, ...]:
    """Return the size guards that were added to the trace after the first `before`."""
    return tuple(torch_compat.size_guards(fake_mode)[before:])


def count_guards(fake_mode: FakeTensorMode | None) -> int:
    """Return the number of size guards of the trace."""
    return len(torch_compat.size_guards(fake_mode))


def admits(expressions: tuple[sympy.Basic, ...], placeholders: Sequence[fx.Node]) -> Callable[[Sequence[Any]], bool]:
    """Return a check of `expressions`, which a late compilation assumed, for the inputs of a graph."""
    symbols = {i: symbol for i, node in enumerate(placeholders) if (symbol := _symbol(node)) is not None}

    def check(args: Sequence[Any]) -> bool:
        sizes = {symbol: args[i] for i, symbol in symbols.items()}
        return all(expression.subs(sizes) == sympy.true for expression in expressions)

    return check


def _symbol(node: fx.Node) -> sympy.Symbol | None:
    value = node.meta.get("val")
    expression = value.node.expr if isinstance(value, torch.SymInt) else None
    return expression if isinstance(expression, sympy.Symbol) else None


def isolated(model: Any, backend: InnerBackend, fullgraph: bool = False, dynamic: bool | None = None) -> Any:
    """Call torch.compile so that recompiles are counted per compiled module, if torch supports it (2.13).

    Otherwise all compiled modules of a class share a limit of 8 recompiles, after which they silently run eagerly.
    """
    separate = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    more: dict[str, Any] = {"isolate_recompiles": True} if separate else {}
    return torch.compile(model, backend=backend, fullgraph=fullgraph, dynamic=dynamic, **more)
