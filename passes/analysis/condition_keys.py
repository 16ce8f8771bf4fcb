"""Which keys of an attention belong to the condition, where image and condition are concatenated to one sequence.

A part of a cat belongs to the condition if, without passing through an attention op, it is computed from a tensor of
the conditioning and from no input that changes from step to step except numbers per sample, such as the timestep. So
the text stream of a joint attention is found in each layer, although its values depend on the image through earlier
layers, and so are the text tokens at the entry of a single stream.

That the tokens are in the same order at the cat and at the attention is not proven. It decides only which blocks may be
kept, and these are kept by their own measured change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from torch import Tensor, fx

from dit_rewrite.passes.analysis.attention_sites import arguments, concatenations
from dit_rewrite.passes.capture import opaque_attention

Range = tuple[int, int]  # the first token, and the number of tokens


def condition_keys(core: fx.Node, static: Collection[int], conditioning: Collection[int]) -> Range | None:
    """Return which keys belong to the condition, or None if the graph does not show it for keys and values alike.

    `static` and `conditioning` are the positions of weights and of the conditioning among the inputs of the graph.
    """
    placeholders = core.graph.find_nodes(op="placeholder")
    given = {node for i, node in enumerate(placeholders) if i in conditioning and _dims(node) > 1}
    moving = {node for i, node in enumerate(placeholders) if i not in static and i not in conditioning}
    image = {node for node in moving if _dims(node) > 1}
    found = {_condition_tokens(arguments(core)[name], given, image) for name in ("key", "value")}
    return found.pop() if len(found) == 1 else None


def _condition_tokens(node: fx.Node, given: set[fx.Node], image: set[fx.Node]) -> Range | None:
    """Return the longest run of parts of the condition in the nearest cat of all tokens of `node`."""
    tokens = node.meta["val"].shape[2]
    for dim, parts in concatenations(node):
        sizes = [part.meta["val"].shape[dim] for part in parts]
        between = 0 < dim < parts[0].meta["val"].ndim - 1  # not the batch, and not the channels
        if not between or not all(type(size) is int for size in (*sizes, tokens)) or sum(sizes) != tokens:
            continue
        is_condition = [bool(inputs & given) and not inputs & image for inputs in map(_inputs, parts)]
        runs = _runs(sizes, is_condition)
        if runs and not all(is_condition):
            return max(runs, key=lambda run: run[1])
    return None


def _runs(sizes: Sequence[int], chosen: Sequence[bool]) -> list[Range]:
    """Return the runs of neighbouring parts that are chosen."""
    runs: list[Range] = []
    first = 0
    for size, is_chosen in zip(sizes, chosen, strict=True):
        if is_chosen and runs and sum(runs[-1]) == first:
            runs[-1] = (runs[-1][0], runs[-1][1] + size)
        elif is_chosen:
            runs.append((first, size))
        first += size
    return runs


def _inputs(node: fx.Node) -> set[fx.Node]:
    """Return the inputs of the graph that `node` depends on without passing through an attention op."""
    waiting, seen = deque([node]), {node}
    while waiting:
        node = waiting.popleft()
        new = [] if node.target is opaque_attention.OP else [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        waiting.extend(new)
    return {node for node in seen if node.op == "placeholder"}


def _dims(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.ndim if isinstance(value, Tensor) else 0
