"""What strategies inside attention take off a step of whole denoisers: the rows of benchmarks/attention.py end to end.

DiT and PixArt with random weights, as large as the published ones. In one told trajectory each step does something
else: computes and keeps a residual, uses it, shares guidance, both, reuses the output, computes alone. Its time is
divided by that of the same call of the model whose blocks torch.compile compiled, taken right before it.
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
from benchmarks.attention_clock import TOLERANCE, Bench, Samples, distance
from benchmarks.timing import Spread, seconds
from dit_rewrite import BlockwiseReuse, Policy, Reuse, Rule, ShareGuidance, Where, WindowResidual
from dit_rewrite.guards import step
from dit_rewrite.policy.strategies import Strategy

BATCH = 2  # both halves of the guidance
BLOCK = 100  # keys of a block of CachedAttention: three of them in PixArt's captions
WARM_UP = 2  # trajectories


@dataclass(frozen=True)
class Geometry:
    """A denoiser: `latent` is the side of its input, twice as many as its tokens; `text` tokens are the condition of
    PixArt, 0 are DiT. `conditional` is the half of the batch that has the condition in its pipeline."""

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
    """The denoiser, made on the device."""
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
    # not diffusers' own `to`, which warns of modules to be kept in fp32 where there are none
    return nn.Module.to(model, like.dtype).eval().requires_grad_(False)


def calls(geometry: Geometry, steps: int, like: Tensor) -> list[dict[str, Any]]:
    """The arguments of each step: latents on their way, one condition."""

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
    """What each step is called, what it does, and with which kind of attention.

    A step before one that reads keeps what that reads; so "full" comes where nothing is read after it.
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
    """The rules of a plan."""
    rules = (Rule(Eq(step, i), do, Where((kind,))) for i, (_, do, kind) in enumerate(steps) if do is not None)
    return Policy(tuple(rules), "one strategy a step")


def end_to_end(bench: Bench, geometry: Geometry, like: Tensor, backend: str) -> None:
    """Measure each step's strategy. Raises ValueError where a step that computes differs from the model."""
    torch.compiler.reset()
    torch.manual_seed(0)
    steps = plan(geometry)
    model, inputs = build(geometry, like), calls(geometry, len(steps), like)
    rewritten = dit_rewrite.compile(copy.deepcopy(model), policy(steps), backend=backend, lowering="segments")
    for block in model.transformer_blocks:  # type: ignore[union-attr]
        block.compile(backend=backend)
    with torch.compiler.set_stance("default"):  # for the other rows a CPU has another
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
    """How far each step's output is from the plain model's."""
    with rewritten.trajectory(len(steps)):
        for (name, _, _), arguments in zip(steps, inputs, strict=True):
            found = rewritten(**arguments)[0].clone()
            yield name, distance(found, plain(**arguments)[0])


def _sample(plain: nn.Module, rewritten: Any, steps: list[Do], inputs: list[dict[str, Any]], rounds: int) -> Samples:
    """Seconds of each step, and of the plain model's same call; a sample a trajectory."""
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
