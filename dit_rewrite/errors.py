"""The one catalogue of what can be refused, missed or go wrong; a leaf that every layer may import.

A `Reason` says why a place was not rewritten or a value not reused: it stands in reports, dumps and decisions.
An error is raised where going on would be wrong. Its message says what happened, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum


class Reason(str, Enum):
    """Why a place is no site, why a site computed, or why a cached value was not used."""

    # a summand of a residual sum that is not a site
    NOT_FROM_STREAM = "the summand is not computed from the stream"
    NO_CONTRACTION = "the summand is computed from the stream without any matrix product"
    ENTANGLED = "values that share a contraction feed each other's inputs: each is a site of its own"
    STEADY = "it does not depend on the step: computed once per trajectory anyway"
    # a span or a part of a branch that a rule asked for
    NO_COUNTERPART = "the stream behind the span has no counterpart of its shape before it"
    SPAN_IN_PART = "the graph is a part of the model, so that its layers are not known"
    SPAN_PER_GRAPH = "the graph is a part of the model: the span is of the blocks of this part alone"
    NO_LATENT = "the output has not the latent's shape and dtype, so that their difference is not known"
    OTHER_STACK = "it is not in the stack with most FLOPs: name it by Where(stack=…)"
    NO_STACK = "no blocks of the graph lie in such a container, or none add to a stream"
    NO_BLOCKS = "the stack has no such blocks in this graph"
    NO_KEYS = "no attention op with keys and values of its own"
    NO_CORE = "no attention op: what it does instead is defined for softmax attention alone"
    CAUSAL = "its attention is causal, or shares keys among heads"
    OTHER_TOKENS = "its queries and keys are not the same tokens, so that they have no window"
    HEAD_SIZE = "blockwise attention takes heads of 16 to 256 channels, in 16 or 32 bits"
    MOVING_KEYS = "its keys change from step to step, and the paper's bound does not know that: use bound='sound'"
    MOVING_MASK = "its attention mask changes from step to step, and the bound does not know that"
    MIXES_SAMPLES = "its samples cannot be told apart, so that no half of the batch can be computed alone"
    ODD_BATCH = "the batch has no two halves"
    MOVING_SIZE = "its size is decided by data that change from step to step"
    NO_PROBE = "the graph has no such probe"
    PROBE_WITHIN = "its probe is computed after its own value: give the policy lag=1"
    NO_GRID = "its probe is filtered, and where on a grid the tokens are cannot be told"
    PROBE_IN_PART = "the graph is a part of the model, so that its inputs and outputs are not the model's"
    # a site that costs nothing at run time
    UNREACHED = "no rule can ever apply"
    TOTAL_UNKNOWN = "the guard needs the number of steps, and nobody told it"
    NOISE_UNKNOWN = "the guard needs the noise level, and no scheduler that says it was told"
    # decisions
    NO_RULE = "no rule applies"
    NO_WEIGHTS = "the forecast's basis gives no finite weights for these places"
    NOT_MEASURED = "the guard needs a measurement, and there is none yet"
    RULE = "a rule applies"
    COVERED = "an enclosing site is reused"
    FORCED = "every decision is forced to compute"
    WILL_BE_READ = "a later step reads what it fills the slot with"
    UNREAD = "nothing reads its slot before it is filled again"
    # misses: a rule wanted to reuse, and there was no value that fits
    EMPTY = "nothing was computed yet in this trajectory"
    CHANGED_INPUT = "shape, dtype or device of an input changed"
    CHANGED_GRAPH = "another graph ran at this place of the call before"
    CHANGED_WEIGHTS = "the graph ran with other weights before"
    CHANGED_CONDITIONING = "what it held was made for other conditioning"
    BEYOND_END = "the trajectory was told fewer steps"
    SIZES_NOT_COMPILED = "the variant was compiled later, for other sizes"
    NOT_CAPTURED = "Dynamo ran the call without a captured graph (recompile limit reached, or disabled)"
    OUTSIDE_CALL = "the graph ran outside a call of the compiled model"
    # how a graph is lowered
    ASKED = "asked for"
    FEW_ROWS = "its decisions have few distinct rows"
    MANY_ROWS = "its decisions have many distinct rows"
    MEASURES_NOW = "a guard needs a measurement of this very call"
    # streams that have no values of their own yet
    NEW_STREAM = "another call in each step: no call before has its name or place"
    AMBIGUOUS_STREAM = "its latent may continue either of two streams of one conditioning: name them by cache_context"
    UNREADABLE_INPUT = "an argument holds an object that cannot be read, and perhaps a condition that is not seen"
    CALLED_ONCE = "the stream was called in one step only, and gave its memory back"
    EVICTED = "the streams together held more than the limit of bytes"
    AMBIENT_CHANGED = "a tensor that is an attribute of the model is another one, or was changed in place"
    # trajectories
    FIRST_CALL = "the first call"
    NEW_CONDITIONING = "the conditioning is another object, or was changed in place"
    NEW_LATENT = "the latent does not continue the last one"
    TIMESTEP_TURNED = "the timestep went against the direction of the trajectory"
    TIMESTEP_STILL = "the timestep does not move from call to call"
    SCHEDULE_SET = "the scheduler's timesteps were set anew"
    REPEATED = "the latent is the one of the call before"
    RESET = "reset"

    def __str__(self) -> str:
        return self.value


class DitRewriteError(Exception):
    """Base of all errors of this package. ``during`` is the name of the pass that raised it, if one did."""

    during: str | None = None

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.during is None else f"{text} (in the pass {self.during})"


class PolicyError(DitRewriteError, ValueError):
    """A policy, rule or guard that has no meaning."""


class UnknownSymbol(PolicyError):
    def __init__(self, names: list[str], guard: object, known: Iterable[str]) -> None:
        super().__init__(
            f"The guard `{guard}` uses {', '.join(names)}, which no guard can know. "
            f"Use the symbols of dit_rewrite.guards: {', '.join(known)}."
        )


class NotBoolean(PolicyError):
    def __init__(self, guard: object) -> None:
        super().__init__(
            f"The guard `{guard}` is not a Boolean expression. Write a comparison or a combination of them, "
            f"for instance `Ne(Mod(step, 3), 0) & (age < 4)`, or sympy.true."
        )


class BadParameter(PolicyError):
    def __init__(self, where: str, name: str, value: object, allowed: str) -> None:
        super().__init__(f"{where}: {name}={value!r} is out of range. Give {name} as {allowed}.")


class LayersOutside(PolicyError):
    def __init__(self, layers: object, count: int) -> None:
        super().__init__(
            f"Where: layers={layers} is outside the model, which has {count} blocks, numbered from 0. "
            f"Give (first, end) with end <= {count}, or fraction=(from, to)."
        )


class OverlappingSpans(PolicyError):
    def __init__(self, a: tuple[int, int], b: tuple[int, int]) -> None:
        super().__init__(
            f"The spans of blocks {a[0]} to {a[1] - 1} and {b[0]} to {b[1] - 1} overlap, so that neither could be "
            f"reused without the other. Give spans that lie apart or within one another."
        )


class NeedsSegments(PolicyError):
    def __init__(self, policy: object) -> None:
        super().__init__(
            f"{policy} decides in the middle of a call, by what it measures in it; lowering='variants' decides before. "
            f"Use lowering='segments' or 'auto', or give the policy lag=1."
        )


class TwoStores(PolicyError):
    def __init__(self, site: str, stores: Iterable[object]) -> None:
        super().__init__(
            f"The rules for {site} ask for {' and '.join(sorted(map(repr, stores)))} in one slot. "
            f"Give all strategies that reuse it one store."
        )


class UnknownPolicy(PolicyError):
    def __init__(self, text: str, known: list[str]) -> None:
        super().__init__(f"No policy is called {text!r}. Known: {', '.join(known)}; e.g. `fora:interval=3`.")


class GradientsNeeded(DitRewriteError, RuntimeError):
    def __init__(self, what: str) -> None:
        super().__init__(
            f"Gradients are enabled and {what} requires them, but a rewritten denoiser is for inference only: "
            f"reused values carry no gradient. Call it under torch.no_grad() or torch.inference_mode(), "
            f"or use model.requires_grad_(False)."
        )


class NoSites(DitRewriteError, RuntimeError):
    def __init__(self, model: str, refused: list[str]) -> None:
        places = "\n  ".join(refused) or "no residual sum at all"
        super().__init__(
            f"{model} has no residual branch that could be reused, so the policy can change nothing. Places seen:\n"
            f"  {places}\nCompile a denoiser whose blocks add branches to a stream (x + f(x)), or use policies.Never()."
        )


class NotAModule(DitRewriteError, TypeError):
    def __init__(self, given: object) -> None:
        kind = given.__name__ if isinstance(given, type) else type(given).__name__
        what = f"the class {kind}" if isinstance(given, type) else f"an object of class {kind}"
        super().__init__(
            f"{what} is no model. Give compile a torch.nn.Module such as pipe.transformer, or a diffusers pipeline."
        )


class NoTransformer(DitRewriteError, ValueError):
    def __init__(self, pipeline: str, components: Iterable[str]) -> None:
        super().__init__(
            f"{pipeline} has no component called transformer, so there is no diffusion transformer to rewrite; its "
            f"modules are {', '.join(components) or 'none'}. Give dit_rewrite.compile a denoiser itself, if it has one."
        )


class NotRewritten(DitRewriteError, ValueError):
    def __init__(self, what: str) -> None:
        super().__init__(f"{what} was not given to dit_rewrite.compile or enable. Give a policy: enable(pipe, policy).")


class UnreachedPolicy(PolicyError):
    def __init__(self, policy: object, sites: int) -> None:
        super().__init__(
            f"The policy {policy} reaches none of the model's {sites} sites, so there is nothing to verify. "
            f"Check its kinds and guards against model.explain()."
        )


class NotCaptured(DitRewriteError, RuntimeError):
    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} needs the captured graph, and the model was not called yet. Call the compiled model once, "
            f"under torch.no_grad()."
        )


class BadTrajectory(DitRewriteError, ValueError):
    def __init__(self, what: str, todo: str) -> None:
        super().__init__(f"{what} {todo}")


class NoiseUnknown(BadTrajectory):
    def __init__(self, policy: object, scheduler: object) -> None:
        known = "no scheduler was told" if scheduler is None else f"{type(scheduler).__name__} does not say it"
        super().__init__(
            f"{policy} needs the signal-to-noise ratio of each step, and {known}.",
            "Give trajectory(scheduler=pipe.scheduler) one with alphas_cumprod or sigmas, its timesteps set.",
        )


class DamagedWeights(DitRewriteError, OSError):
    def __init__(self, path: object, cause: BaseException) -> None:
        super().__init__(
            f"The weights in {path} cannot be used ({type(cause).__name__}: {str(cause)[:200]}). "
            f"Restore the file, or train it again (examples/shapes/train.py)."
        )


class MissingExtra(DitRewriteError, ImportError):
    def __init__(self, package: str, purpose: str, extra: str = "diffusers") -> None:
        super().__init__(f"{purpose} needs {package}. Install it: pip install 'dit_rewrite[{extra}]'.")


class HubUnreachable(DitRewriteError, OSError):
    def __init__(self, model: str, cause: BaseException) -> None:
        super().__init__(
            f"{model!r} is not a local folder, and the hub could not be reached ({type(cause).__name__}). "
            f"Give --model the path of a folder that was saved with save_pretrained, or go online."
        )


class BadModel(DitRewriteError, ValueError):
    def __init__(self, text: str, cause: object) -> None:
        super().__init__(
            f"--model {text} cannot be used ({cause}). Give module:factory, where factory(steps) returns (model, "
            f"calls) or (model, calls, scheduler), calls being a list with a dict of keyword arguments for each step."
        )


class PipelineNotLoaded(DitRewriteError, OSError):
    def __init__(self, model: str, cause: BaseException) -> None:
        super().__init__(
            f"No pipeline could be loaded from {model!r} ({type(cause).__name__}: {str(cause)[:300]}). Give --model a "
            f"hub id such as facebook/DiT-XL-2-256, or a folder that a pipeline's save_pretrained has written."
        )


class WrongInput(DitRewriteError, ValueError):
    def __init__(self, pipeline: str, given: str, wanted: str) -> None:
        super().__init__(f"{pipeline} takes no {given}. Give {wanted} instead.")


class BadGuardText(PolicyError):
    def __init__(self, text: str, problem: str, symbols: Iterable[str], functions: Iterable[str]) -> None:
        super().__init__(
            f"The guard `{text[:200]}` cannot be read: {problem[:300]}. Write comparisons of {', '.join(symbols)} and "
            f"numbers with + - * / ** %, joined by & | ^ ~, and the functions {', '.join(functions)}."
        )


class ForeignName(BadGuardText):
    def __init__(self, text: str, name: str, kind: str, symbols: Iterable[str], functions: Iterable[str]) -> None:
        super().__init__(text, f"{name[:100]!r} is no {kind} of guards", symbols, functions)


class UnwritableGuard(PolicyError):
    def __init__(self, guard: object, cause: object) -> None:
        super().__init__(
            f"The guard `{guard}` cannot be saved: read back from text it would be another one ({cause}). "
            f"Write it without evaluate=False, and only with what guards as text know."
        )


class UnwritableBasis(PolicyError):
    def __init__(self, basis: object) -> None:
        super().__init__(
            f"A forecast over the basis {basis!r:.100} cannot be saved: a function is no text. "
            f"Give it one of dit_rewrite.bases."
        )


class BadPolicyText(PolicyError):
    def __init__(self, where: str, problem: str) -> None:
        super().__init__(
            f"This is no policy in JSON: {where} {problem[:300]}. Write it by dit_rewrite.serialise.to_json."
        )


class UnknownVersion(BadPolicyText):
    def __init__(self, version: object, known: int) -> None:
        super().__init__("its version", f"is {version!r:.100}, and this dit_rewrite reads version {known}")


class BadPlan(DitRewriteError, ValueError):
    def __init__(self, path: object, problem: str) -> None:
        super().__init__(
            f"{path} cannot be used as a plan: {problem[:300]}. Give a file that Plan.save or an unfinished search has "
            f"written, or delete it and search again."
        )


class PlanMismatch(DitRewriteError, ValueError):
    def __init__(self, problem: str, todo: str) -> None:
        super().__init__(f"{problem} {todo}")


class NotAPolicy(PolicyError):
    def __init__(self, given: str, remedy: str) -> None:
        super().__init__(f"A policy is needed, and this is of type {given}. {remedy}.")


class PassFailed(DitRewriteError):
    def __init__(self, name: str, cause: Exception) -> None:
        super().__init__(
            f"The pass {name} failed: {type(cause).__name__}: {cause}. compile(dump='folder') writes the graphs that "
            f"led up to it; please report them. An optional pass can be left out with disable_passes."
        )


class TorchChanged(DitRewriteError, RuntimeError):
    def __init__(self, name: str, version: str) -> None:
        super().__init__(
            f"torch {version} has no {name} any more, which dit_rewrite reads. Install a torch that dit_rewrite was "
            f"tested with (see its pyproject.toml), or a newer dit_rewrite."
        )


class BrokenUp(NoSites):
    def __init__(self, model: str, graphs: int, breaks: Mapping[str, int], hooks: Mapping[str, int]) -> None:
        place = max(breaks, key=breaks.__getitem__)
        inner = ", ".join(f"{name} around {count} modules" for name, count in hooks.items())
        remedy = (
            f"Its layers run in hooks ({inner}). Offload the whole model or whole blocks instead of each layer, and "
            f"quantize by torchao instead of layerwise casting."
            if hooks
            else "Remove the breaks: TORCH_LOGS=graph_breaks lists them, and fullgraph=True makes them errors."
        )
        DitRewriteError.__init__(
            self,
            f"{model} has no residual branch that could be reused in any of the {graphs} graphs that Dynamo broke it "
            f"up into, so the policy can change nothing. Of {sum(breaks.values())} graph breaks {breaks[place]} are at "
            f"{place}. {remedy}",
        )


class NotCalibrated(DitRewriteError, ValueError):
    def __init__(self, method: str, problem: str, todo: str) -> None:
        super().__init__(f"{method} cannot be calibrated: {problem}. {todo}")
