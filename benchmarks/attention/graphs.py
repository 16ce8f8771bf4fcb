"""FORA(3) over whole trajectories of large denoisers, with and without CUDA graphs: rows of benchmarks.attention.

The speed-up over the model with compiled blocks is divided by the ideal, which is the number of steps over that of the
computed ones. The model beside it is one CUDA graph itself, so that no time of the host counts in FORA's favour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dit_rewrite
from benchmarks.attention import models
from benchmarks.attention.clock import TOLERANCE, Bench, Run, distance
from benchmarks.attention.models import Geometry
from benchmarks.timing import Row, Spread, alternate, ratio
from dit_rewrite.module import RewrittenModule, twin
from dit_rewrite.policies import FORA

STEPS, INTERVAL = 30, 3
IDEAL = STEPS / len(range(0, STEPS, INTERVAL))
GOAL = 0.95  # of the ideal, with CUDA graphs
WARM_UP = 2  # trajectories: the second one captures
TRAJECTORIES = 5  # at most, of each run
Call = dict[str, Any]


@dataclass(frozen=True)
class Flux:
    """The sizes of a FLUX.1: tokens, text tokens, double-stream and single-stream blocks, and heads."""

    title: str = "FLUX.1"
    tokens: int = 4096
    text: int = 512
    double: int = 19
    single: int = 38
    heads: int = 24
    axes: tuple[int, int, int] = (16, 56, 56)


FULL: tuple[Geometry | Flux, ...] = (models.FULL[0], Flux())
TINY: tuple[Geometry | Flux, ...] = (models.TINY[0], Flux("tiny FLUX.1", 16, 8, 1, 1, 2, (4, 6, 6)))


def build(sizes: Geometry | Flux, like: Tensor) -> nn.Module:
    """Build the denoiser on the device, with random weights."""
    if isinstance(sizes, Geometry):
        return models.build(sizes, like)
    from diffusers import FluxTransformer2DModel

    with like.device:
        model = FluxTransformer2DModel(
            num_layers=sizes.double, num_single_layers=sizes.single, num_attention_heads=sizes.heads,
            attention_head_dim=sum(sizes.axes), axes_dims_rope=sizes.axes, guidance_embeds=True,
        )  # fmt: skip
    return nn.Module.to(model, like.dtype).eval().requires_grad_(False)


def calls(sizes: Geometry | Flux, like: Tensor) -> list[Call]:
    """Return the arguments of each step: changing latents, falling timesteps, and one condition."""
    if isinstance(sizes, Geometry):
        times = [torch.full((models.BATCH,), 990 - 33 * s, device=like.device) for s in range(STEPS)]
        given = models.calls(sizes, STEPS, like)
        return [call | {"timestep": time} for call, time in zip(given, times, strict=True)]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=like.dtype, device=like.device)

    fixed: Call = {
        "encoder_hidden_states": normal(1, sizes.text, 4096),
        "pooled_projections": normal(1, 768),
        "guidance": torch.full((1,), 3.5, dtype=like.dtype, device=like.device),
        "img_ids": torch.zeros(sizes.tokens, 3, device=like.device),
        "txt_ids": torch.zeros(sizes.text, 3, device=like.device),
        "return_dict": False,
    }
    latent, drift = normal(1, sizes.tokens, 64), normal(1, sizes.tokens, 64)
    times = [torch.full((1,), 1 - s / STEPS, dtype=like.dtype, device=like.device) for s in range(STEPS)]
    return [{"hidden_states": latent + drift * (s / STEPS), "timestep": time, **fixed} for s, time in enumerate(times)]


def fora(bench: Bench, sizes: Geometry | Flux, like: Tensor, backend: str) -> None:
    """Measure the share of the ideal speed-up. Raises ValueError where graphs change the result or are not used."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model, inputs = build(sizes, like), calls(sizes, like)
    options: dict[str, Any] = {"backend": backend, "lowering": "segments"}
    eager = dit_rewrite.compile(twin(model), FORA(INTERVAL), **options)
    graphs = dit_rewrite.compile(twin(model), FORA(INTERVAL), cuda_graphs=True, **options)
    for module in model.children():
        for block in module if isinstance(module, nn.ModuleList) else ():
            block.compile(backend=backend)
    with torch.compiler.set_stance("default"):  # the other rows set another stance on a CPU
        for _ in range(WARM_UP):
            found, expected = trajectory(graphs, inputs), trajectory(eager, inputs)
        check(graphs, distance(found, expected), like.is_cuda)
        step = bench.clock.prepare(Run(lambda: model(**inputs[0])[0]))
        runs: dict[str, Callable[[], object]] = {
            "plain": lambda: [step() for _ in inputs],
            "FORA(3)": lambda: trajectory(eager, inputs),
            "FORA(3) under CUDA graphs": lambda: trajectory(graphs, inputs),
        }
        samples = alternate(runs, min(bench.rounds, TRAJECTORIES))
    for name in list(runs)[1:]:
        each = ratio(samples, "plain", name)
        share = Spread(each.median / IDEAL, each.low / IDEAL, each.high / IDEAL, each.runs)
        bound = f">= {GOAL}" if "graphs" in name else ""
        held = not bound or share.median >= GOAL
        bench.rows.append(Row(f"{sizes.title}: {name} / ideal", share, "", bound, held))
    bench.runs += [
        {"group": sizes.title, "run": name, "seconds": asdict(Spread.of(taken))} for name, taken in samples.items()
    ]


def trajectory(model: RewrittenModule, inputs: Sequence[Call]) -> Tensor:
    """Run one trajectory and return its last output."""
    with model.trajectory(STEPS):
        outputs: list[Tensor] = [model(**arguments)[0] for arguments in inputs]
    return outputs[-1]


def check(model: RewrittenModule, difference: float, is_cuda: bool) -> None:
    """Raise ValueError if the results differ, or if nothing was captured on a GPU."""
    stats = model.stats()
    if not difference <= TOLERANCE:
        raise ValueError(f"under CUDA graphs: |found - expected| / |expected| = {difference:.3g}")
    if is_cuda and not stats.replays:
        raise ValueError(f"no graph was replayed: {'; '.join(map(str, stats.uncaptured))}")
