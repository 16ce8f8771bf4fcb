"""Strategies inside attention that are refused, with the reason, or do not fit."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from dit_rewrite import BlockwiseReuse, Policy, Rule, ShareGuidance, WindowResidual
from dit_rewrite.compiler import state_memory
from dit_rewrite.errors import BadOpArgument, RefusalReason, StatesTooLarge
from dit_rewrite.guards import step
from dit_rewrite.kernels.blockwise_attention import state_bytes
from dit_rewrite.policy.strategies import Strategy
from tests.helpers import tiny
from tests.helpers.attention import Small, plain, small_calls


@pytest.mark.parametrize(
    ("model", "batch", "do", "reasons"),
    [
        (Small(), 3, ShareGuidance("first"), {RefusalReason.ODD_BATCH: 1}),
        (Small(), 2, BlockwiseReuse(0.1, 4, "paper"), {RefusalReason.MOVING_KEYS: 1}),
        (Small(causal=True), 2, BlockwiseReuse(0.1, 4), {RefusalReason.CAUSAL: 1}),
        (Small(causal=True), 2, WindowResidual(0.25), {RefusalReason.CAUSAL: 1}),
        (Small(), 2, WindowResidual(1, grid=(3, 3)), {RefusalReason.OTHER_GRID: 1}),
        (Small(), 2, WindowResidual((1, 1), grid="latent"), {RefusalReason.OTHER_AXES: 1}),
    ],
    ids=["odd batch", "moving keys", "causal blocks", "causal window", "another grid", "other axes"],
)
def test_refusals(model: nn.Module, batch: int, do: Strategy, reasons: dict[RefusalReason, int]) -> None:
    """A strategy that is not possible is refused with a reason, and the model computes."""
    inputs = small_calls(2, batch)
    compiled = tiny.rewritten(model, Policy((Rule(step > 0, do),)))
    with pytest.warns(UserWarning, match="reaches no site of Small"):
        found = tiny.outputs(compiled, inputs[:1])
    found += tiny.outputs(compiled, inputs[1:])
    assert dict(Counter(refusal.reason for refusal in compiled.explain().refused)) == reasons
    assert tiny.same(found, plain(model, inputs))


def test_states_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call says so, and not the allocator in the middle of a trajectory."""
    needed = state_bytes((2, 2, 8, 16), (2, 2, 8, 16), torch.float32, 4, kv_static=False)
    for memory in (2 * needed, 2 * needed - 1):
        monkeypatch.setattr(state_memory, "device_memory", lambda _, memory=memory: memory)
        compiled = tiny.rewritten(Small(), Policy((Rule(step > 0, BlockwiseReuse(0.1, 4)),)))
        if memory == 2 * needed:
            tiny.outputs(compiled, small_calls(1))
        else:
            with pytest.raises(StatesTooLarge, match="at 1 sites"):
                tiny.outputs(compiled, small_calls(1))


def test_heads_that_are_too_narrow() -> None:
    """Blockwise attention does not support heads of 8 channels; a window does."""
    compiled = tiny.rewritten(tiny.build(), Policy((Rule(step > 0, BlockwiseReuse(0.1, 4)),)))
    with pytest.warns(UserWarning, match="reaches no site"):
        tiny.outputs(compiled, tiny.calls(1))
    assert [refusal.reason for refusal in compiled.explain().refused] == [RefusalReason.HEAD_SIZE] * 2


@pytest.mark.parametrize(
    ("window", "name"),
    [
        (WindowResidual(8), "window"),
        (WindowResidual((1, 2), grid=(2, 4)), None),
        (WindowResidual((2, 1), grid=(2, 4)), "window"),
        (WindowResidual(7), None),
    ],
    ids=str,
)
def test_windows_that_do_not_fit(window: WindowResidual, name: str | None) -> None:
    """Eight tokens: a larger window raises an error at the first call."""
    compiled = tiny.rewritten(Small(), Policy((Rule(step > 0, window),)))
    if name is None:
        assert len(tiny.outputs(compiled, small_calls(2))) == 2
        assert compiled.stats().reused > 0
        return
    with pytest.raises(BadOpArgument, match=rf"window_reuse: {name}="):
        tiny.outputs(compiled, small_calls(1))
