"""Which inputs of a denoiser are the latent, the timestep and the conditioning."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level")


@dataclass(frozen=True)
class Inputs:
    """The inputs of one call: the first tensor is the latent, the timestep goes by name, the rest is conditioning."""

    latent: Tensor | None
    timestep: Tensor | float | None
    conditioning: tuple[Tensor, ...]


class Reader:
    """Sorts the arguments of a forward into Inputs."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        parameters = inspect.signature(forward).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._names = [p.name for p in parameters if p.kind in positional]

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
        """The inputs of a call, in the order of the forward's parameters."""
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        values = [*args, *(kwargs[n] for n in self._names if n in kwargs)]
        values += [value for name, value in kwargs.items() if name not in self._names]
        timestep = next((named[name] for name in TIMESTEP_NAMES if named.get(name) is not None), None)
        leaves = [leaf for value in values for leaf in _tensors(value) if leaf is not timestep]
        return Inputs(leaves[0] if leaves else None, timestep, tuple(leaves[1:]))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple, dict)):
        return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return []
