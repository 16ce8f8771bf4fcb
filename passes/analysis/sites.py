"""Find sites: group the branches of a functional graph that must be reused together.

Sites are found by the structure of the graph, never by the class of the model.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import defaultdict

import networkx as nx
from torch import fx

from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis.branches import Branch, Refusal, find_branches, summands
from dit_rewrite.passes.analysis.graph import Dependence, aten, operands, packet
from dit_rewrite.passes.analysis.site import Found, Kind, Part, Site, close
from dit_rewrite.passes.analysis.trajectory_invariant import invariant_values, storage
from dit_rewrite.passes.capture import module_paths, opaque_attention

__all__ = ["Found", "Kind", "Part", "Site", "find_sites"]


def find_sites(
    gm: fx.GraphModule, static: frozenset[int] = frozenset(), conditioning: frozenset[int] = frozenset()
) -> Found:
    """Return the sites of a functional graph, in graph order, and the refused places.

    `static` are the positions of parameters and buffers among the placeholders, `conditioning` those of other
    trajectory-invariant inputs. A branch that is hoisted, because it depends on these inputs alone, is refused.
    """
    dependence = Dependence(gm.graph, static)
    invariant = invariant_values(gm.graph, static | conditioning)
    branches, refused = find_branches(gm.graph, dependence)
    moved = {
        branch.value for branch in branches if any(dependence.depends(v, storage(branch.value)) for v in invariant)
    }
    groups, entangled = _group(dependence, [branch for branch in branches if branch.value not in moved])
    refused.update({value: Refusal.of(value, RefusalReason.TRAJECTORY_INVARIANT) for value in moved})
    refused.update({branch.value: Refusal.of(branch.value, RefusalReason.ENTANGLED) for branch in entangled})
    return Found(_describe(gm.graph, dependence, groups), tuple(refused.values()))


def _group(dependence: Dependence, branches: list[Branch]) -> tuple[list[tuple[Branch, ...]], list[Branch]]:
    """Group branches that share a contraction and do not contain one another.

    Such branches are the modalities of joint attention, or slices of one projection. To reuse only one of them would
    still compute the contraction. Also returns the branches of groups that were split again, because the value of one
    branch is an input of another.
    """
    sharing: dict[fx.Node, list[int]] = defaultdict(list)
    for i, branch in enumerate(branches):
        for contraction in dependence.contractions(branch.region):
            sharing[contraction].append(i)
    together: nx.Graph[int] = nx.empty_graph(len(branches))
    for indices in sharing.values():
        pairs = [(branches[i], branches[j], i, j) for i, j in itertools.combinations(indices, 2)]
        together.add_edges_from(
            (i, j) for a, b, i, j in pairs if not (_reads(dependence, a, b) or _reads(dependence, b, a))
        )
    groups = [tuple(branches[i] for i in sorted(component)) for component in nx.connected_components(together)]
    apart = _waiting_for_themselves(dependence, groups)
    entangled = [branch for i in sorted(apart) for branch in groups[i]]
    return [group for i, group in enumerate(groups) if i not in apart] + [(b,) for b in entangled], entangled


def _reads(dependence: Dependence, a: Branch, b: Branch) -> bool:
    """Return whether the value of `a` is computed from the value of another branch `b`."""
    return a is not b and dependence.depends(a.value, b.value)


def _waiting_for_themselves(dependence: Dependence, groups: list[tuple[Branch, ...]]) -> set[int]:
    """Return the groups that cannot be computed at one place, because a path leads from a group back into it."""
    indices = range(len(groups))
    waits: nx.DiGraph[int] = nx.DiGraph(
        (i, j)
        for i, j in itertools.product(indices, indices)
        if any(_reads(dependence, a, b) for a in groups[i] for b in groups[j])
    )
    cycles = [c for c in nx.strongly_connected_components(waits) if len(c) > 1 or waits.has_edge(*c, *c)]
    return {i for cycle in cycles for i in cycle}


def _kinds(dependence: Dependence, groups: list[tuple[Branch, ...]]) -> list[Kind]:
    """Return the kind of each group, from its own nodes and from the groups inside it, which precede it."""
    regions = [functools.reduce(operator.or_, (branch.region for branch in group)) for group in groups]
    values = [dependence.mask(branch.value for branch in group) for group in groups]
    kinds: list[Kind] = []
    for i, group in enumerate(groups):
        inside = [j for j in range(i) if values[j] & ~regions[i] == 0]
        taken = functools.reduce(operator.or_, (regions[j] for j in inside), 0)
        found = {kinds[j] for j in inside}
        if dependence.contractions(regions[i] & ~taken):
            found.add(_kind(dependence, group, taken))
        kinds.append(_together(found))
    return kinds


def _together(kinds: set[Kind]) -> Kind:
    """Return the kind of a site that contains branches of all `kinds`."""
    if len(kinds) > 1 and kinds & {Kind.MLP, Kind.PARALLEL}:
        return Kind.PARALLEL
    return next(kind for kind in (Kind.JOINT, Kind.SELF, Kind.CROSS, Kind.MLP, Kind.PARALLEL) if kind in kinds)


def _kind(dependence: Dependence, group: tuple[Branch, ...], taken: int) -> Kind:
    """Return the kind of a group, without the nodes in `taken`, which belong to groups inside it."""
    own = dependence.members(dependence.mask(core for branch in group for core in branch.cores) & ~taken)
    cores = [(core, branch) for branch in group for core in branch.cores if core in own]
    if not cores:
        return Kind.MLP
    if any(_joins_attention_with_mlp(dependence, branch) for branch in group):
        return Kind.PARALLEL
    if len({branch.stream for branch in group}) > 1:
        return Kind.JOINT
    return _together({_core_kind(dependence, core, branch) for core, branch in cores})


def _core_kind(dependence: Dependence, core: fx.Node, branch: Branch) -> Kind:
    """Return SELF if keys and values come from the stream, CROSS if from a condition, JOINT if a cat joins both."""
    keys = operands(core)[1:] if core.target is opaque_attention.OP else operands(core)
    if not all(dependence.depends(key, branch.stream) for key in keys):
        return Kind.CROSS
    for key in keys:
        for cat in _cats(dependence, dependence.between(branch.stream, key)):
            others = [p for p in cat.all_input_nodes if not dependence.depends(p, branch.stream)]
            if any(dependence.is_data(part) for part in others):
                return Kind.JOINT
    return Kind.SELF


def _joins_attention_with_mlp(dependence: Dependence, branch: Branch) -> bool:
    """Return whether a cat in the branch, or the sum that is its value, joins an attention with an MLP."""

    def from_core(node: fx.Node) -> bool:
        return any(dependence.depends(node, core) for core in branch.cores)

    joined = [cat.all_input_nodes for cat in _cats(dependence, branch.region)]
    joined += [list(summands(branch.value))] if packet(branch.value) is aten.add else []
    for inputs in joined:
        parts = [part for part in inputs if dependence.depends(part, branch.stream)]
        beside = [part for part in parts if not from_core(part)]
        projected = any(dependence.contractions(dependence.between(branch.stream, part)) for part in beside)
        if projected and len(beside) < len(parts):
            return True
    return False


def _cats(dependence: Dependence, region: int) -> list[fx.Node]:
    return [node for node in dependence.members(region) if packet(node) is aten.cat]


def _describe(graph: fx.Graph, dependence: Dependence, groups: list[tuple[Branch, ...]]) -> tuple[Site, ...]:
    """Return a site for each group, in the order of their last values."""
    groups = sorted(groups, key=lambda g: max(dependence.position[b.value] for b in g))
    kinds = _kinds(dependence, groups)
    paths = [module_paths.common_path(_own_contractions(dependence, group)) for group in groups]
    blocks = [module_paths.block_of(path) for path in paths]
    layers = {block: i for i, block in enumerate(dict.fromkeys(blocks))}
    names = module_paths.unique([path or f"branch_{i}" for i, path in enumerate(paths)])
    sites = [
        Site(
            name=names[i],
            kind=kinds[i],
            values=tuple(branch.value.name for branch in group),
            streams=tuple(branch.stream.name for branch in group),
            block=blocks[i],
            layer=layers[blocks[i]],
            sums=tuple(branch.total.name for branch in group),
        )
        for i, group in enumerate(groups)
    ]
    return close(graph, sites)


def _own_contractions(dependence: Dependence, group: tuple[Branch, ...]) -> list[fx.Node]:
    return [node for branch in group for node in dependence.contractions(branch.region)]
