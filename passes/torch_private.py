"""Every private API of torch that the passes need, each behind a small function.

torch may rename one in any release. Then the function raises TorchChanged, and never answers by a silent default: a
graph in part would count as whole, a weight as data, an assumed size as checked.
"""

from __future__ import annotations

import sympy
from torch import SymInt, Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols


def unbacked_input(size: SymInt) -> SymInt:
    """A new symbol, within the bounds of `size`, for an input's size that data decide.

    As torch does for what `mark_unbacked` marks: only so may other symbols be replaced by it.
    """
    shape_env = size.node.shape_env
    with shape_env.ignore_fresh_unbacked_symbols():
        fresh = shape_env.create_unbacked_symint()
    lower, upper = value_bounds(size)
    constrain = shape_env._constrain_range_for_size if lower >= 0 else shape_env.constrain_symbol_range
    constrain(fresh.node.expr, lower, upper)
    shape_env.unbacked_inputs.add(fresh.node.expr)
    return fresh


def value_bounds(size: SymInt) -> tuple[sympy.Expr, sympy.Expr]:
    """The least and the largest value that a size can have."""
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    return bounds.lower, bounds.upper


def unbacked_symbols(value: object) -> frozenset[sympy.Symbol]:
    """The symbols of sizes that data decide, in a number or in a tensor's shape and strides."""
    return frozenset(free_unbacked_symbols(value) if isinstance(value, (SymInt, Tensor)) else ())  # type: ignore[arg-type]
