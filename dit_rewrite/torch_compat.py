"""All private APIs of torch that the project uses, each behind a function or a name.

A torch release may rename any of them. Then TorchChanged is raised, at import or at the first use. A silent default
would be wrong: a part of a model could be taken for the whole, a weight for data, an assumed size for a checked one.
`PRIVATE` lists them all, each with the torch versions that have it.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import sympy
import torch
from torch import SymInt, Tensor, fx, nn

from dit_rewrite.errors import TorchChanged


class Private(NamedTuple):
    """A private API: the torch versions in which it was found, and the task that is not possible without it."""

    versions: str
    without: str


# by the name within torch, or by the name of a class and of an attribute of its objects
PRIVATE: Mapping[str, Private] = {
    "torch._dynamo.eval_frame.OptimizedModule": Private("2.11 to 2.14", "unwrap a compiled module"),
    "torch._dynamo.exc.BackendCompilerFailed": Private("2.11 to 2.14", "show the caller the error of a pass"),
    "torch._dynamo.backends.common.aot_autograd": Private("2.11 to 2.14", "capture a functional graph"),
    "torch._dynamo.callback_handler": Private("2.11 to 2.14", "set Dynamo's config only while it compiles"),
    "CompilationCallbackHandler.start_callbacks": Private("2.11 to 2.14", "set Dynamo's config only while it compiles"),
    "CompilationCallbackHandler.register_start_callback": Private("2.11 to 2.14", "set Dynamo's config"),
    "CompilationCallbackHandler.register_end_callback": Private("2.11 to 2.14", "restore Dynamo's config"),
    "torch._dynamo.config": Private("2.11 to 2.14", "capture data-dependent sizes without a graph break"),
    "torch._ops.OpOverload": Private("2.11 to 2.14", "recognise the ops of a graph"),
    "torch._refs.tensor": Private("2.11 to 2.14", "decompose the creation of a tensor from a number"),
    "torch._subclasses.fake_tensor.FakeTensorMode": Private("2.11 to 2.14", "compute the shapes of new nodes"),
    "torch._subclasses.fake_tensor.unset_fake_temporarily": Private("2.11 to 2.14", "read tensors while compiling"),
    "torch._guards.detect_fake_mode": Private("2.11 to 2.14", "compute the shapes of new nodes"),
    "torch._guards.tracing": Private("2.11 to 2.14", "lower a graph after Dynamo has finished"),
    "torch._guards.TracingContext": Private("2.11 to 2.14", "tell weights from data"),
    "TracingContext.try_get": Private("2.11 to 2.14", "tell weights from data"),
    "TracingContext.fw_metadata": Private("2.11 to 2.14", "tell weights from data"),
    "ViewAndMutationMeta.static_input_indices": Private("2.11 to 2.14", "tell weights from data"),
    "torch._guards.CompileContext": Private("2.11 to 2.14", "tell a recompilation from a restart"),
    "CompileContext.current_compile_id": Private("2.11 to 2.14", "tell a recompilation from a restart"),
    "CompileContext.try_get": Private("2.11 to 2.14", "check sizes that are assumed after Dynamo has finished"),
    "torch._C._DisableAutocast": Private("2.11 to 2.14", "run captured ops without autocast"),
    "torch._C.DispatchKey": Private("2.11 to 2.14", "call attention without autocast"),
    "torch._C.DispatchKeySet": Private("2.11 to 2.14", "call attention without autocast"),
    "torch._C._ExcludeDispatchKeyGuard": Private("2.11 to 2.14", "call attention without autocast"),
    "torch._C._storage_Use_Count": Private("2.11 to 2.14", "release a weight that nothing else uses"),
    "torch._foreach_copy_": Private("2.11 to 2.14", "fill the buffers of CUDA graphs with few launches"),
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": Private("2.11 to 2.14", "open tensor wrappers"),
    "torch.utils._pytree.tree_leaves": Private("2.11 to 2.14", "find the tensors among the arguments"),
    "torch.utils._pytree.tree_map": Private("2.11 to 2.14", "convert the arguments of a call"),
    "torch._inductor.compile_fx.compile_fx": Private("2.11 to 2.14", "lower a graph by Inductor"),
    "torch._inductor.list_mode_options": Private("2.11 to 2.14", "apply the `mode` of torch.compile"),
    "torch.fx.experimental.symbolic_shapes.free_unbacked_symbols": Private("2.11 to 2.14", "find data-dependent sizes"),
    "GraphModule.meta.dynamo_flat_name_to_original_fqn": Private("2.11 to 2.14", "tell parameters from other inputs"),
    "GraphModule.compile_subgraph_reason": Private("2.11 to 2.14", "tell a part of a model from the whole"),
    "GraphCompileReason.graph_break": Private("2.11 to 2.14", "tell a part of a model from the whole"),
    "GraphCompileReason.reason": Private("2.11 to 2.14", "tell why a graph breaks"),
    "GraphCompileReason.user_stack": Private("2.11 to 2.14", "tell where a graph breaks"),
    "Node._dynamo_source": Private("2.11 to 2.14", "find the attributes of the model among the inputs of a graph"),
    "Source.name": Private("2.11 to 2.14", "find the attributes of the model among the inputs of a graph"),
    "OptimizedModule._orig_mod": Private("2.11 to 2.14", "unwrap a compiled module"),
    "Module._compiled_call_impl": Private("2.11 to 2.14", "replace the call of a module and keep its class"),
    "UntypedStorage._cdata": Private("2.11 to 2.14", "find out whether two tensors share memory"),
    "FakeTensorMode.shape_env": Private("2.11 to 2.14", "check sizes that are assumed after Dynamo has finished"),
    "ShapeEnv.guards": Private("2.11 to 2.14", "check sizes that are assumed after Dynamo has finished"),
    "ShapeGuard.expr": Private("2.11 to 2.14", "check sizes that are assumed after Dynamo has finished"),
    "ShapeEnv.bound_sympy": Private("2.11 to 2.14", "cut a graph at a data-dependent size"),
    "ShapeEnv.ignore_fresh_unbacked_symbols": Private("2.11 to 2.14", "cut a graph at a data-dependent size"),
    "ShapeEnv.create_unbacked_symint": Private("2.11 to 2.14", "cut a graph at a data-dependent size"),
    "ShapeEnv._constrain_range_for_size": Private("2.11 to 2.14", "cut a graph at a data-dependent size"),
    "ShapeEnv.constrain_symbol_range": Private("2.11 to 2.14", "cut a graph at a data-dependent size"),
    "ShapeEnv.unbacked_inputs": Private("2.11 to 2.14", "cut a graph at a data-dependent size"),
}


def _missing(name: str) -> TorchChanged:
    return TorchChanged(name, torch.__version__, *PRIVATE[name])


def _find(name: str) -> Any:
    """Return an attribute of a torch module. Raises TorchChanged."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        raise _missing(name) from None


def _get(owner: object, name: str) -> Any:
    """Return an attribute of a torch object; `name` is that of its class and of the attribute. Raises TorchChanged."""
    try:
        return getattr(owner, name.rpartition(".")[2])
    except AttributeError:
        raise _missing(name) from None


if TYPE_CHECKING:
    from torch._dynamo.eval_frame import OptimizedModule as OptimizedModule
    from torch._dynamo.exc import BackendCompilerFailed as BackendCompilerFailed
    from torch._ops import OpOverload as OpOverload
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
else:
    OptimizedModule = _find("torch._dynamo.eval_frame.OptimizedModule")
    BackendCompilerFailed = _find("torch._dynamo.exc.BackendCompilerFailed")
    OpOverload = _find("torch._ops.OpOverload")
    FakeTensorMode = _find("torch._subclasses.fake_tensor.FakeTensorMode")
aot_autograd: Callable[..., Callable[..., Any]] = _find("torch._dynamo.backends.common.aot_autograd")
detect_fake_mode: Callable[[Any], FakeTensorMode | None] = _find("torch._guards.detect_fake_mode")
unset_fake_temporarily: Callable[[], AbstractContextManager[Any]] = _find(
    "torch._subclasses.fake_tensor.unset_fake_temporarily"
)
no_autocast: Callable[[], AbstractContextManager[Any]] = _find("torch._C._DisableAutocast")
is_wrapper_subclass: Callable[[Any], bool] = _find("torch.utils._python_dispatch.is_traceable_wrapper_subclass")
tree_leaves: Callable[[Any], list[Any]] = _find("torch.utils._pytree.tree_leaves")
tree_map: Callable[..., Any] = _find("torch.utils._pytree.tree_map")
scalar_tensor_decompositions: tuple[Callable[..., Any], ...] = (_find("torch._refs.tensor"),)
_foreach_copy: Callable[..., None] = _find("torch._foreach_copy_")

# metadata of Dynamo and AOTAutograd about a graph


def parameter_names(gm: fx.GraphModule) -> frozenset[str]:
    """Return the names of the parameters and buffers of a Dynamo graph, relative to the traced module."""
    names: Mapping[str, str] | None = gm.meta.get("dynamo_flat_name_to_original_fqn")
    if names is None:
        raise _missing("GraphModule.meta.dynamo_flat_name_to_original_fqn")
    return frozenset(names.values())


def is_broken(gm: fx.GraphModule) -> bool:
    """Return whether a Dynamo graph ends in a graph break."""
    return bool(_get(_get(gm, "GraphModule.compile_subgraph_reason"), "GraphCompileReason.graph_break"))


def break_reason(gm: fx.GraphModule) -> str:
    """Return the first line of a graph break's reason, with the innermost source location outside of torch."""
    reason = _get(gm, "GraphModule.compile_subgraph_reason")
    first = str(_get(reason, "GraphCompileReason.reason")).partition("\n")[0]
    frames: list[traceback.FrameSummary] = _get(reason, "GraphCompileReason.user_stack")
    stack = [frame for frame in frames if not frame.filename.startswith(_TORCH)]
    return f"{'/'.join(Path(stack[-1].filename).parts[-2:])}:{stack[-1].lineno}: {first}" if stack else first


_TORCH = str(Path(torch.__file__).parent)


def static_inputs() -> frozenset[int]:
    """Return the positions of the weights among the inputs of the graph that AOTAutograd is compiling."""
    context = _get(_find("torch._guards.TracingContext"), "TracingContext.try_get")()
    metadata = None if context is None else _get(context, "TracingContext.fw_metadata")
    if metadata is None:
        raise _missing("TracingContext.fw_metadata")
    return frozenset(_get(metadata, "ViewAndMutationMeta.static_input_indices"))


# the current compilation


def compile_id() -> Any:
    """Return the id of Dynamo's current compilation, or None."""
    return _get(_find("torch._guards.CompileContext"), "CompileContext.current_compile_id")()


def is_compiling() -> bool:
    """Return whether Dynamo is compiling. If so, its guards will include sizes that are assumed now."""
    return _get(_find("torch._guards.CompileContext"), "CompileContext.try_get")() is not None


def tracing(fake_mode: FakeTensorMode | None) -> AbstractContextManager[Any]:
    """Return a new tracing context for lowering."""
    if fake_mode is None:
        return nullcontext()
    found: AbstractContextManager[Any] = _find("torch._guards.tracing")(
        _find("torch._guards.TracingContext")(fake_mode)
    )
    return found


def dynamo_config() -> Any:
    """Return Dynamo's config, which is global to the process."""
    return _find("torch._dynamo.config")


def around_compilation(before: Callable[[Any], None], after: Callable[[Any], None]) -> None:
    """Let Dynamo call `before` and `after` around each compilation of a frame, under its lock.

    A second registration has no effect. `torch._dynamo.reset` forgets the first, so that each user repeats it.
    """
    if before not in _handler.start_callbacks:
        _get(_handler, "CompilationCallbackHandler.register_start_callback")(before)
        _get(_handler, "CompilationCallbackHandler.register_end_callback")(after)


_handler = _find("torch._dynamo.callback_handler")
_get(_handler, "CompilationCallbackHandler.start_callbacks")  # each call of a model reads it, without this check


def source_of(node: fx.Node) -> str:
    """Return the source of an input of a Dynamo graph as text: ``L['self'].scale``."""
    return str(_get(_get(node, "Node._dynamo_source"), "Source.name"))


def compiled_by(model: OptimizedModule) -> nn.Module:
    """Return the module inside a module that `torch.compile` returned."""
    inner: nn.Module = _get(model, "OptimizedModule._orig_mod")
    return inner


def compiled_call(model: nn.Module) -> Callable[..., Any] | None:
    """Return the function that replaces a module's `forward` and hooks, or None."""
    run: Callable[..., Any] | None = _get(model, "Module._compiled_call_impl")
    return run


def set_compiled_call(model: nn.Module, run: Callable[..., Any] | None) -> None:
    """Let `run` replace a module's `forward` and hooks, as `Module.compile` does."""
    compiled_call(model)  # raises TorchChanged if the attribute does not exist
    model._compiled_call_impl = run


def hooks_registered() -> int:
    """Return how many hooks of modules and tensors were registered in this process."""
    count: int = _get(_handle, "next_id")
    return count


_handle = _find("torch.utils.hooks", "RemovableHandle")


def forward_hooks(model: nn.Module) -> list[dict[int, Any]]:
    """Return the dictionaries of forward hooks and of their options, global ones among them, that are not empty."""
    shared = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    names = (*shared, "_forward_pre_hooks_with_kwargs")
    found = [_get(module, name) for module in model.modules() for name in names]
    found += [_get(_find("torch.nn.modules", "module"), f"_global{name}") for name in shared]
    return [hooks for hooks in found if hooks]


def without_autocast_key(device: str) -> AbstractContextManager[Any]:
    """Exclude autocast's kernels for a device ("CPU", "CUDA") from the dispatch of ops."""
    key = getattr(_find("torch._C.DispatchKey"), f"Autocast{device}")
    keys = _find("torch._C.DispatchKeySet")(key)
    excluded: AbstractContextManager[Any] = _find("torch._C._ExcludeDispatchKeyGuard")(keys)
    return excluded


# Inductor


def inductor() -> Callable[..., Any]:
    """Return Inductor's entry point, which takes a graph and its fake inputs."""
    found: Callable[..., Any] = _find("torch._inductor.compile_fx.compile_fx")
    return found


def inductor_options(mode: str) -> Mapping[str, Any]:
    """Return the config patches of torch.compile's `mode`."""
    found: Mapping[str, Any] = _find("torch._inductor.list_mode_options")(mode)
    return found


# memory and sizes


def storage_id(value: Tensor) -> int:
    """Return an id of a tensor's storage, which views share. It also works for fake tensors, which have no data."""
    found: int = _get(value.untyped_storage(), "UntypedStorage._cdata")
    return found


def is_unshared(storage: torch.UntypedStorage) -> bool:
    """Return whether a single tensor has this storage: nothing but it and the `storage` object refers to it."""
    count: int = _find("torch._C._storage_Use_Count")(_get(storage, "UntypedStorage._cdata"))
    return count <= 2


def size_guards(fake_mode: FakeTensorMode | None) -> Sequence[sympy.Basic]:
    """Return the size guards that a trace has added so far."""
    shape_env = None if fake_mode is None else _get(fake_mode, "FakeTensorMode.shape_env")
    return [] if shape_env is None else [_get(guard, "ShapeGuard.expr") for guard in _get(shape_env, "ShapeEnv.guards")]


def unbacked_symbols(value: object) -> frozenset[sympy.Symbol]:
    """Return the symbols of data-dependent sizes in a number, or in a tensor's shape and strides."""
    if not isinstance(value, (SymInt, Tensor)):
        return frozenset()
    return frozenset(_find("torch.fx.experimental.symbolic_shapes.free_unbacked_symbols")(value))


def value_bounds(size: SymInt) -> tuple[sympy.Expr, sympy.Expr]:
    """Return the minimum and the maximum of a size."""
    bounds = _get(size.node.shape_env, "ShapeEnv.bound_sympy")(size.node.expr)
    return bounds.lower, bounds.upper


def unbacked_input(size: SymInt) -> SymInt:
    """Return a new symbol, with the bounds of `size`, for a data-dependent size of an input.

    The symbol is registered like those of `mark_unbacked`; otherwise torch does not replace other symbols by it.
    """
    shape_env, (lower, upper) = size.node.shape_env, value_bounds(size)
    with _get(shape_env, "ShapeEnv.ignore_fresh_unbacked_symbols")():
        fresh: SymInt = _get(shape_env, "ShapeEnv.create_unbacked_symint")()
    constrain = "ShapeEnv._constrain_range_for_size" if lower >= 0 else "ShapeEnv.constrain_symbol_range"
    _get(shape_env, constrain)(fresh.node.expr, lower, upper)
    _get(shape_env, "ShapeEnv.unbacked_inputs").add(fresh.node.expr)
    return fresh


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same shapes: on a GPU with one launch for those of a dtype, if strides agree."""
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        to, of = groups.setdefault(target.dtype, ([], []))
        to.append(target)
        of.append(source)
    for to, of in groups.values():
        _foreach_copy(to, of)
