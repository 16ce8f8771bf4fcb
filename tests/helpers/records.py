"""Values of a plain run of a denoiser at each step, recorded by hooks, and thresholds that split its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass
class Records:
    """For each step: the latent, the output, the modulated input of the first attention, and the stream.

    The stream is recorded before the first block (index 0) and after each block.
    """

    latents: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    modulated: list[Tensor] = field(default_factory=list)
    streams: list[list[Tensor]] = field(default_factory=list)


@torch.no_grad()
def record(model: nn.Module, body: Any, inputs: Sequence[Mapping[str, Any]], latent: str = "hidden_states") -> Records:
    """Record a run of the untouched model; `body` contains its blocks."""
    records = Records()

    def enter(block: nn.Module, args: tuple[Any, ...]) -> None:
        records.streams.append([args[0].double()])

    def attend(attention: nn.Module, args: tuple[Any, ...]) -> None:
        records.modulated.append(args[0].double())

    def leave(block: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
        records.streams[-1].append(result.double())

    first = body.blocks[0]
    hooks = [first.register_forward_pre_hook(enter), first.attn.register_forward_pre_hook(attend)]
    hooks += [block.register_forward_hook(leave) for block in body.blocks]
    for arguments in inputs:
        records.latents.append(arguments[latent].double())
        records.outputs.append(model(**arguments).double())
    for hook in hooks:
        hook.remove()
    return records


def relative(now: Tensor, before: Tensor) -> float:
    """Return the mean absolute change divided by the mean absolute earlier value."""
    return float((now - before).abs().mean() / before.abs().mean())


class Decided(NamedTuple):
    """A letter for each step, and the values that were compared with the threshold."""

    row: str
    compared: list[float]


def splitting(decide: Callable[[float], Decided]) -> tuple[float, str]:
    """Return a threshold with about half of the steps reused that is not close to any compared value."""
    largest = max(decide(-1.0).compared)
    found = [(t, decide(t)) for t in (largest * 8 * 0.93**i for i in range(80))]
    clear = [(t, d.row) for t, d in found if all(abs(seen / t - 1) > 0.005 for seen in d.compared)]
    return min(clear, key=lambda pair: abs(pair[1].count("R") - len(pair[1]) / 2))
