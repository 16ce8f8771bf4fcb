"""Find out why a model's graphs have no site: hooks or graph breaks split its blocks, or it has no residual branch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from dit_rewrite.compiler.rewritten import Rewritten
from dit_rewrite.errors import BrokenUp, NoSites


def why_no_sites(model: nn.Module, graphs: Sequence[Rewritten], breaks: Mapping[str, int]) -> NoSites:
    """Return the error for graphs without sites. `breaks` counts Dynamo's graph breaks by location."""
    name = type(model).__name__
    refused = [f"{p.path or p.node}: {p.reason}" for rewritten in graphs for p in rewritten.found.refused]
    if refused or not breaks:
        return NoSites(name, refused)
    return BrokenUp(name, len(graphs), breaks, hooks_within(model))


def hooks_within(model: nn.Module) -> Counter[str]:
    """Count the hooks of accelerate and diffusers around the submodules, by class."""
    found: Counter[str] = Counter()
    for module in model.modules():
        if module is not model:
            registry = getattr(module, "_diffusers_hook", None)
            hooks = [getattr(module, "_hf_hook", None), *getattr(registry, "hooks", {}).values()]
            found.update(type(hook).__name__ for hook in hooks if hook is not None)
    return found
