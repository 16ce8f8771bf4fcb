"""DQAR, FORA and the first-block cache as described by their sources. Compiled policies are compared with them.

These are plain functions and loops over the eager model; they share no code with the compiler.

* FORA (section 3.2): every N-th step computes (see also fora.py).
* DQAR: equation 2 in exact fractions, equation 3 from the scheduler's own tables, equation 4; equation 5 divided by the
  number of rows, from the outputs of an attention's projections. A layer that reuses keeps its last computed output.
* First-block cache: diffusers' hook. Each call runs the first block. If its change of the latent's stream differs by
  more than the threshold (relative mean absolute difference) from that of the last computed step, the other blocks run,
  and their change of each stream is stored. Otherwise the stored change is added to the output of the first block.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.helpers.models import output
from tests.references.fora import ModuleCache, get

Calls = Sequence[dict[str, Any]]

# --- Which modules ----------------------------------------------------------------------------------------------------

BLOCKS = {
    "dit": ("transformer_blocks",),
    "pixart_alpha": ("transformer_blocks",),
    "sd3": ("transformer_blocks",),
    "flux": ("transformer_blocks", "single_transformer_blocks"),
    "wan": ("blocks",),
    "stdit": ("blocks",),
}
"""The module lists of each model's blocks, in the order in which they run."""

ATTENTION = ("attn", "attn1", "attn2", "attn_temp", "cross_attn")
"""The attributes of a block that are attentions with a residual branch of their own.

FLUX's single blocks have an `attn` too, which shares its projection with the MLP and is not among them.
"""


def named_blocks(case_name: str, model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a model by path, in order."""
    lists = {name: get(model, name) for name in BLOCKS[case_name]}
    return {f"{name}.{i}": b for name, blocks in lists.items() if blocks for i, b in enumerate(blocks.children())}


def attention_paths(case_name: str, model: nn.Module) -> list[list[str]]:
    """Return for each block the paths of its attention branches."""
    return [
        [f"{path}.{name}" for name in ATTENTION if getattr(block, name, None) is not None and "single" not in path]
        for path, block in named_blocks(case_name, model).items()
    ]


# --- DQAR -------------------------------------------------------------------------------------------------------------


def reusable_layers(step: int, steps: int, warmup: Fraction, fraction: Fraction, layers: int) -> int:
    """Equation 2 at progress step / (steps - 1)."""
    progress = Fraction(step, steps - 1)
    if progress < warmup:
        return 0
    return math.floor((progress - warmup) / (1 - warmup) * fraction * layers)


def snr_table(scheduler: Any) -> list[float]:
    """The signal-to-noise ratio at each step of a DDIM (equation 3) or flow-matching scheduler.

    Flow matching mixes (1 - sigma) signal with sigma noise: its ratio of variances is ((1 - sigma) / sigma)^2.
    """
    if hasattr(scheduler, "alphas_cumprod"):
        signal = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps]
        return [abar / (1 - abar) for abar in signal]
    return [((1 - sigma) / sigma) ** 2 for sigma in map(float, scheduler.sigmas[:-1])]


def linear_schedule(
    steps: int, layers: int, warmup: Fraction, fraction: Fraction, reverse: bool = False
) -> list[list[bool]]:
    """Return LinearSchedule(l, t) for each step and layer: the first layers reuse, or with `reverse` the last."""
    counts = [reusable_layers(step, steps, warmup, fraction, layers) for step in range(steps)]
    rows = [[layer < count for layer in range(layers)] for count in counts]
    return [row[::-1] for row in rows] if reverse else rows


def gated(schedule: list[list[bool]], snrs: Sequence[float], threshold: float) -> list[list[bool]]:
    """Return CanReuse(l, t) of equation 4 for each step and layer."""
    return [[may and snr > threshold for may in row] for row, snr in zip(schedule, snrs, strict=True)]


@torch.no_grad()
def layered_outputs(
    model: nn.Module, layers: list[list[nn.Module]], inputs: Calls, reuses: Callable[[int, int], bool]
) -> list[Tensor]:
    """Return the model's outputs if the modules of each layer return their last output when `reuses` is true for it."""
    outputs = []
    with ExitStack() as stack:
        caches = [stack.enter_context(ModuleCache(modules)) for modules in layers]
        for step, arguments in enumerate(inputs):
            for layer, cache in enumerate(caches):
                cache.reuse = reuses(step, layer)
            outputs.append(output(model(**arguments)))
    return outputs


class Entropies:
    """While entered, record the mean row entropy of each of these self-attentions when it runs."""

    def __init__(self, attentions: Sequence[Any]) -> None:
        self.attentions = list(attentions)
        self.seen: list[list[float]] = [[] for _ in attentions]
        self._hooks: list[Any] = []

    def __enter__(self) -> Entropies:
        for attention, seen in zip(self.attentions, self.seen, strict=True):
            self._watch(attention, seen)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, attention: Any, seen: list[float]) -> None:
        queries: list[Tensor] = []

        def keep(module: nn.Module, args: Any, query: Tensor) -> None:
            queries.append(query.double())

        def measure(module: nn.Module, args: Any, key: Tensor) -> None:  # keys are projected after queries
            seen.append(mean_row_entropy(queries.pop(), key.double(), attention.heads))

        self._hooks += [attention.to_q.register_forward_hook(keep), attention.to_k.register_forward_hook(measure)]


def mean_row_entropy(query: Tensor, key: Tensor, heads: int) -> float:
    """Equation 5 over the number of rows, by loops: query and key (B, N, heads * d)."""
    size = query.shape[-1] // heads
    total, rows = 0.0, 0
    for q, k in zip(query, key, strict=True):
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = (q[:, part] @ k[:, part].T / math.sqrt(size)).tolist()
            for row in scores:
                weights = [math.exp(score - max(row)) for score in row]
                shares = [weight / sum(weights) for weight in weights]
                total -= sum(share * math.log(share) for share in shares if share > 0)
                rows += 1
    return total / rows


# --- First-block cache ------------------------------------------------------------------------------------------------


Streams = tuple[Any, Any]  # text and latent, each a tensor or None


def streams(result: Tensor | Streams) -> Streams:
    """Return both streams from the output of a block; None for a text that it does not return."""
    return result if isinstance(result, tuple) else (None, result)


def entering(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Return the latent's stream and `encoder_hidden_states` from the arguments of a block."""
    given = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
    return list(given.values())[1], given.get("encoder_hidden_states")


@torch.no_grad()
def first_block_residuals(model: nn.Module, blocks: Sequence[nn.Module], inputs: Calls) -> list[Tensor]:
    """Return the change across the first block at each call, which no cache of later blocks affects."""
    residuals = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        residuals.append(streams(result)[1] - entering(block, args, kwargs)[0])

    hook = blocks[0].register_forward_hook(note, with_kwargs=True)
    for arguments in inputs:
        model(**arguments)
    hook.remove()
    return residuals


class Plan(NamedTuple):
    """The steps at which a first-block cache reuses, and the changes that it compared with the threshold."""

    reuses: tuple[bool, ...]
    compared: tuple[float, ...]


def change(now: Tensor, before: Tensor) -> float:
    """absmean(now - before) / absmean(before), in float64."""
    return float((now.double() - before.double()).abs().mean() / before.double().abs().mean())


def first_block_plan(
    residuals: Sequence[Tensor], threshold: float, lag: int = 0, warmup: int = 0, max_streak: int | None = None
) -> Plan:
    """Return diffusers' decisions. With `lag` 1, decisions use the change of the call before.

    diffusers has neither `warmup` (the number of first steps that compute) nor `max_streak` (the most reuses in a row).
    """
    reuses: list[bool] = []
    compared: list[float] = []
    measured: list[float | None] = []  # at each step, against the stored value from before
    kept, streak = None, 0
    for step, residual in enumerate(residuals):
        measured.append(None if kept is None else change(residual, kept))
        known = measured[step - lag] if step >= lag else None
        free = step >= warmup and (max_streak is None or streak < max_streak)
        if free and known is not None:
            compared.append(known)
        reuse = free and known is not None and known <= threshold
        reuses.append(reuse)
        kept, streak = (kept, streak + 1) if reuse else (residual, 0)
    return Plan(tuple(reuses), tuple(compared))


def balanced_threshold(residuals: Sequence[Tensor], lag: int) -> tuple[float, Plan]:
    """Return a threshold with about half of the steps reused, and no comparison closer to it than 0.5 %."""
    changes = sorted(change(a, b) for i, b in enumerate(residuals) for a in residuals[i + 1 : i + 6])
    middles = [(a + b) / 2 for a, b in zip(changes[:-1], changes[1:], strict=True)]
    plans = [(threshold, first_block_plan(residuals, threshold, lag)) for threshold in middles]
    clear = [(t, plan) for t, plan in plans if min(abs(seen / t - 1) for seen in plan.compared) > 0.005]
    return min(clear, key=lambda found: abs(sum(found[1].reuses) - len(residuals) / 2))


class FirstBlockCaching:
    """While entered, `reuse` makes the first block add the others' last change, and the others return their input."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = list(blocks)
        self.reuse = False
        self._added: Streams = (None, None)
        self._head: Streams = (None, None)

    def __enter__(self) -> FirstBlockCaching:
        first, *middle, last = self.blocks
        first.forward = self._leading(first.forward)
        for block in middle:
            block.forward = self._passing(block, block.forward)
        last.forward = self._ending(self._passing(last, last.forward))
        return self

    def __exit__(self, *_: object) -> None:
        for block in self.blocks:
            del block.forward

    def _leading(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            result = compute(*args, **kwargs)
            self._head = streams(result)
            if not self.reuse:
                return result
            text, latent = (x if add is None else x + add for x, add in zip(self._head, self._added, strict=True))
            return (text, latent) if isinstance(result, tuple) else latent

        return forward

    def _passing(self, block: nn.Module, compute: Callable[..., Any]) -> Callable[..., Any]:
        joint = "tuple" in str(inspect.signature(type(block).forward).return_annotation)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.reuse:
                return compute(*args, **kwargs)
            latent, text = entering(block, args, kwargs)
            return (text, latent) if joint else latent

        return forward

    def _ending(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            result = compute(*args, **kwargs)
            if not self.reuse:
                pairs = zip(streams(result), self._head, strict=True)
                text, latent = (None if end is None else end - head for end, head in pairs)
                self._added = text, latent
            return result

        return forward


@torch.no_grad()
def first_block_outputs(
    model: nn.Module, blocks: Sequence[nn.Module], inputs: Calls, reuses: Sequence[bool]
) -> list[Tensor]:
    """Return the model's outputs if a first-block cache reuses at these steps."""
    outputs = []
    with FirstBlockCaching(blocks) as cache:
        for arguments, reuse in zip(inputs, reuses, strict=True):
            cache.reuse = reuse
            outputs.append(output(model(**arguments)))
    return outputs
