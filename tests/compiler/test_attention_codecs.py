"""The codecs of attention: which blocks are chosen, what is refused on a GPU, and states that do not fit in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from dit_rewrite.compiler import state_memory
from dit_rewrite.compiler.attention_codecs import Blockwise, blockwise, codec
from dit_rewrite.compiler.state_memory import SHARE, require_room
from dit_rewrite.errors import RefusalReason, StatesTooLarge
from dit_rewrite.kernels.blockwise_attention import block_size, state_bytes
from dit_rewrite.passes.capture import opaque_attention
from dit_rewrite.policy.strategies import BlockwiseReuse

QUERY = (2, 3, 4096, 64)


def attention(keys: int, device: str = "cpu") -> fx.Node:
    """An attention op on bfloat16 tensors of a device that need not be there."""
    graph = fx.Graph()
    shapes = {"q": QUERY, "k": (*QUERY[:2], keys, 64), "v": (*QUERY[:2], keys, 64)}
    with FakeTensorMode():
        values = {name: torch.empty(shape, dtype=torch.bfloat16, device=device) for name, shape in shapes.items()}
    nodes = [graph.placeholder(name) for name in shapes]
    core = graph.call_function(opaque_attention.OP, tuple(nodes))
    for node, value in zip((*nodes, core), (*values.values(), values["q"]), strict=True):
        node.meta["val"] = value
    return core


@pytest.mark.parametrize(
    ("keys", "static", "block"),
    [(120, True, 120), (1024, True, 1024), (300, False, 300), (4096, False, 512), (16384, False, 2048)],
)
def test_the_block_follows_from_the_shape(keys: int, static: bool, block: int) -> None:
    """Constant keys are one block, those that move at most eight of 512 or more; a given block stays."""
    assert block_size(keys, static) == block
    for given, found in ((None, block), (64, 64), (10**6, keys)):
        chosen = codec(BlockwiseReuse(0.1, given), attention(keys), None, static, True)
        assert isinstance(chosen, Blockwise) and (chosen.block, chosen.kv_static) == (found, static)


def test_moving_keys_are_refused_on_a_gpu() -> None:
    core = attention(4096, "cuda")
    assert codec(BlockwiseReuse(0.1), core, None, False, True) is RefusalReason.MOVING_KEYS_ON_CUDA
    assert isinstance(codec(BlockwiseReuse(0.1), core, None, True, True), Blockwise)


def test_blocks_of_a_condition() -> None:
    """They are chosen among its keys, and equation 14 is allowed; a condition that is not found is refused."""
    core, paper = attention(4096), BlockwiseReuse(0.1, None, "paper", keys="condition")
    for given, found in ((None, 300), (64, 64), (10**6, 300)):
        chosen = blockwise(replace(paper, block=given), core, False, True, (3796, 300))
        assert isinstance(chosen, Blockwise) and (chosen.block, chosen.keep, chosen.kv_static) == (found, 300, False)
    constant = blockwise(paper, core, True, True, None)
    assert isinstance(constant, Blockwise) and constant.keep is None
    assert blockwise(paper, core, False, True, None) is RefusalReason.NO_CONDITION_KEYS
    assert codec(paper, core, None, False, True) is RefusalReason.NO_CONDITION_KEYS
    assert codec(replace(paper, keys="all"), core, None, False, True) is RefusalReason.MOVING_KEYS
    on_gpu = blockwise(paper, attention(4096, "cuda"), False, True, (0, 300))
    assert on_gpu is RefusalReason.MOVING_KEYS_ON_CUDA


def test_the_conditions_keys_come_first() -> None:
    """Keys, values and the columns of a mask are moved together; a mask with one column stays."""
    order = Blockwise(BlockwiseReuse(0.1), 2, None, False, (3, 2))
    key = torch.arange(6.0).expand(1, 1, 6).unsqueeze(-1)
    for mask, columns in ((torch.arange(6)[None], [3, 4, 0, 1, 2, 5]), (torch.tensor([[1]]), [1])):
        _, keys, values, seen = order._in_order((key, key, -key, mask))
        assert keys.flatten().tolist() == (-values).flatten().tolist() == [3, 4, 0, 1, 2, 5]
        assert seen is not None and seen.flatten().tolist() == columns


def test_states_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the size, the share, the memory and the block; at exactly the share there is none."""
    core = attention(4096)
    chosen = codec(BlockwiseReuse(0.1, 64), core, None, True, True)
    assert isinstance(chosen, Blockwise)
    needed = 2 * state_bytes(QUERY, QUERY, torch.bfloat16, 64)
    monkeypatch.setattr(state_memory, "device_memory", lambda _: round(needed / SHARE))
    require_room([])
    require_room([(chosen, core)] * 2)
    with pytest.raises(StatesTooLarge, match=rf"3 sites .* {1.5 * needed / 2**30:.1f} GiB .* 50% .* than 64 keys"):
        require_room([(chosen, core)] * 3)


def test_the_memory_of_this_machine() -> None:
    assert state_memory.device_memory(torch.device("cpu")) > 2**28
