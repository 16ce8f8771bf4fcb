"""All private APIs of torch that the project uses, each behind a function or a name.

A torch release may rename any of them. Then TorchChanged is raised, at import or at the first use. A silent default
would be wrong: a part of a model could be taken for the whole, a weight for data, an assumed size for a checked one.
`names.PRIVATE` lists them all, each with the torch versions that have it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import SymInt, Tensor, fx, nn

from dit_rewrite.torch_compat.names import find, get, missing

if TYPE_CHECKING:
    from torch._dynamo.eval_frame import OptimizedModule as OptimizedModule
    from torch._dynamo.exc import BackendCompilerFailed as BackendCompilerFailed
    from torch._ops import OpOverload as OpOverload
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
else:
    OptimizedModule = find("torch._dynamo.eval_frame.OptimizedModule")
    BackendCompilerFailed = find("torch._dynamo.exc.BackendCompilerFailed")
    OpOverload = find("torch._ops.OpOverload")
    FakeTensorMode = find("torch._subclasses.fake_tensor.FakeTensorMode")
aot_autograd: Callable[..., Callable[..., Any]] = find("torch._dynamo.backends.common.aot_autograd")
detect_fake_mode: Callable[[Any], FakeTensorMode | None] = find("torch._guards.detect_fake_mode")
unset_fake_temporarily: Callable[[], AbstractContextManager[Any]] = find(
    "torch._subclasses.fake_tensor.unset_fake_temporarily"
)
no_autocast: Callable[[], AbstractContextManager[Any]] = find("torch._C._DisableAutocast")
is_wrapper_subclass: Callable[[Any], bool] = find("torch.utils._python_dispatch.is_traceable_wrapper_subclass")
tree_leaves: Callable[[Any], list[Any]] = find("torch.utils._pytree.tree_leaves")
tree_map: Callable[..., Any] = find("torch.utils._pytree.tree_map")
scalar_tensor_decompositions: tuple[Callable[..., Any], ...] = (find("torch._refs.tensor"),)
_foreach_copy: Callable[..., None] = find("torch._foreach_copy_")

# metadata of Dynamo and AOTAutograd about a graph


def parameter_names(gm: fx.GraphModule) -> frozenset[str]:
    """Return the names of the parameters and buffers of a Dynamo graph, relative to the traced module."""
    names: Mapping[str, str] | None = gm.meta.get("dynamo_flat_name_to_original_fqn")
    if names is None:
        raise missing("GraphModule.meta.dynamo_flat_name_to_original_fqn")
    return frozenset(names.values())


def is_broken(gm: fx.GraphModule) -> bool:
    """Return whether a Dynamo graph ends in a graph break."""
    return bool(get(get(gm, "GraphModule.compile_subgraph_reason"), "GraphCompileReason.graph_break"))


def break_reason(gm: fx.GraphModule) -> str:
    """Return the first line of a graph break's reason, with the innermost source location outside of torch."""
    reason = get(gm, "GraphModule.compile_subgraph_reason")
    first = str(get(reason, "GraphCompileReason.reason")).partition("\n")[0]
    frames: list[traceback.FrameSummary] = get(reason, "GraphCompileReason.user_stack")
    stack = [frame for frame in frames if not frame.filename.startswith(_TORCH)]
    return f"{'/'.join(Path(stack[-1].filename).parts[-2:])}:{stack[-1].lineno}: {first}" if stack else first


_TORCH = str(Path(torch.__file__).parent)


def static_inputs() -> frozenset[int]:
    """Return the positions of the weights among the inputs of the graph that AOTAutograd is compiling."""
    context = get(find("torch._guards.TracingContext"), "TracingContext.try_get")()
    metadata = None if context is None else get(context, "TracingContext.fw_metadata")
    if metadata is None:
        raise missing("TracingContext.fw_metadata")
    return frozenset(get(metadata, "ViewAndMutationMeta.static_input_indices"))


# the current compilation


def compile_id() -> Any:
    """Return the id of Dynamo's current compilation, or None."""
    return get(find("torch._guards.CompileContext"), "CompileContext.current_compile_id")()


def is_compiling() -> bool:
    """Return whether Dynamo is compiling. If so, its guards will include sizes that are assumed now."""
    return get(find("torch._guards.CompileContext"), "CompileContext.try_get")() is not None


def tracing(fake_mode: FakeTensorMode | None) -> AbstractContextManager[Any]:
    """Return a new tracing context for lowering."""
    if fake_mode is None:
        return nullcontext()
    found: AbstractContextManager[Any] = find("torch._guards.tracing")(find("torch._guards.TracingContext")(fake_mode))
    return found


def dynamo_config() -> Any:
    """Return Dynamo's config, which is global to the process."""
    return find("torch._dynamo.config")


def around_compilation(before: Callable[[Any], None], after: Callable[[Any], None]) -> None:
    """Let Dynamo call `before` and `after` around each compilation of a frame, under its lock.

    A second registration has no effect. `torch._dynamo.reset` forgets the first, so that each user repeats it.
    """
    if before not in _handler.start_callbacks:
        get(_handler, "CompilationCallbackHandler.register_start_callback")(before)
        get(_handler, "CompilationCallbackHandler.register_end_callback")(after)


_handler = find("torch._dynamo.callback_handler")
get(_handler, "CompilationCallbackHandler.start_callbacks")  # each call of a model reads it, without this check


def source_of(node: fx.Node) -> str:
    """Return the source of an input of a Dynamo graph as text: ``L['self'].scale``."""
    return str(get(get(node, "Node._dynamo_source"), "Source.name"))


def compiled_by(model: OptimizedModule) -> nn.Module:
    """Return the module inside a module that `torch.compile` returned."""
    inner: nn.Module = get(model, "OptimizedModule._orig_mod")
    return inner


def compiled_call(model: nn.Module) -> Callable[..., Any] | None:
    """Return the function that replaces a module's `forward` and hooks, or None."""
    run: Callable[..., Any] | None = get(model, "Module._compiled_call_impl")
    return run


def set_compiled_call(model: nn.Module, run: Callable[..., Any] | None) -> None:
    """Let `run` replace a module's `forward` and hooks, as `Module.compile` does."""
    compiled_call(model)  # raises TorchChanged if the attribute does not exist
    model._compiled_call_impl = run


def hooks_registered() -> int:
    """Return how many hooks of modules and tensors were registered in this process."""
    count: int = _handle.next_id
    return count


_handle = find("torch.utils.hooks.RemovableHandle")
get(_handle, "RemovableHandle.next_id")  # each call of a model reads it, without this check
_HOOKS = (
    "Module._forward_pre_hooks",
    "Module._forward_pre_hooks_with_kwargs",
    "Module._forward_hooks",
    "Module._forward_hooks_with_kwargs",
    "Module._forward_hooks_always_called",
)
_GLOBAL_HOOKS = (
    "torch.nn.modules.module._global_forward_pre_hooks",
    "torch.nn.modules.module._global_forward_hooks",
    "torch.nn.modules.module._global_forward_hooks_with_kwargs",
    "torch.nn.modules.module._global_forward_hooks_always_called",
)


def forward_hooks(model: nn.Module) -> list[dict[int, Any]]:
    """Return the dictionaries of forward hooks and of their options, global ones among them, that are not empty."""
    found = [*(get(module, name) for module in model.modules() for name in _HOOKS), *map(find, _GLOBAL_HOOKS)]
    return [hooks for hooks in found if hooks]


def without_autocast_key(device: str) -> AbstractContextManager[Any]:
    """Exclude autocast's kernels for a device ("CPU", "CUDA") from the dispatch of ops."""
    key = getattr(find("torch._C.DispatchKey"), f"Autocast{device}")
    keys = find("torch._C.DispatchKeySet")(key)
    excluded: AbstractContextManager[Any] = find("torch._C._ExcludeDispatchKeyGuard")(keys)
    return excluded


# Inductor


def inductor() -> Callable[..., Any]:
    """Return Inductor's entry point, which takes a graph and its fake inputs."""
    found: Callable[..., Any] = find("torch._inductor.compile_fx.compile_fx")
    return found


def inductor_options(mode: str) -> Mapping[str, Any]:
    """Return the config patches of torch.compile's `mode`."""
    found: Mapping[str, Any] = find("torch._inductor.list_mode_options")(mode)
    return found


# memory and sizes


def storage_id(value: Tensor) -> int:
    """Return an id of a tensor's storage, which views share. It also works for fake tensors, which have no data."""
    found: int = get(value.untyped_storage(), "UntypedStorage._cdata")
    return found


def is_unshared(storage: torch.UntypedStorage) -> bool:
    """Return whether a single tensor has this storage: nothing but it and the `storage` object refers to it."""
    count: int = find("torch._C._storage_Use_Count")(get(storage, "UntypedStorage._cdata"))
    return count <= 2


def size_guards(fake_mode: FakeTensorMode | None) -> Sequence[sympy.Basic]:
    """Return the size guards that a trace has added so far."""
    shape_env = None if fake_mode is None else get(fake_mode, "FakeTensorMode.shape_env")
    return [] if shape_env is None else [get(guard, "ShapeGuard.expr") for guard in get(shape_env, "ShapeEnv.guards")]


def unbacked_symbols(value: object) -> frozenset[sympy.Symbol]:
    """Return the symbols of data-dependent sizes in a number, or in a tensor's shape and strides."""
    if not isinstance(value, (SymInt, Tensor)):
        return frozenset()
    return frozenset(find("torch.fx.experimental.symbolic_shapes.free_unbacked_symbols")(value))


def value_bounds(size: SymInt) -> tuple[sympy.Expr, sympy.Expr]:
    """Return the minimum and the maximum of a size."""
    bounds = get(size.node.shape_env, "ShapeEnv.bound_sympy")(size.node.expr)
    return bounds.lower, bounds.upper


def unbacked_input(size: SymInt) -> SymInt:
    """Return a new symbol, with the bounds of `size`, for a data-dependent size of an input.

    The symbol is registered like those of `mark_unbacked`; otherwise torch does not replace other symbols by it.
    """
    shape_env, (lower, upper) = size.node.shape_env, value_bounds(size)
    with get(shape_env, "ShapeEnv.ignore_fresh_unbacked_symbols")():
        fresh: SymInt = get(shape_env, "ShapeEnv.create_unbacked_symint")()
    constrain = "ShapeEnv._constrain_range_for_size" if lower >= 0 else "ShapeEnv.constrain_symbol_range"
    get(shape_env, constrain)(fresh.node.expr, lower, upper)
    get(shape_env, "ShapeEnv.unbacked_inputs").add(fresh.node.expr)
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
