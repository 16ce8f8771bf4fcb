"""Represent scaled dot product attention (SDPA) by one opaque op between Dynamo and lowering.

AOTAutograd decomposes SDPA depending on backend and mask. It does not decompose this marker op, which has the same
signature and whose result has the strides of SDPA's. Before lowering, the marker is replaced by SDPA again, so that
Inductor compiles it as in an untouched model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dit_rewrite import torch_compat

_SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, *, float? scale=None, bool enable_gqa=False) -> Tensor"
)
_library = torch.library.Library("dit_rewrite", "DEF")
_library.define(_SCHEMA)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)  # type: ignore[arg-type]


def _autocast(device: str) -> None:
    """Register a kernel that casts the operands under autocast, as autocast does for SDPA."""

    def kernel(*args: object, **kwargs: object) -> Tensor:
        dtype = torch.get_autocast_dtype(device.lower())

        def cast(value: object) -> object:
            eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype) if eligible else value  # type: ignore[attr-defined]

        with torch_compat.without_autocast_key(device):
            return OP(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    _library.impl("attention", kernel, f"Autocast{device}")


_library.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("dit_rewrite::attention", _attention, lib=_library)
OP = torch.ops.dit_rewrite.attention.default
for _device in ("CPU", "CUDA"):
    _autocast(_device)


def mark(gm: fx.GraphModule) -> int:
    """Replace each SDPA call in `gm` and its subgraphs by the marker op. Returns the number of replaced calls."""
    return _swap(gm, F.scaled_dot_product_attention, OP)


def unmark(gm: fx.GraphModule) -> int:
    """Replace each marker op in `gm` and its subgraphs by SDPA. Returns the number of replaced calls."""
    return _swap(gm, OP, F.scaled_dot_product_attention)


def _swap(gm: fx.GraphModule, old: Any, new: Any) -> int:
    count = 0
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.find_nodes(op="call_function", target=old):
            node.target = new
            count += 1
        module.recompile()
    return count
