"""Capture: trace Dynamo's graph to the functional ATen graph that every other pass works on.

The functional graph has no in-place ops, no autocast regions and no copies that lose metadata.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dit_rewrite import torch_compat
from dit_rewrite.errors import GradientsNeeded
from dit_rewrite.passes.capture import module_paths, opaque_attention
from dit_rewrite.passes.capture.float_inputs import keep_floats
from dit_rewrite.torch_compat import FakeTensorMode

Runner = Callable[[list[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Captured:
    """A functional ATen graph with facts about its inputs.

    ``static``, ``conditioning``, ``ambient`` and ``unknown`` are sets of placeholder positions. ``static``: parameters
    and buffers. ``conditioning``: tensors of the call's conditioning. ``ambient``: attributes of the model and global
    tensors that are neither parameters nor arguments. ``unknown``: other tensors that are neither arguments of the call
    nor made by its graphs, such as one that a hook or a context variable provides. ``parameter_names`` are the names of
    the parameters relative to the traced module: ``blocks.0.attn.to_q.weight`` for the model, ``attn.to_q.weight`` for
    a block. ``step``: the timestep, as a tensor or a number. ``complete`` is False if Dynamo put a part of the module's
    forward into another graph.
    """

    gm: fx.GraphModule
    static: frozenset[int]
    conditioning: frozenset[int]
    ambient: frozenset[int]
    unknown: frozenset[int]
    step: frozenset[int]
    parameter_names: frozenset[str]
    complete: bool
    fake_mode: FakeTensorMode | None

    @property
    def placeholders(self) -> list[fx.Node]:
        return self.gm.graph.find_nodes(op="placeholder")

    @property
    def unread(self) -> frozenset[int]:
        """The positions of numbers that nothing reads, such as the offset of a tensor in the storage that it views."""
        numbers = ((i, node) for i, node in enumerate(self.placeholders) if not hasattr(node.meta.get("val"), "dtype"))
        return frozenset(i for i, node in numbers if not node.users)


class one_graph:
    """Context manager under which Dynamo captures a model in as few graphs as possible.

    By default `nonzero` breaks the graph (Mochi calls it in every attention branch), and Dynamo treats a Python number
    such as the time as a constant, so that it recompiles when the number changes. `number` names the argument that is
    the time, as a number or a list of numbers. Dynamo's settings are global to the process and slow to set, and this
    context is entered at each call of a model. So they are set only while Dynamo compiles a frame in this thread;
    Dynamo compiles one frame at a time.
    """

    __slots__ = ("number", "_outer")
    _thread = threading.local()  # `inside` is the active context
    _before: tuple[bool, bool, str] | None = None  # the settings before the current compilation

    def __init__(self, number: str | None = None) -> None:
        self.number = number

    def __enter__(self) -> None:
        torch_compat.around_compilation(one_graph._set, one_graph._restore)
        self._outer = getattr(one_graph._thread, "inside", None)
        one_graph._thread.inside = self

    def __exit__(self, *_: object) -> None:
        one_graph._thread.inside = self._outer

    @staticmethod
    def _set(_: object) -> None:
        inside: one_graph | None = getattr(one_graph._thread, "inside", None)
        if inside is None or one_graph._before is not None:
            return
        dynamo, compiler = torch_compat.dynamo_config(), torch.compiler.config
        sources = compiler.dynamic_sources
        one_graph._before = dynamo.capture_dynamic_output_shape_ops, dynamo.specialize_float, sources
        dynamo.capture_dynamic_output_shape_ops, dynamo.specialize_float = True, False
        if inside.number is not None:
            one, several = f"L['{inside.number}']", rf"L\['{inside.number}'\]\[\d+\]$"  # the second is a pattern
            compiler.dynamic_sources = ",".join(filter(None, (sources, one, several)))

    @staticmethod
    def _restore(_: object) -> None:
        if one_graph._before is not None:
            dynamo, compiler = torch_compat.dynamo_config(), torch.compiler.config
            dynamo.capture_dynamic_output_shape_ops, dynamo.specialize_float, sources = one_graph._before
            compiler.dynamic_sources = sources
            one_graph._before = None


def capture(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    then: Callable[[Captured], Runner],
    conditioning: Sequence[torch.Tensor] = (),
    arguments: Sequence[torch.Tensor] = (),
    timestep: torch.Tensor | float | None = None,
    number: str | None = None,
) -> Callable[..., Any]:
    """Trace `gm` to a functional ATen graph, call `then` with it, and return the compiled callable.

    `then` runs under Dynamo's fake inputs. Elements of `example_inputs` that are in `conditioning` become
    `Captured.conditioning`. `arguments` are all tensors among the arguments of the call, and those that its earlier
    graphs returned; `timestep` is one of them, or a number, and then `number` is the name of the argument. Raises
    GradientsNeeded if autograd has to differentiate the graph.
    """
    opaque_attention.mark(gm)
    keep_floats(gm)
    given_names = [module_paths.input_name(str(node.target)) for node in gm.graph.find_nodes(op="placeholder")]
    inputs, place = _flattened(given_names, example_inputs)
    names = torch_compat.parameter_names(gm)
    conditioning_ids = set(map(id, conditioning))
    invariant = frozenset(i for i, value in enumerate(example_inputs) if id(value) in conditioning_ids)
    given = set(map(id, arguments))
    others = [i for i, x in enumerate(example_inputs) if isinstance(x, torch.Tensor) and id(x) not in given]
    ambient = set(_attributes(gm)).intersection(others)
    complete = not torch_compat.is_broken(gm)
    step = frozenset(_step_inputs(gm, example_inputs, timestep, number))

    def inference(functional: fx.GraphModule, fake_inputs: Sequence[Any]) -> Runner:
        functional.graph.eliminate_dead_code()
        same = _rename_inputs(functional, inputs)

        def placed(positions: Collection[int]) -> frozenset[int]:
            return frozenset(place[i] for i in positions if i in place) if same else frozenset()

        functional.recompile()
        captured = Captured(
            functional,
            torch_compat.static_inputs(),
            placed(invariant),
            placed(ambient),
            placed(others) - placed(ambient) - torch_compat.static_inputs(),
            placed(step),
            names,
            complete,
            torch_compat.detect_fake_mode(list(fake_inputs)),
        )
        runner = then(captured)
        runner._boxed_call = True  # type: ignore[attr-defined]  # AOTAutograd: takes its arguments as one list
        return runner

    def training(*_: object) -> Runner:
        raise GradientsNeeded("an input or parameter of the graph")

    return torch_compat.aot_autograd(fw_compiler=training, inference_compiler=inference)(gm, example_inputs)


def _flattened(names: Sequence[str], values: Sequence[Any]) -> tuple[list[str], dict[int, int]]:
    """Return the names of the inputs of AOTAutograd's graph, and the positions there of inputs that it does not split.

    It splits a tensor subclass, such as a quantised weight, into the tensors that it consists of.
    """
    inputs: list[str] = []
    place: dict[int, int] = {}
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        parts = list(_parts(name, value))
        if parts == [name]:
            place[i] = len(inputs)
        inputs += parts
    return inputs, place


def _parts(name: str, value: Any) -> Iterator[str]:
    """Yield a name for each plain tensor that an input consists of."""
    if not torch_compat.is_wrapper_subclass(value):
        yield name
        return
    for attribute in value.__tensor_flatten__()[0]:
        yield from _parts(f"{name}_{attribute}", getattr(value, attribute))


def _rename_inputs(gm: fx.GraphModule, names: Sequence[str]) -> bool:
    """Rename the inputs of a graph to `names`, because AOTAutograd only numbers them.

    Returns False if AOTAutograd added or removed inputs, because then the correspondence is unknown.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(names):
        return False
    for node, name in zip(placeholders, names, strict=True):
        node._rename(name)
        node.target = node.name
    return True


def _step_inputs(
    gm: fx.GraphModule, example_inputs: Sequence[Any], timestep: torch.Tensor | float | None, number: str | None
) -> Iterator[int]:
    """The positions of the timestep: of the tensor itself, or of the number where Dynamo read it from its argument.

    Behind a graph break, or in a block, a variable of that name may hold another number.
    """
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if number is None:
            found = timestep is not None and example_inputs[i] is timestep
        else:
            found = torch_compat.source_of(node) == f"L['{number}']" and _number(example_inputs[i]) == timestep
        if found:
            yield i


def _number(value: Any) -> Any:
    """The number that an input of Dynamo's graph stands for: a float comes as a tensor, an int as a symbol."""
    if isinstance(value, torch.SymInt):
        return value.node.hint
    return value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 and value.device.type == "cpu" else None


_ROOT = re.compile(r"[LG]\['[^']+'\]")


def _attributes(gm: fx.GraphModule) -> list[int]:
    """Return the positions of inputs that Dynamo read from globals, or from attributes of a module with parameters."""
    sources = [torch_compat.source_of(node) for node in gm.graph.find_nodes(op="placeholder")]
    roots = [match[0] if (match := _ROOT.match(source)) else "" for source in sources]
    weights = ["._parameters[" in source or "._buffers[" in source for source in sources]
    modules = {root for root, weight in zip(roots, weights, strict=True) if weight and root}
    pairs = enumerate(zip(roots, weights, strict=True))
    return [i for i, (root, weight) in pairs if not weight and (root in modules or root.startswith("G["))]
