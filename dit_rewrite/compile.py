"""The public functions that rewrite a model or a pipeline, predict the costs of a policy, and undo the rewrite."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import InnerBackend, Lowering
from dit_rewrite.compiler.request import Tables
from dit_rewrite.enable import disable, enabled, required_denoisers
from dit_rewrite.errors import BadArgument, NotAModule, NotCaptured, NotRewritten, PolicyForOtherModel, PredictionReason
from dit_rewrite.module import RewrittenModule, attach, backend_of, detach, unwrapped
from dit_rewrite.policies import as_policy
from dit_rewrite.policy.plan import fingerprint
from dit_rewrite.policy.rules import Policy
from dit_rewrite.report.dump import Dump
from dit_rewrite.report.prediction import Prediction, predict_model

__all__ = ["RewrittenModule", "compile", "enable", "predict", "restore"]


def compile(
    model: Any,
    policy: Policy | str,
    *,
    backend: InnerBackend = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    lowering: str = "auto",
    max_variants: int = 8,
    dump: str | Path | None = None,
    disable_passes: Collection[str] = (),
    memory_budget: int | None = None,
    timing: bool = False,
    tables: Tables = "reuse",
    release: bool = False,
    cuda_graphs: bool = False,
) -> Any:
    """Compile a diffusion transformer so that its residual branches are computed or reused as `policy` says.

    Returns `model` itself, with the methods of RewrittenModule. Copies of it are not rewritten. Compiling again
    replaces the policy, and `restore` undoes the rewrite. A module returned by torch.compile is unwrapped. A diffusers
    pipeline is passed to `enable`. `policy` may be text, such as ``"fora:interval=3"``.

    `backend` compiles the rewritten graphs: "inductor" (with torch.compile's `mode` and `options`), "aot_eager" (runs
    the graphs themselves) or a callable ``(graph module, fake inputs) -> callable``. `fullgraph=True` makes graph
    breaks an error; `dynamic` is torch.compile's.

    `lowering` is "variants" (a graph for each row of decisions), "segments" (the graph is cut between blocks, identical
    segments are compiled once, and decisions can be made between them), or "auto": variants unless there are more than
    `max_variants` of them, or a guard measures the call that it decides. Values that depend on the conditioning alone
    are computed once per trajectory, which is exact; `disable_passes=("hoist",)` turns that off. `dump` is a folder for
    the graph after each pass and the diffs. `timing` measures the time of each call, which `explain` sets beside the
    prediction; it waits for the device twice per call.

    `memory_budget` is the maximum number of bytes that the slots of all streams of a trajectory take, by default half
    of the memory of the model's device. If the slots of one stream, or of two where the pipeline names its streams, do
    not fit, the sites that save most time per byte are cached, and `explain` names the others. If there are more
    streams at run time, whole streams are evicted.

    Values that depend on the timestep and the conditioning alone, such as the modulation, are kept in step tables, from
    which steps that reuse something read them. With `tables="all"`, steps that compute every site read them too: their
    results are then within rounding of the original model's, and no longer bit-equal.
    `disable_passes=("step_tables",)` turns tables off.

    With `release=True`, which needs `tables="all"`, weights that only tables are computed from leave the CPU's memory
    once the rows of a schedule are computed: they are mapped from a temporary file, and can be read as before.
    `restore` brings them back. Weights on other devices stay where they are.

    With `cuda_graphs=True`, each variant is captured as a CUDA graph after two runs, and replayed from then on, over
    buffers that the cached values stay in. Variants that cannot be captured run as before, and `stats` counts why; on a
    CPU that is all of them. The graphs and their buffers outlive a trajectory, until `restore`.

    The model is compiled at its first call, for inference only. Raises NotAModule if `model` is not a module,
    BadArgument for other invalid arguments, and PlanMismatch for a policy that was searched for another model.
    """
    policy = as_policy(policy)
    lower = Lowering.of(backend, mode, options, lowering, max_variants)
    if dump is not None and Path(dump).exists() and not Path(dump).is_dir():
        raise BadArgument("compile", "dump", str(dump), "a folder, which need not exist yet")

    def rewrite(denoiser: nn.Module) -> RewrittenModule:
        if policy.made_for is not None and fingerprint(denoiser) != policy.made_for.model:
            raise PolicyForOtherModel(policy)
        made = Backend(
            denoiser,
            policy,
            lower,
            watcher=None if dump is None else Dump(Path(dump)),
            disable_passes=disable_passes,
            memory_budget=memory_budget,
            timing=timing,
            tables=tables,
            release=release,
            cuda_graphs=cuda_graphs,
        )
        return attach(denoiser, made, fullgraph, dynamic)

    if not is_pipeline(model):
        return rewrite(_module(model))
    for name, denoiser in required_denoisers(model).items():
        setattr(model, name, rewrite(denoiser))  # also removes torch.compile's wrapper
    return enabled(model)


def enable(pipe: Any, policy: Policy | str | None = None, *, quiet: bool = False, **options: Any) -> Any:
    """Rewrite every denoiser of a diffusers pipeline in place, and open a trajectory around each call of it.

    Returns `pipe` itself. `options` are those of `compile`. Without a `policy` the denoisers must be rewritten already,
    as in a pipeline made by `from_pipe`, and keep their policies. After the first run, one line on stderr reports the
    fraction of reused values, unless `quiet`; a run that reuses nothing gives a warning. `restore` undoes it.

    Raises NoTransformer if the pipeline has no denoiser, NotRewritten if there is no policy, and the errors of
    `compile`.
    """
    found = required_denoisers(pipe)
    if policy is not None:
        compile(pipe, policy, **options)
    elif not all(isinstance(model, RewrittenModule) for model in found.values()):
        raise NotRewritten(type(pipe).__name__)
    return enabled(pipe, quiet)


def predict(
    model: Any, policy: Policy | str | None = None, num_steps: int | None = None, scheduler: Any = None
) -> Prediction | PredictionReason:
    """Predict the FLOPs, the counts and the times of a policy for a rewritten model, without compiling it.

    `policy` may be another one than that of the model, which is the default. Without `num_steps`, the number of steps
    is that of a `scheduler` whose timesteps are set, or that of the trajectory of the first call. Returns the reason if
    the decisions cannot be foreseen. Raises BadArgument for a pipeline, which may have several denoisers, NotRewritten,
    or NotCaptured before the first call.
    """
    if is_pipeline(model):
        raise BadArgument("predict", "model", type(model).__name__, "a denoiser, such as pipe.transformer")
    backend = backend_of(model)
    if not backend.rewritten:
        raise NotCaptured("predict")
    return predict_model(backend, model, backend.policy if policy is None else as_policy(policy), num_steps, scheduler)


def restore(model: Any) -> Any:
    """Undo `compile` on a model, or `enable` on a pipeline; returns the same object."""
    return disable(model) if is_pipeline(model) else detach(_module(model))


def is_pipeline(model: object) -> bool:
    """Return whether an object is a pipeline: callable, with named components, and not a module."""
    return callable(model) and hasattr(model, "components") and not isinstance(model, nn.Module | type)


def _module(model: Any) -> nn.Module:
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        raise NotAModule(model)
    return model
