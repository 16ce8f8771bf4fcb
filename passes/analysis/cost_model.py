"""FLOPs and bytes of a graph and its sites, as expressions of batch, tokens, text tokens and frames."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
from torch import Tensor, fx

from dit_rewrite import torch_compat
from dit_rewrite.passes.analysis import cost
from dit_rewrite.passes.analysis.dimensions import Dimensions
from dit_rewrite.passes.analysis.graph import is_contraction
from dit_rewrite.passes.analysis.site import Part, Site

BATCH, TOKENS, TEXT_TOKENS, FRAMES, HEIGHT, WIDTH = (
    sympy.Symbol(name, integer=True, positive=True)
    for name in ("batch", "tokens", "text_tokens", "frames", "height", "width")
)
# the dimensions of a latent behind the batch that vary, by their number; a latent without a grid has tokens
_LATENT = {1: (TOKENS,), 2: (HEIGHT, WIDTH), 3: (FRAMES, HEIGHT, WIDTH)}


@dataclass(frozen=True)
class SiteCost:
    """The FLOPs that reusing a site saves, and the bytes of its values."""

    name: str
    flops: sympy.Expr
    bytes: sympy.Expr


@dataclass(frozen=True)
class CostModel:
    """The costs of one captured graph. At the captured sizes they are those of torch's FLOP counter.

    ``sizes`` has the captured size of each symbol, None if it depends on data. ``inputs`` has the shapes of the inputs
    in these symbols, which show the meaning of each; ``grid`` is the number of tokens, if they are a grid of patches.
    ``total`` counts each node once, and sites that enclose others include them. ``rest`` is outside of all sites.
    """

    sizes: Mapping[sympy.Symbol, int | None]
    inputs: Mapping[str, tuple[sympy.Expr, ...]]
    grid: sympy.Expr | None
    sites: tuple[SiteCost, ...]
    total: sympy.Expr
    rest: sympy.Expr
    nodes: Mapping[str, sympy.Expr] = field(repr=False)

    def at(self, expression: sympy.Expr, **sizes: int) -> sympy.Expr:
        """Return the value of an expression at the captured sizes, except for those that are given by name."""
        captured = {str(symbol): size for symbol, size in self.sizes.items() if size is not None}
        known = {**captured, **sizes}
        return expression.subs({s: known[str(s)] for s in expression.free_symbols if str(s) in known})


def model_costs(gm: fx.GraphModule, fixed: Collection[int], sites: Sequence[Site]) -> CostModel:
    """Return the costs of a graph. `fixed` are the positions of inputs with fixed sizes: weights and attributes."""
    graph = gm.graph
    dimensions = Dimensions(graph, fixed)
    flops = {node: _flops(node, dimensions) for node in graph.nodes if is_contraction(node)}
    named = _Names(graph, dimensions, [*flops.values()])
    nodes = {node.name: named(expression) for node, expression in flops.items()}
    by_name = {node.name: node for node in graph.nodes}
    costs = tuple(
        SiteCost(
            site.name,
            _sum(nodes, site.skipped),
            sympy.Add(*(named(_bytes(by_name[v], dimensions)) for v in site.values)),
        )
        for site in sites
        if site.part is not Part.CORE_STATE
    )
    covered = frozenset[str]().union(*(site.skipped for site in sites))
    rest = _sum(nodes, nodes.keys() - covered)
    return CostModel(named.sizes, named.inputs, named.grid, costs, _sum(nodes, nodes), rest, nodes)


def _sum(nodes: Mapping[str, sympy.Expr], names: Iterable[str]) -> sympy.Expr:
    return sympy.Add(*(nodes[name] for name in names if name in nodes))


def _flops(node: fx.Node, dimensions: Dimensions) -> sympy.Expr:
    """Return the FLOPs of a contraction, as a number if its operands' sizes cannot be followed."""
    number = sympy.Integer(cost.flops([node]))
    try:
        found = sympy.expand(cost.contraction_flops(node, dimensions.shape))
    except (AssertionError, RuntimeError):  # the formula compares sizes that are equal, but not as expressions
        return number
    return found if _depends_on_data(found, dimensions) or dimensions.at_capture(found) == number else number


def _bytes(node: fx.Node, dimensions: Dimensions) -> sympy.Expr:
    """Return the bytes of a value in a slot, which are those of the storage: of the tensor that it is a view of."""
    if not isinstance(node.meta["val"], Tensor):
        return sympy.Integer(0)
    base = _base(node)
    expression = sympy.expand(math.prod(dimensions.shape(base)) * base.meta["val"].element_size())
    stored = cost.stored_bytes(node)
    follows = _depends_on_data(expression, dimensions) or dimensions.at_capture(expression) == stored
    return expression if follows else sympy.Integer(stored)


def _depends_on_data(expression: sympy.Expr, dimensions: Dimensions) -> bool:
    return any(size is None for size in map(dimensions.captured.get, expression.free_symbols))


def _base(node: fx.Node) -> fx.Node:
    """Return the node that made the storage of a value."""
    storage, base, source = torch_compat.storage_id(node.meta["val"]), node, node
    while source.args and isinstance(source.args[0], fx.Node):
        source = source.args[0]
        value = source.meta.get("val")
        if isinstance(value, Tensor):
            if torch_compat.storage_id(value) != storage:
                break
            base = source
    return base


class _Names:
    """Replaces the symbols of inputs by the words for them. The batch is the latent's first dimension, and the latent
    is the input that has most in common with the output."""

    def __init__(self, graph: fx.Graph, dimensions: Dimensions, used: Sequence[sympy.Expr]) -> None:
        self.words: dict[sympy.Symbol, sympy.Expr] = {}
        self.sizes: dict[sympy.Symbol, int | None] = {}
        self.grid: sympy.Expr | None = None
        self._dimensions = dimensions
        symbols = frozenset[sympy.Symbol]().union(*(expression.free_symbols for expression in used))
        self._name_latent(_latent(graph, dimensions), symbols)
        self._name_others([s for s in sorted(symbols, key=str) if s not in self.words])
        shapes = {node.name: dimensions.shape(node) for node in dimensions.inputs}
        self.inputs = {
            name.removeprefix("kwargs_"): tuple(size.xreplace(self.words) for size in shape)
            for name, shape in shapes.items()
        }
        others = frozenset[sympy.Symbol]().union(*(size.free_symbols for shape in shapes.values() for size in shape))
        self.sizes.update({symbol: dimensions.captured[symbol] for symbol in others - set(self.words)})
        self._join_grid(used)

    def __call__(self, expression: sympy.Expr) -> sympy.Expr:
        return sympy.expand(expression.xreplace(self.words))

    def _name(self, symbol: sympy.Symbol, word: sympy.Symbol) -> None:
        self.words[symbol] = word
        self.sizes[word] = self._dimensions.captured[symbol]

    def _name_latent(self, latent: Sequence[sympy.Symbol], used: Collection[sympy.Symbol]) -> None:
        rest = [symbol for symbol in latent[1:] if symbol in used]
        words = _LATENT.get(len(rest), ())
        for symbol, word in zip([*latent[:1], *rest], (BATCH, *words), strict=False):
            if symbol in used:
                self._name(symbol, word)

    def _name_others(self, others: Sequence[sympy.Symbol]) -> None:
        """Name the symbols of other inputs. If there is one, it is the number of text tokens."""
        of_inputs = [symbol for symbol in others if symbol in self._dimensions.origin]
        for symbol in others:
            self._name(symbol, TEXT_TOKENS if of_inputs == [symbol] else symbol)

    def _join_grid(self, used: Sequence[sympy.Expr]) -> None:
        """Count in tokens instead of height and width, if all costs are functions of the product."""
        inverse = {word: symbol for symbol, word in self.words.items()}
        if not {HEIGHT, WIDTH} <= set(inverse):
            return
        patch = self._patch(inverse[HEIGHT]) * self._patch(inverse[WIDTH])
        words = {**self.words, inverse[HEIGHT]: TOKENS * patch / WIDTH}
        if any(WIDTH in sympy.expand(expression.xreplace(words)).free_symbols for expression in used):
            return
        height, width = self.sizes.pop(HEIGHT), self.sizes.pop(WIDTH)
        self.words, self.sizes[TOKENS] = words, int((height or 0) * (width or 0) / patch)
        self.grid = HEIGHT * WIDTH / patch

    def _patch(self, length: sympy.Symbol) -> sympy.Expr:
        """Return the largest number that the graph divides a length of the latent by."""
        factors = (factor for dimension in self._dimensions.all for factor in dimension)
        quotients = (length / self._dimensions.resolved(factor.expression) for factor in factors)
        return max((q for q in quotients if q.is_number), default=sympy.Integer(1))


def _latent(graph: fx.Graph, dimensions: Dimensions) -> list[sympy.Symbol]:
    """Return the symbols of the latent's dimensions, after all equalities, without those that are fixed."""
    returned = [n for n in graph.output_node().all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    read = frozenset[sympy.Symbol]().union(*(e.free_symbols for n in returned for e in dimensions.shape(n)))
    shapes = [[e for e in dimensions.shape(node) if isinstance(e, sympy.Symbol)] for node in dimensions.inputs]
    return max(shapes, key=lambda symbols: len(read & set(symbols)), default=[])
