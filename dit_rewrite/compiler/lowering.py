"""Pass 05: what lowers a straight-line graph. "inductor", "aot_eager" (runs it as it is), or a callable of your own."""

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

InnerBackend = str | Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]
Compiled = Callable[..., Sequence[Any]]
FORMS = ("auto", "variants", "segments")


@dataclass(frozen=True)
class Lowering:
    """How graphs become callables. `options` are Inductor's config patches.

    `form` is "variants" (a straight-line graph for each row of decisions), "segments" (pieces that the host strings
    together), or "auto": variants where these are at most `max_variants`, and no decision waits for a measurement of
    its own call. Raises BadArgument for an unknown backend or form, or options that a backend cannot take.
    """

    backend: InnerBackend = "inductor"
    options: Mapping[str, Any] = field(default_factory=dict)
    form: str = "auto"
    max_variants: int = 8

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise BadArgument("compile", "lowering", self.form, f"one of {', '.join(FORMS)}")
        if self.max_variants < 1:
            raise BadArgument("compile", "max_variants", self.max_variants, "a whole number >= 1")

    @classmethod
    def of(
        cls,
        backend: InnerBackend,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        form: str = "auto",
        max_variants: int = 8,
    ) -> Lowering:
        """As torch.compile takes them: `mode` is a named set of Inductor options."""
        if not callable(backend) and backend not in ("inductor", "aot_eager"):
            raise BadArgument("compile", "backend", backend, '"inductor", "aot_eager" or a callable')
        patches = dict(torch_compat.inductor_options(mode)) if mode is not None else {}
        patches.update(options or {})
        if patches and backend != "inductor":
            raise BadArgument("compile", "mode or options", patches, 'none, unless backend is "inductor"')
        return cls(backend, patches, form, max_variants)

    @property
    def owns_outputs(self) -> bool:
        """Whether what a variant returns stays ours: CUDA graphs overwrite their outputs at the next replay."""
        return not self.options.get("triton.cudagraphs", False)

    @property
    def lays_out(self) -> bool:
        """Whether strides within a graph are the compiler's to choose; ops that run as they are keep to the trace's."""
        return self.backend == "inductor"

    def lower(self, gm: fx.GraphModule, fake_mode: FakeTensorMode | None) -> Compiled:
        """Compile a straight-line graph for the fake inputs in its placeholders' metadata."""
        if self.backend == "aot_eager":
            return gm.forward
        unbacked.bind_inputs(gm, fake_mode)
        inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        with _quiet(fake_mode):
            run = self._compile(gm, inputs)
        return run if self.owns_outputs else _cloning(run)

    def _compile(self, gm: fx.GraphModule, inputs: list[Any]) -> Compiled:
        if callable(self.backend):
            return self.backend(gm, inputs)
        run: Compiled = torch_compat.inductor()(gm, inputs, config_patches=dict(self.options))
        return run


@contextlib.contextmanager
def _quiet(fake_mode: FakeTensorMode | None) -> Iterator[None]:
    """A tracing context of our own; no autograd and no autocast: the graph has its casts already."""
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
    """The guards on sizes that were added to the trace since it had `before` of them."""
    return tuple(torch_compat.size_guards(fake_mode)[before:])


def count_guards(fake_mode: FakeTensorMode | None) -> int:
    """How many guards on sizes the trace has."""
    return len(torch_compat.size_guards(fake_mode))


def admits(
    expressions: tuple[sympy.Basic, ...], symbols: Mapping[int, sympy.Symbol]
) -> Callable[[Sequence[Any]], bool]:
    """A check of `expressions` on a graph's inputs, where the input at each position of `symbols` is that size."""

    def check(args: Sequence[Any]) -> bool:
        sizes = {symbol: args[i] for i, symbol in symbols.items()}
        return all(expression.subs(sizes) == sympy.true for expression in expressions)

    return check


def isolated(model: Any, backend: InnerBackend, fullgraph: bool = False, dynamic: bool | None = None) -> Any:
    """torch.compile of a module or function with recompiles counted for it alone, where torch can do that (2.13).

    Otherwise every compiled module of one class shares a budget of 8, and then runs eagerly in silence.
    """
    separate = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    more: dict[str, Any] = {"isolate_recompiles": True} if separate else {}
    return torch.compile(model, backend=backend, fullgraph=fullgraph, dynamic=dynamic, **more)
