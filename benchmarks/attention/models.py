"""Step times of whole denoisers with strategies inside attention: the end-to-end rows of benchmarks/attention/run.py.

The models are DiT and PixArt at published size with random weights. In one explicit trajectory each step uses another
strategy: it computes and keeps a residual, uses it, shares guidance, does both, reuses the output, or only computes.
Its time is divided by that of the same call of the model with compiled blocks, measured right before it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from sympy import Eq
from torch import Tensor, nn

import dit_rewrite
from benchmarks.attention.clock import TOLERANCE, Bench, Samples, distance
from benchmarks.timing import Spread, seconds
from dit_rewrite import BlockwiseReuse, Policy, Reuse, Rule, ShareGuidance, Where, WindowResidual
from dit_rewrite.guards import step
from dit_rewrite.policy.strategies import Strategy

BATCH = 2  # both halves of the guidance
BLOCK = 100  # keys per block of CachedAttention; PixArt's captions have three blocks
WARM_UP = 2  # trajectories


@dataclass(frozen=True)
class Geometry:
    """The sizes of a denoiser.

    latent: side of its input; the side in tokens is half of it. text: number of text tokens of PixArt; 0 means DiT.
    conditional: the half of the batch that is conditional in the model's pipeline.
    """

    title: str
    latent: int
    text: int
    conditional: str
    layers: int = 28
    heads: int = 16
    head_size: int = 72
    caption: int = 4096
    interpolation: float = 1.0


FULL = (
    Geometry("DiT-XL/2-512", 64, 0, "first"),
    Geometry("PixArt-Σ 1024", 128, 300, "second", interpolation=2.0),
    Geometry("PixArt-Σ 2K", 256, 300, "second", interpolation=4.0),
)
TINY = (
    Geometry("tiny DiT", 8, 0, "first", layers=2, heads=2, head_size=16),
    Geometry("tiny PixArt", 8, 8, "second", layers=2, heads=2, head_size=16, caption=24),
)


def build(geometry: Geometry, like: Tensor) -> nn.Module:
    """Build the denoiser on the device."""
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

    shared: dict[str, Any] = {
        "num_attention_heads": geometry.heads, "attention_head_dim": geometry.head_size, "in_channels": 4,
        "out_channels": 8, "num_layers": geometry.layers, "sample_size": geometry.latent, "patch_size": 2,
    }  # fmt: skip
    with like.device:
        if geometry.text:
            model = PixArtTransformer2DModel(
                **shared, cross_attention_dim=geometry.heads * geometry.head_size, caption_channels=geometry.caption,
                interpolation_scale=geometry.interpolation, use_additional_conditions=False,
            )  # fmt: skip
        else:
            model = DiTTransformer2DModel(**shared)
    # diffusers' own `to` warns about modules to keep in fp32 even if there are none
    return nn.Module.to(model, like.dtype).eval().requires_grad_(False)


def calls(geometry: Geometry, steps: int, like: Tensor) -> list[dict[str, Any]]:
    """Return the arguments of each step: changing latents, and one condition."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=like.dtype, device=like.device)

    latent, drift = (normal(BATCH, 4, geometry.latent, geometry.latent) for _ in range(2))
    if geometry.text:
        fixed: dict[str, Any] = {
            "encoder_hidden_states": normal(BATCH, geometry.text, geometry.caption),
            "encoder_attention_mask": torch.ones(BATCH, geometry.text, dtype=like.dtype, device=like.device),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
    else:
        fixed = {"class_labels": torch.tensor([1, 1000], device=like.device)}
    return [
        {
            "hidden_states": latent + drift * (s / steps),
            "timestep": torch.full((BATCH,), 999 - 40 * s, device=like.device),
            "return_dict": False,
            **fixed,
        }
        for s in range(steps)
    ]


Do = tuple[str, Strategy | tuple[Strategy, ...] | None, str]


def plan(geometry: Geometry) -> list[Do]:
    """Return the name, strategy and kind of attention of each step.

    A step before one that reads a value keeps that value, so "full" comes where the next step reads nothing.
    """
    window, share = WindowResidual(), ShareGuidance(geometry.conditional)
    steps: list[Do] = [
        ("full, residual kept", None, "self"),
        ("WA-RS", window, "self"),
        ("WA-RS+ASC", (window, share), "self"),
        ("ASC", share, "self"),
        ("AST", Reuse(), "self"),
        ("full", None, "self"),
    ]
    if geometry.text:
        block = min(BLOCK, geometry.text)
        steps += [
            ("full, blocks kept", None, "cross"),
            ("blockwise, all kept", BlockwiseReuse(math.inf, block), "cross"),
        ]
    return steps


def policy(steps: list[Do]) -> Policy:
    """Return the policy of a plan."""
    rules = (Rule(Eq(step, i), do, Where((kind,))) for i, (_, do, kind) in enumerate(steps) if do is not None)
    return Policy(tuple(rules), "one strategy a step")


def end_to_end(bench: Bench, geometry: Geometry, like: Tensor, backend: str) -> None:
    """Measure each step's strategy. Raises ValueError if a computing step differs from the model."""
    torch.compiler.reset()
    torch.manual_seed(0)
    steps = plan(geometry)
    model, inputs = build(geometry, like), calls(geometry, len(steps), like)
    rewritten = dit_rewrite.compile(copy.deepcopy(model), policy(steps), backend=backend, lowering="segments")
    for block in model.transformer_blocks:  # type: ignore[union-attr]
        block.compile(backend=backend)
    with torch.compiler.set_stance("default"):  # the other rows set another stance on a CPU
        for name, difference in _differences(model, rewritten, steps, inputs):
            if name.startswith("full") and not difference <= TOLERANCE:
                raise ValueError(f"{name}: |found - expected| / |expected| = {difference:.3g}")
            bench.runs.append({"group": geometry.title, "run": name, "difference": difference})
        samples = _sample(model, rewritten, steps, inputs, bench.rounds)
    for name, _, _ in steps:
        bench.compare(f"{geometry.title}: {name} / plain", samples, name, f"plain, {name}")
    bench.runs += [
        {"group": geometry.title, "run": name, "seconds": asdict(Spread.of(taken))} for name, taken in samples.items()
    ]


def _differences(
    plain: nn.Module, rewritten: Any, steps: list[Do], inputs: list[dict[str, Any]]
) -> Iterator[tuple[str, float]]:
    """Yield the relative distance of each step's output from that of the unmodified model."""
    with rewritten.trajectory(len(steps)):
        for (name, _, _), arguments in zip(steps, inputs, strict=True):
            found = rewritten(**arguments)[0].clone()
            yield name, distance(found, plain(**arguments)[0])


def _sample(plain: nn.Module, rewritten: Any, steps: list[Do], inputs: list[dict[str, Any]], rounds: int) -> Samples:
    """Measure the seconds of each step and of the same call of the unmodified model, one sample per trajectory."""
    samples: Samples = {name: [] for done, _, _ in steps for name in (done, f"plain, {done}")}
    for turn in range(-WARM_UP, rounds):
        with rewritten.trajectory(len(steps)):
            for (name, _, _), arguments in zip(steps, inputs, strict=True):
                taken = _seconds(plain, arguments), _seconds(rewritten, arguments)
                for key, value in zip((f"plain, {name}", name), taken, strict=True):
                    if turn >= 0:
                        samples[key].append(value)
    return samples


def _seconds(model: Callable[..., object], arguments: dict[str, Any]) -> float:
    return seconds(lambda: model(**arguments))
