"""The denoisers that a search runs: one module, or a ModuleDict with those of a pipeline that has several.

Several denoisers, such as the experts of Wan 2.2, run under one policy, and share the steps of one schedule. Each has
the values of its own steps alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dit_rewrite.compile import compile
from dit_rewrite.errors import BadParameter
from dit_rewrite.module import twin
from dit_rewrite.policy.plan import fingerprint


def parts_of(model: nn.Module) -> dict[str, Any]:
    """Return the denoisers by the names of their components; one alone has the name ""."""
    return dict(model.items()) if isinstance(model, nn.ModuleDict) else {"": model}


def mapped(model: nn.Module, make: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """Return a denoiser, or several, with each replaced by `make` of its name and itself."""
    found = {name: make(name, part) for name, part in parts_of(model).items()}
    return nn.ModuleDict(found) if isinstance(model, nn.ModuleDict) else found[""]


def rewritten(model: nn.Module, policy: Any, backend: Any) -> Any:
    """Return copies of the denoisers that are compiled with a policy."""
    return mapped(model, lambda _, part: compile(twin(part), policy, backend=backend))


def identity(where: str, model: nn.Module) -> str:
    """Return the fingerprint of the denoisers. Raises BadParameter if they differ, as no policy is for both then."""
    first, *others = {fingerprint(part) for part in parts_of(model).values()}
    if others:
        allowed = "a pipeline whose denoisers have one structure, or one of its denoisers with a sampler"
        raise BadParameter(where, "model", ", ".join(parts_of(model)), allowed)
    return first
