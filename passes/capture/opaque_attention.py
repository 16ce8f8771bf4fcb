"""Keep attention cores whole: scaled dot product attention as one opaque op between Dynamo and lowering.

AOTAutograd decomposes SDPA by backend and mask. A marker op with the same signature passes through it, with the
strides that SDPA itself would give, and is turned back before the graph is lowered, so that Inductor treats it as ever.
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
    """SDPA stands in autocast's list of low-precision ops, so its marker casts its operands likewise."""

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
    """Replace each SDPA in Dynamo's graph (and in its subgraphs) by the marker; the number replaced."""
    return _swap(gm, F.scaled_dot_product_attention, OP)


def unmark(gm: fx.GraphModule) -> int:
    """Turn each marker back into SDPA, before lowering; the number replaced."""
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
