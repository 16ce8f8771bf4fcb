"""The names of the private APIs, and the error when one is gone."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

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
    "torch._inductor.async_compile.AsyncCompile": Private("2.11 to 2.14", "build the kernels of graphs side by side"),
    "torch._inductor.codecache.CodeCacheFuture": Private("2.11 to 2.14", "build the kernels of graphs side by side"),
    "AsyncCompile.wait": Private("2.11 to 2.14", "build the kernels of graphs side by side"),
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
    "torch.utils.hooks.RemovableHandle": Private("2.11 to 2.14", "notice hooks that are registered later"),
    "RemovableHandle.next_id": Private("2.11 to 2.14", "notice hooks that are registered later"),
    "Module._forward_pre_hooks": Private("2.11 to 2.14", "find the hooks of a model"),
    "Module._forward_hooks": Private("2.11 to 2.14", "find the hooks of a model"),
    "Module._forward_hooks_with_kwargs": Private("2.11 to 2.14", "find the hooks of a model"),
    "Module._forward_hooks_always_called": Private("2.11 to 2.14", "find the hooks of a model"),
    "Module._forward_pre_hooks_with_kwargs": Private("2.11 to 2.14", "find the hooks of a model"),
    "torch.nn.modules.module._global_forward_pre_hooks": Private("2.11 to 2.14", "find hooks of all models"),
    "torch.nn.modules.module._global_forward_hooks": Private("2.11 to 2.14", "find hooks of all models"),
    "torch.nn.modules.module._global_forward_hooks_with_kwargs": Private("2.11 to 2.14", "find hooks of all models"),
    "torch.nn.modules.module._global_forward_hooks_always_called": Private("2.11 to 2.14", "find hooks of all models"),
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


def missing(name: str) -> TorchChanged:
    return TorchChanged(name, torch.__version__, *PRIVATE[name])


def find(name: str) -> Any:
    """Return an attribute of a torch module. Raises TorchChanged."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        raise missing(name) from None


def get(owner: object, name: str) -> Any:
    """Return an attribute of a torch object; `name` is that of its class and of the attribute. Raises TorchChanged."""
    try:
        return getattr(owner, name.rpartition(".")[2])
    except AttributeError:
        raise missing(name) from None
