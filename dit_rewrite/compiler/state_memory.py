"""The memory that the states of blockwise attention take, and whether it fits on the device."""

from __future__ import annotations

import os
from collections.abc import Collection

import torch
from torch import fx

from dit_rewrite.compiler.attention_codecs import Blockwise
from dit_rewrite.errors import StatesTooLarge
from dit_rewrite.kernels.blockwise_attention import state_bytes
from dit_rewrite.passes.analysis.attention_sites import arguments
from dit_rewrite.passes.analysis.cost import shape

SHARE = 0.5  # of the device's memory; the model and its activations need the rest


def require_room(cores: Collection[tuple[Blockwise, fx.Node]]) -> None:
    """Raise StatesTooLarge if the states of these attention ops take more than `SHARE` of the memory of their device.

    A state stores a partial output for each block of keys, so small blocks need many times the size of the outputs.
    """
    if not cores:
        return
    needed = sum(_bytes(codec, core) for codec, core in cores)
    device = next(core.meta["val"].device for _, core in cores)
    memory = device_memory(device)
    if needed > SHARE * memory:
        raise StatesTooLarge(
            sites=len(cores),
            needed=f"{needed / 2**30:.1f} GiB",
            share=f"{SHARE:.0%}",
            memory=f"{memory / 2**30:.1f} GiB",
            device=device,
            blocks=min(codec.block for codec, _ in cores),
        )


def _bytes(codec: Blockwise, core: fx.Node) -> int:
    given = arguments(core)
    query, key = (given[name].meta["val"] for name in ("query", "key"))
    dtype = torch.float32 if query.dtype is torch.float64 else query.dtype
    options = {"kv_static": codec.kv_static, "keep": codec.keep, "own_queries": codec.own_queries}
    return state_bytes(shape(query), shape(key), dtype, codec.block, **options)  # type: ignore[arg-type]


def device_memory(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
