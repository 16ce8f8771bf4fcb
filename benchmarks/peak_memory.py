"""Predicted and measured memory of the cache: python -m benchmarks.peak_memory [--layers 16] [--device cuda]

The model is a DiT of many blocks at toy width, in an explicit trajectory. The prediction is that of `explain()` after
the first call. The measurement is the peak of live allocations (each of torch's on a CPU, the caching allocator's count
on CUDA) minus that under policies.Never(), which caches nothing. "in the slots" is stats().peak_bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch.profiler import ProfilerActivity, profile

import dit_rewrite
from benchmarks.timing import Row, Spread, report
from dit_rewrite.policies import DQAR, FORA, FirstBlockCache, Never
from dit_rewrite.policy.rules import Policy

STEPS, BATCH, SIZE, CLASSES = 4, 2, 16, 10
TOLERANCE = 0.05
POLICIES: dict[str, Policy] = {
    "FORA(3)": FORA(3),
    "DQAR(0.2, 0.33)": DQAR(0.2, 0.33, None),
    "FirstBlockCache(0.1)": FirstBlockCache(0.1),
}


@dataclass(frozen=True)
class Memory:
    """Bytes: the peak of all allocations during a trajectory, and the predicted and counted size of the cache."""

    peak: int
    predicted: int = 0
    slots: int = 0


def build(layers: int, device: str) -> torch.nn.Module:
    """Build a class-conditional DiT with random weights."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=layers,
        sample_size=SIZE, patch_size=1, num_embeds_ada_norm=CLASSES,
    )  # fmt: skip
    return model.to(device).eval().requires_grad_(False)


def peak(run: Callable[[], object], device: str) -> int:
    """Return the peak in bytes of the live allocations made during a run."""
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events: Any = recorded.profiler
    memory = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(policy: Policy, layers: int, device: str, backend: str) -> Memory:
    """Return the memory of a trajectory under a policy, after a first trajectory that compiles."""
    torch._dynamo.reset()
    model = dit_rewrite.compile(build(layers, device), policy, backend=backend)
    labels = torch.zeros(BATCH, dtype=torch.long, device=device)
    latent = torch.randn(BATCH, 4, SIZE, SIZE, device=device)

    def trajectory() -> None:
        with torch.no_grad(), model.trajectory(STEPS):
            for i in range(STEPS):
                timestep = torch.full((BATCH,), 900 - 100 * i, device=device)
                model(latent * 0.99**i, timestep, class_labels=labels, return_dict=False)

    trajectory()
    return Memory(peak(trajectory, device), model.explain().peak_bytes, model.stats().peak_bytes)


def rows(name: str, policy: Policy, never: Memory, arguments: argparse.Namespace) -> list[Row]:
    """Return the rows of one policy: predicted against measured."""
    found = measure(policy, arguments.layers, arguments.device, arguments.backend)
    measured = found.peak - never.peak
    off = found.predicted / measured - 1
    return [
        Row(f"{name}: predicted peak", _exact(found.predicted / 2**20), "MiB", "", True),
        Row(f"{name}: in the slots", _exact(found.slots / 2**20), "MiB", "", True),
        Row(f"{name}: measured peak", _exact(measured / 2**20), "MiB", "", True),
        Row(f"{name}: predicted / measured - 1", _exact(off), "", f"within {TOLERANCE}", abs(off) <= TOLERANCE),
    ]


def _exact(value: float) -> Spread:
    return Spread(value, value, value, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="aot_eager")
    arguments = parser.parse_args()
    never = measure(Never(), arguments.layers, arguments.device, arguments.backend)
    found = [row for name, policy in POLICIES.items() for row in rows(name, policy, never, arguments)]
    shape = f"DiT, {arguments.layers} blocks of width 128, {SIZE * SIZE} tokens, batch {BATCH}, {STEPS} steps, float32"
    report("peak_memory", found, {"model": shape, "backend": arguments.backend})


if __name__ == "__main__":
    main()
