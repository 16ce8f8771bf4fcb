"""Why the captured graphs of a model have no site: hooks or graph breaks cut its blocks into pieces, or it has none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from dit_rewrite.compiler.backend import Rewritten
from dit_rewrite.errors import BrokenUp, NoSites


def why_no_sites(model: nn.Module, graphs: Sequence[Rewritten], breaks: Mapping[str, int]) -> NoSites:
    """The error for graphs without a site, where Dynamo broke the model at the places that `breaks` counts."""
    name = type(model).__name__
    refused = [f"{p.path or p.node}: {p.reason}" for rewritten in graphs for p in rewritten.found.refused]
    if refused or not breaks:
        return NoSites(name, refused)
    return BrokenUp(name, len(graphs), breaks, hooks_within(model))


def hooks_within(model: nn.Module) -> Counter[str]:
    """The classes of the hooks that accelerate and diffusers have put around the submodules, and how often."""
    found: Counter[str] = Counter()
    for module in model.modules():
        if module is not model:
            registry = getattr(module, "_diffusers_hook", None)
            hooks = [getattr(module, "_hf_hook", None), *getattr(registry, "hooks", {}).values()]
            found.update(type(hook).__name__ for hook in hooks if hook is not None)
    return found
