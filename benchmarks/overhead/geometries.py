"""The rows of benchmarks/overhead/run.py about step tables on other geometries: FLUX.1 and PixArt, scaled down.

Each block of FLUX.1 has a modulation of its own, as DiT's have; PixArt's blocks share one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

import dit_rewrite
from benchmarks.timing import Row, ratio
from benchmarks.workload import ALWAYS, STEPS, Stepper, alternate_steps, scheduler
from dit_rewrite.compiler.backend import Backend
from dit_rewrite.compiler.lowering import Lowering
from dit_rewrite.module import attach, twin

TOKENS, TEXT = 256, 64
Call = dict[str, Any]


def flux() -> tuple[torch.nn.Module, list[Call]]:
    """2 double-stream and 4 single-stream blocks of width 384 on 256 + 64 tokens."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=64, num_attention_heads=6,
        joint_attention_dim=256, pooled_projection_dim=128, guidance_embeds=True, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    given = {
        "encoder_hidden_states": torch.randn(1, TEXT, 256),
        "pooled_projections": torch.randn(1, 128),
        "guidance": torch.full((1,), 3.5),
        "img_ids": torch.zeros(TOKENS, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    latent, drift = torch.randn(1, TOKENS, 64), torch.randn(1, TOKENS, 64) / STEPS
    return model, [{"hidden_states": latent + i * drift, **given} for i in range(STEPS)]


def pixart() -> tuple[torch.nn.Module, list[Call]]:
    """6 blocks of width 384 on 2 x 256 tokens, with 64 tokens of text."""
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=6, sample_size=32,
        cross_attention_dim=384, caption_channels=256, use_additional_conditions=False,
    )  # fmt: skip
    text, latent = torch.randn(2, TEXT, 256), torch.randn(2, 4, 32, 32)
    given = {"encoder_hidden_states": text, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    drift = torch.randn(2, 4, 32, 32) / STEPS
    return model, [{"hidden_states": latent + i * drift, **given} for i in range(STEPS)]


GEOMETRIES: dict[str, Callable[[], tuple[torch.nn.Module, list[Call]]]] = {"FLUX.1": flux, "PixArt": pixart}


def measure_geometries(device: str, rounds: int) -> list[Row]:
    """Measure a fully reusing step with and without step tables, against a computing step."""
    rows = []
    for name, make in GEOMETRIES.items():
        model, each = make()
        model = model.to(device).eval().requires_grad_(False)
        inputs = _placed(each, device)
        bare = dit_rewrite.compile(twin(model), ALWAYS, disable_passes=("step_tables",))
        runs = {
            "computing": Stepper(attach(twin(model), Backend(model, ALWAYS, Lowering(), force=True)), inputs),
            "tables": Stepper(dit_rewrite.compile(twin(model), ALWAYS), inputs),
            "bare": Stepper(bare, inputs),
        }
        samples = alternate_steps(runs, rounds)
        found, without = (ratio(samples, kind, "computing") for kind in ("tables", "bare"))
        rows += [
            Row(f"{name} geometry: reusing step / computing step", found, "", "<= 0.02", found.median <= 0.02),
            Row("… without step tables", without, "", "", True),
        ]
    return rows


def _placed(calls: list[Call], device: str) -> list[Call]:
    """Return the calls on a device, with a timestep for each sample. A tensor of several calls stays one object."""
    on_device = {id(v): v.to(device) for call in calls for v in call.values() if isinstance(v, torch.Tensor)}
    batch = calls[0]["hidden_states"].shape[0]
    times = scheduler().timesteps.float()[:, None].expand(-1, batch).to(device)
    return [
        {**{name: on_device.get(id(v), v) for name, v in call.items()}, "timestep": time, "return_dict": False}
        for call, time in zip(calls, times, strict=True)
    ]
