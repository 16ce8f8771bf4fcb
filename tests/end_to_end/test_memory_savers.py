"""Offloading, casting and quantization of a rewritten denoiser: each is exact and reuses, or an error names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dit_rewrite
from dit_rewrite.errors import BrokenUp
from dit_rewrite.policies import FORA, Never
from tests.helpers.tiny import SITES, build, calls, fora, outputs, same

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

CPU = torch.device("cpu")
STEPS = 4


def offload_model(model: nn.Module) -> None:
    """As a pipeline's enable_model_cpu_offload does."""
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, CPU)


def offload_layers(model: nn.Module) -> None:
    """As a pipeline's enable_sequential_cpu_offload does."""
    from accelerate import cpu_offload

    cpu_offload(model, CPU)


def offload_blocks(model: nn.Module, kind: str = "block_level") -> None:
    from diffusers.hooks import apply_group_offloading

    blocks = 1 if kind == "block_level" else None
    apply_group_offloading(model, CPU, CPU, offload_type=kind, num_blocks_per_group=blocks)


def offload_leaves(model: nn.Module) -> None:
    offload_blocks(model, "leaf_level")


def cast(model: nn.Module) -> None:
    """As enable_layerwise_casting does: weights are stored in eight bits."""
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("norm",))


def quantize_weights(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def quantize_dynamically(model: nn.Module) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())


Saver = Callable[[nn.Module], None]
EXACT = [offload_model, offload_blocks, quantize_weights, quantize_dynamically]
REFUSED = [
    (offload_layers, "accelerate/hooks.py", "AlignDevicesHook"),
    (offload_leaves, "hooks/group_offloading.py", "GroupOffloadingHook"),
    (cast, "hooks/layerwise_casting.py", "LayerwiseCastingHook"),
]


def both(saver: Saver, policy: Any, after: bool) -> tuple[Any, Any]:
    """The plain model with a memory saver, and the rewritten one, compiled before or after the saver was enabled."""
    if saver.__name__.startswith("quantize"):
        pytest.importorskip("torchao")
    plain, model = build(), build()
    saver(plain)
    if not after:
        saver(model)
    dit_rewrite.compile(model, policy, backend="aot_eager")
    if after:
        saver(model)
    return plain, model


@pytest.mark.parametrize("after", [False, True], ids=["before compile", "after compile"])
@pytest.mark.parametrize("saver", EXACT)
def test_exact(saver: Saver, after: bool) -> None:
    """Every step equals the plain model's with the same memory saver, and FORA's by module hooks."""
    plain, model = both(saver, FORA(2), after)
    inputs = calls(STEPS)
    with model.trajectory(STEPS):
        assert same(outputs(model, inputs), fora(plain, inputs, 2))
    stats = model.stats()
    assert (stats.computed, stats.reused, stats.misses) == (2 * SITES, 2 * SITES, {})
    dit_rewrite.compile(model, Never(), backend="aot_eager")
    assert same(outputs(model, inputs[:2]), outputs(plain, inputs[:2]))


@pytest.mark.parametrize(("saver", "place", "hook"), REFUSED)
def test_refused(saver: Saver, place: str, hook: str) -> None:
    """Hooks around each layer split its blocks: the error names them, and where Dynamo breaks the graph."""
    _, model = both(saver, FORA(2), after=False)
    with pytest.raises(BrokenUp, match=rf"TinyDiT has no .* are at {place}:.*{hook} around \d+ modules.*whole blocks"):
        outputs(model, calls(1))


def test_hooks_that_come_after_the_first_trajectory() -> None:
    """A warning says why reuse has stopped."""
    _, model = both(lambda model: None, FORA(2), after=False)
    with model.trajectory(STEPS):
        outputs(model, calls(STEPS))
    cast(model)
    with pytest.warns(UserWarning, match="TinyDiT has no residual branch.*LayerwiseCastingHook"):
        outputs(model, calls(1))
