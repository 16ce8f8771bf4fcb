"""Errors of models that cannot be captured, rewritten or called, and of arguments of compile, verify and loading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dit_rewrite.errors.base import DitRewriteError, joined


class ModelError(DitRewriteError):
    """A model, or an argument that belongs to it, cannot be used."""


class BadArgument(ModelError, ValueError):
    template = "{where}: {name}={value!r} is out of range. Give {name} as {allowed}."


class FunctionFailed(ModelError, RuntimeError):
    template = (
        "{function} failed {run} ({cause.__class__.__name__}: {cause!s:.300}). Check it with the exception that is the "
        "cause of this error."
    )


class NotAModule(ModelError, TypeError):
    template = (
        "{what} is not a model. Give compile a torch.nn.Module such as pipe.transformer, or a diffusers pipeline."
    )

    def __init__(self, given: object) -> None:
        kind = given.__name__ if isinstance(given, type) else type(given).__name__
        super().__init__(f"the class {kind}" if isinstance(given, type) else f"an object of class {kind}")


class NoTransformer(ModelError, ValueError):
    template = (
        "{pipeline} has no component called transformer, so there is no diffusion transformer to rewrite; its modules "
        "are {components}. Give dit_rewrite.compile the denoiser itself, if there is one."
    )

    def __init__(self, pipeline: str, components: Iterable[str]) -> None:
        super().__init__(pipeline=pipeline, components=joined(components))


class NotRewritten(ModelError, ValueError):
    template = "{what} was not given to dit_rewrite.compile or enable. Give a policy: enable(pipe, policy)."


class NotCaptured(ModelError, RuntimeError):
    template = (
        "{what} needs the captured graph, but the model has not been called yet. Call the compiled model once, under "
        "torch.no_grad()."
    )


class GradientsNeeded(ModelError, RuntimeError):
    template = (
        "Gradients are enabled and {what} requires them, but a rewritten denoiser is for inference only: reused values "
        "carry no gradient. Call it under torch.no_grad() or torch.inference_mode(), or use "
        "model.requires_grad_(False)."
    )


class NoSites(ModelError, RuntimeError):
    template = (
        "{model} has no residual branch that could be reused, so the policy has no effect. Candidates:\n"
        "  {places}\n"
        "Compile a denoiser whose blocks add branches to a stream (x + f(x)), or use policies.Never()."
    )

    def __init__(self, model: str, refused: Sequence[str]) -> None:
        super().__init__(model=model, places="\n  ".join(refused) or "no residual sum at all")


class BrokenUp(NoSites):
    template = (
        "{model} has no residual branch that could be reused in any of the {graphs} graphs that Dynamo split it into, "
        "so the policy has no effect. Of {total} graph breaks, {most} are at {place}. {remedy}"
    )

    def __init__(self, model: str, graphs: int, breaks: Mapping[str, int], hooks: Mapping[str, int]) -> None:
        place = max(breaks, key=breaks.__getitem__)
        inner = joined(f"{name} around {count} modules" for name, count in hooks.items())
        remedy = (
            f"Hooks run its layers ({inner}). Offload the whole model or whole blocks instead of each layer, and "
            f"quantize with torchao instead of layerwise casting."
            if hooks
            else "Remove the breaks: TORCH_LOGS=graph_breaks lists them, and fullgraph=True makes them errors."
        )
        counts = {"graphs": graphs, "total": sum(breaks.values()), "most": breaks[place]}
        DitRewriteError.__init__(self, model=model, place=place, remedy=remedy, **counts)


class TorchChanged(ModelError, RuntimeError):
    template = (
        "torch {version} has no {name}, without which dit_rewrite cannot {without}. torch {versions} has it. Install "
        "one of these versions, or a newer dit_rewrite."
    )

    def __init__(self, name: str, version: str, versions: str, without: str) -> None:
        super().__init__(name=name, version=version, versions=versions, without=without)


class PassFailed(ModelError, RuntimeError):
    template = (
        "The pass {name} failed ({kind}: {cause}). Write the graphs before it with compile(dump='folder') and report "
        "them. An optional pass can be skipped with disable_passes."
    )

    def __init__(self, name: str, cause: Exception) -> None:
        super().__init__(name=name, kind=type(cause).__name__, cause=cause)


class DamagedWeights(ModelError, OSError):
    template = (
        "The weights in {path} cannot be used ({cause.__class__.__name__}: {cause!s:.200}). Restore the file, or train "
        "it again (examples/shapes/train.py)."
    )
