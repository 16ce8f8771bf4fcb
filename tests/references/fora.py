"""FORA as described in its paper, implemented by replacing the forward of modules, to compare compiled models with it.

The code is written from the paper alone (cache[Attn][k] and cache[MLP][k] are filled every N steps and returned in
between) and shares no code with the compiler. A module whose output is a branch's value returns the output of the last
computed step at the other steps. Norms, modulations, gates and residual sums of the model run at every step.

The place of the value: the compiler caches a branch's summand without gates (factors that do not depend on the residual
stream), casts, constant factors and views. Any other op between a module and the sum is part of the value. Caching
before or after such an op gives the same bits if its other inputs are the same at every step of a trajectory, which is
true for weights and not for gates and modulations. Therefore:

* `Attention` of diffusers divides its projection by a constant 1.0, `FeedForward` ends in a dropout: inside the module.
* DiT, PixArt, SD3, FLUX, CogVideoX, Latte, STDiT: gate * module(...), or no gate (all cross-attentions). The module's
  output is the value, up to views (Latte and STDiT fold frames into the batch, CogVideoX cuts its MLP's output into
  text and video).
* Wan: `attn * gate` and `ffn.float() * gate` with float32 gates: the module's output is the value, before the cast.
* OmniGen: no gates and no norm after: the module's output is the summand.
* Mochi: the summand is norm2(attn, tanh(gate)) = cast(rms(float(attn)) * tanh(gate)). The gate changes at every step
  and is applied inside norm2, so norm2's output must not be cached. The value is the inner `rms`, in float32, and that
  module is the one replaced: norm2.norm and norm4.norm, norm2_context.norm and norm4_context.norm for the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from tests.helpers.models import output


class ModuleCache:
    """While entered, the modules return their last output instead of computing if `reuse` is set."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self.reuse = False
        self._outputs: dict[nn.Module, Any] = {}

    def __enter__(self) -> ModuleCache:
        for module in self.modules:
            module.forward = self._caching(module, module.forward)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module in self.modules:
            del module.forward  # the class's own forward is visible again
        self._outputs.clear()

    def _caching(self, module: nn.Module, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.reuse:
                self._outputs[module] = compute(*args, **kwargs)
            return self._outputs[module]

        return forward


def get(module: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at a dotted path, or None if the block does not have it."""
    current: Any = module
    for name in path.split("."):
        current = getattr(current, name, None)
    return cast("nn.Module | None", current)


def each(blocks: nn.Module, *paths: str) -> list[nn.Module]:
    """Return these submodules of all blocks that have them."""
    found = [get(block, path) for block in blocks.children() for path in paths]
    return [module for module in found if module is not None]


def dit_modules(model: Any) -> list[nn.Module]:
    """Self-attention and MLP."""
    return each(model.transformer_blocks, "attn1", "ff")


def pixart_modules(model: Any) -> list[nn.Module]:
    """Self-attention, cross-attention and MLP."""
    return each(model.transformer_blocks, "attn1", "attn2", "ff")


def sd3_modules(model: Any) -> list[nn.Module]:
    """Joint attention, which returns both streams' values; an MLP per stream, the last block has none for text."""
    return each(model.transformer_blocks, "attn", "ff", "ff_context")


def flux_modules(model: Any) -> list[nn.Module]:
    """As SD3; in single blocks, the projection of cat(attention, MLP) before the gate."""
    return sd3_modules(model) + each(model.single_transformer_blocks, "proj_out")


def cogvideox_modules(model: Any) -> list[nn.Module]:
    """Joint attention, and one MLP over the tokens of both streams."""
    return each(model.transformer_blocks, "attn1", "ff")


def latte_modules(model: Any) -> list[nn.Module]:
    """Spatial blocks as PixArt's; temporal blocks have no cross-attention (their attn2 is None)."""
    return pixart_modules(model) + each(model.temporal_transformer_blocks, "attn1", "attn2", "ff")


def mochi_modules(model: Any) -> list[nn.Module]:
    """The parameterless norms after attention and MLP, inside the modules that also apply the gate."""
    video = each(model.transformer_blocks, "norm2.norm", "norm4.norm")
    text = [block for block in model.transformer_blocks if not block.context_pre_only]  # the last block has no text
    return video + each(nn.ModuleList(text), "norm2_context.norm", "norm4_context.norm")


def omnigen_modules(model: Any) -> list[nn.Module]:
    """Self-attention and MLP."""
    return each(model.layers, "self_attn", "mlp")


def wan_modules(model: Any) -> list[nn.Module]:
    """Self-attention, cross-attention and MLP."""
    return each(model.blocks, "attn1", "attn2", "ffn")


def stdit_modules(model: Any) -> list[nn.Module]:
    """Spatial and temporal self-attention, cross-attention and MLP."""
    return each(model.blocks, "attn", "attn_temp", "cross_attn", "mlp")


def broken_modules(model: Any) -> list[nn.Module]:
    """Self-attention and MLP."""
    return each(model.blocks, "attn", "mlp")


MODULES: dict[str, Callable[[Any], list[nn.Module]]] = {
    "dit": dit_modules,
    "pixart_alpha": pixart_modules,
    "pixart_sigma": pixart_modules,
    "sd3": sd3_modules,
    "flux": flux_modules,
    "cogvideox": cogvideox_modules,
    "latte": latte_modules,
    "mochi": mochi_modules,
    "omnigen": omnigen_modules,
    "wan": wan_modules,
    "stdit": stdit_modules,
    "broken_blocks": broken_modules,
}
"""For each case, the modules whose output is a branch's value."""


def computes(step: int, steps: int, interval: int, anchor: str) -> bool:
    """Return whether FORA computes at a step.

    "start" counts from the first step. "paper" is the published source, which counts t down from steps - 1 to 0: it
    computes at the first step and if t is a multiple of the interval.
    """
    if anchor == "start":
        return step % interval == 0
    if anchor == "paper":
        return step == 0 or (steps - 1 - step) % interval == 0
    raise ValueError(f"unknown anchor {anchor!r}: 'start' or 'paper'")


@torch.no_grad()
def fora_outputs(
    case_name: str, model: nn.Module, inputs: list[dict[str, Any]], interval: int, anchor: str = "start"
) -> list[Tensor]:
    """Return the model's output at each step of a trajectory under FORA."""
    outputs = []
    with ModuleCache(MODULES[case_name](model)) as cache:
        for step, arguments in enumerate(inputs):
            cache.reuse = not computes(step, len(inputs), interval, anchor)
            outputs.append(output(model(**arguments)))
    return outputs
