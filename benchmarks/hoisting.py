"""Savings of hoisting without any caching: python -m benchmarks.hoisting [--rounds 20] [--device cuda]

The models are PixArt-alpha and STDiT with a few blocks at their real widths, 120 text tokens and random weights. FLOPs
are counted on the captured graph; steps with and without hoisting are timed in alternation, in explicit trajectories.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel

import dit_rewrite
from benchmarks.timing import Row, Spread, alternate, ratio, report
from benchmarks.workload import Stepper
from dit_rewrite.module import twin
from dit_rewrite.passes.analysis import cost
from dit_rewrite.policies import Never
from examples.stdit import STDiT, STDiTConfig

BLOCKS, TEXT = 2, 120
Workload = tuple[torch.nn.Module, dict[str, Any]]


def pixart(device: str) -> Workload:
    """Build PixArt-alpha 256: 16 x 16 tokens of width 1152, T5 states of 4096 channels."""
    model = PixArtTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=BLOCKS,
        cross_attention_dim=1152, sample_size=32, caption_channels=4096, use_additional_conditions=False,
    )  # fmt: skip
    call = {
        "hidden_states": torch.randn(2, 4, 32, 32, device=device),
        "encoder_hidden_states": torch.randn(2, TEXT, 4096, device=device),
        "encoder_attention_mask": torch.ones(2, TEXT, device=device),
        "timestep": torch.tensor([500, 500], device=device),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    return model.to(device).eval().requires_grad_(False), call


def stdit(device: str) -> Workload:
    """Build STDiT-XL/2: 4 frames of 8 x 8 tokens of width 1152."""
    model = STDiT(STDiTConfig(depth=BLOCKS)).to(device).eval().requires_grad_(False)
    call = {
        "latent": torch.randn(2, 4, 4, 16, 16, device=device),
        "timestep": torch.tensor([500, 500], device=device),
        "text": torch.randn(2, TEXT, 4096, device=device),
    }
    return model, call


def measure(name: str, build: Callable[[str], Workload], device: str, rounds: int) -> list[Row]:
    """Measure the FLOPs that leave the step, and the time of a step with and without hoisting."""
    torch._dynamo.reset()
    model, call = build(device)
    calls = [{**call, "timestep": call["timestep"] - i} for i in range(400)]
    hoisting = dit_rewrite.compile(twin(model), Never())
    runs = {
        "hoisted": Stepper(hoisting, calls),
        "not": Stepper(dit_rewrite.compile(twin(model), Never(), disable_passes=("hoist",)), calls),
    }
    for run in runs.values():
        for _ in range(3):
            run()
    (rewritten,) = hoisting.explain().rewritten
    assert rewritten.hoisted is not None
    saved, total = rewritten.hoisted.flops, cost.total_flops(rewritten.captured.gm.graph)
    found = ratio(alternate(runs, rounds), "hoisted", "not")
    for run in runs.values():
        run.close()
    return [
        Row(f"{name}: FLOPs saved a step", _exact(saved / 1e9), "GFLOP", "", True),
        Row(f"{name}: … of all", _exact(saved / total), "", "", True),
        Row(f"{name}: step hoisted / not", found, "", "<= 1", found.median <= 1),
    ]


def _exact(value: float) -> Spread:
    return Spread(value, value, value, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        rows = measure("PixArt-alpha", pixart, arguments.device, arguments.rounds)
        rows += measure("STDiT", stdit, arguments.device, arguments.rounds)
    report("hoisting", rows, {"model": f"{BLOCKS} blocks at real width, batch 2, {TEXT} text tokens, float32"})


if __name__ == "__main__":
    main()
