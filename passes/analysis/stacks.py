"""Stacks: chains of blocks over one residual stream. The main stack has the most FLOPs.

A chain is found by walking a stream back from its last residual sum. The blocks of a text refiner or a control branch,
whose stream only feeds another one, are a chain of their own. A stack is the run of blocks of a chain whose streams
have counterparts before it. Double and single blocks form one stack if the walk can pass the cat and slice in between.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from torch import fx

from dit_rewrite.errors import RefusalReason
from dit_rewrite.passes.analysis.branches import Refusal
from dit_rewrite.passes.analysis.spans import Stream, block_range, is_shape_only
from dit_rewrite.passes.capture import module_paths


@dataclass(frozen=True)
class Stack:
    """The layers of the blocks of a stack, in order, and refusals for the blocks that it leaves out."""

    layers: tuple[int, ...] = ()
    refused: tuple[Refusal, ...] = ()


class Stacks:
    """Finds the stacks of a graph from its residual stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._known: dict[str | None, Stack] = {}

    def find(self, container: str | None = None) -> Stack:
        """Return the stack with the most FLOPs.

        If `container` is given, considers only blocks whose module list has a path that matches this glob pattern.
        """
        if container not in self._known:
            chains = [part for chain in self.chains for part in self._parts(chain, container)]
            layers = self._largest(chains)
            self._known[container] = Stack(layers, tuple(self._left_out(layers, chains, container)))
        return self._known[container]

    @cached_property
    def chains(self) -> list[tuple[int, ...]]:
        """For each stream, the blocks that it passes in order."""
        seen: set[fx.Node] = set()
        chains: dict[tuple[int, ...], None] = {}
        for total in sorted(self.stream.under, key=self.stream.position.__getitem__, reverse=True):
            for form in _forms(total) if total not in seen else ():
                sums = [node for node in reversed(self.stream.way(form)) if node in self.stream.under]
                seen.update(sums)
                chains[tuple(_once(self.stream.layer[node] for node in sums))] = None
        return list(chains)

    def _parts(self, chain: tuple[int, ...], container: str | None) -> Iterator[tuple[int, ...]]:
        """Yield the contiguous parts of a chain that lie in `container`."""
        for inside, part in itertools.groupby(chain, lambda layer: self._lies_in(layer, container)):
            if inside:
                yield tuple(part)

    def _lies_in(self, layer: int, container: str | None) -> bool:
        path = module_paths.container_of(self._blocks[layer])
        return container is None or (path != "" and fnmatchcase(path, container))

    @cached_property
    def _blocks(self) -> dict[int, str]:
        return {site.layer: site.block for site in self.stream.found.sites}

    @cached_property
    def _flops(self) -> dict[int, int]:
        """The FLOPs of the branches of each block, without those of other blocks inside these branches.

        A skip connection around all blocks is a branch that contains them.
        """
        sites = self.stream.found.sites
        flops = dict.fromkeys(self._blocks, 0)
        for site in sites:
            flops[site.layer] += site.flops
            if site.parent is not None:
                flops[sites[site.parent].layer] -= site.flops
        return flops

    def _largest(self, chains: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
        """Return the run of blocks of a chain that is a span and has the most FLOPs."""
        runs = {c[i:j] for c in chains for i, j in itertools.combinations(range(len(c) + 1), 2)}
        for run in sorted(runs, key=lambda run: (-sum(map(self._flops.__getitem__, run)), len(run), run)):
            if self.stream.pairs(min(run), max(run) + 1, run) is not None:
                return run
        return ()

    def _left_out(
        self, layers: Sequence[int], chains: Sequence[tuple[int, ...]], container: str | None
    ) -> Iterator[Refusal]:
        """Yield a refusal for each run of blocks outside of the stack `layers`."""
        same = {layer for chain in chains if not layers or set(chain) & set(layers) for layer in chain}
        meant = [layer for layer in sorted(self._blocks) if self._lies_in(layer, container) and layer not in layers]
        for (_, is_same), run in itertools.groupby(
            meant, lambda b: (module_paths.container_of(self._blocks[b]), b in same)
        ):
            blocks = list(run)
            reason = RefusalReason.NO_COUNTERPART if is_same else RefusalReason.OTHER_STACK
            yield Refusal("", block_range(self.stream.found, blocks[0], blocks[-1]), reason)
        if not layers and not meant:
            yield Refusal("", container or "", RefusalReason.NO_STACK)


def _once(layers: Iterable[int]) -> Iterator[int]:
    """Yield the blocks in order, without blocks that the stream enters more than once (sums outside of any block)."""
    runs = [layer for layer, _ in itertools.groupby(layers)]
    yield from (layer for layer in runs if runs.count(layer) == 1)


def _forms(total: fx.Node) -> Iterator[fx.Node]:
    """Yield the last views, casts and selections through which `total` is read, or `total` itself."""
    later = [user for user in total.users if is_shape_only(user)]
    for user in later:
        yield from _forms(user)
    if not later:
        yield total
