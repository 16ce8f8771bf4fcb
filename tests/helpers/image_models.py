"""Diffusion transformers of images at toy size, and the calls of a trajectory of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, nn

from tests.helpers.drawn import BATCH, assemble, condition, falling, latents, padded_mask, prepare, rising

# --- DiT: class-conditional images ------------------------------------------------------------------------------------


def build_dit(dtype: torch.dtype = torch.float32) -> nn.Module:
    """DiT with 3 blocks, 16 tokens of width 32 and a predicted variance."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    return prepare(model, dtype)


def dit_calls(steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Any]]:
    """Integer timesteps; the condition is a class."""
    generator = Generator().manual_seed(seed)
    fixed = {"class_labels": torch.randint(0, 10, (BATCH,), generator=generator), "return_dict": False}
    return assemble(fixed, hidden_states=latents((4, 8, 8), steps, dtype, generator), timestep=falling(steps))


# --- PixArt: text to image with cross-attention -----------------------------------------------------------------------


def build_pixart(alpha: bool, dtype: torch.dtype) -> nn.Module:
    """PixArt with 3 blocks and 16 tokens of width 48; alpha also embeds the picture's size."""
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=48,
        sample_size=8,
        norm_type="ada_norm_single",
        caption_channels=24,
        use_additional_conditions=alpha,
    )
    return prepare(model, dtype)


def build_pixart_alpha(dtype: torch.dtype = torch.float32) -> nn.Module:
    """PixArt-alpha."""
    return build_pixart(True, dtype)


def build_pixart_sigma(dtype: torch.dtype = torch.float32) -> nn.Module:
    """PixArt-Sigma."""
    return build_pixart(False, dtype)


def pixart_calls(size: dict[str, Any], steps: int, dtype: torch.dtype, seed: int) -> list[dict[str, Any]]:
    """Integer timesteps, text states and their padding mask."""
    generator = Generator().manual_seed(seed)
    fixed = {
        "encoder_hidden_states": condition(6, 24, dtype=dtype, generator=generator),
        "encoder_attention_mask": padded_mask(6, 2),
        "added_cond_kwargs": size,
        "return_dict": False,
    }
    return assemble(fixed, hidden_states=latents((4, 8, 8), steps, dtype, generator), timestep=falling(steps))


def pixart_alpha_calls(steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Any]]:
    """With resolution and aspect ratio."""
    resolution = torch.tensor([[64.0, 64.0]]).repeat(BATCH, 1).to(dtype)
    return pixart_calls({"resolution": resolution, "aspect_ratio": resolution[:, :1] / 64}, steps, dtype, seed)


def pixart_sigma_calls(steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Any]]:
    """Without: the pipeline passes None for both."""
    return pixart_calls({"resolution": None, "aspect_ratio": None}, steps, dtype, seed)


# --- SD3: text and image streams, joint attention ---------------------------------------------------------------------


def build_sd3(dtype: torch.dtype = torch.float32) -> nn.Module:
    """SD3 with 3 blocks, the last of which does not update the text; 16 image tokens, 6 text tokens."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return prepare(model, dtype)


def sd3_calls(steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Any]]:
    """Float timesteps in 0..1000, text states and a pooled text."""
    generator = Generator().manual_seed(seed)
    fixed = {
        "encoder_hidden_states": condition(6, 24, dtype=dtype, generator=generator),
        "pooled_projections": condition(24, dtype=dtype, generator=generator),
        "return_dict": False,
    }
    timesteps = falling(steps, torch.float32)
    return assemble(fixed, hidden_states=latents((4, 8, 8), steps, dtype, generator), timestep=timesteps)


# --- FLUX.1: joint blocks, then single-stream blocks ------------------------------------------------------------------


def build_flux(dtype: torch.dtype = torch.float32, layers: int = 2) -> nn.Module:
    """FLUX.1-dev with `layers` double and as many single blocks, 16 image tokens and 6 text tokens."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return prepare(model, dtype)


def flux_calls(steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Any]]:
    """Timesteps in 0..1, packed latents, position ids and a guidance scale as an input."""
    generator = Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    fixed = {
        "encoder_hidden_states": condition(6, 24, dtype=dtype, generator=generator),
        "pooled_projections": condition(24, dtype=dtype, generator=generator),
        "guidance": torch.full((BATCH,), 3.5),
        "txt_ids": torch.zeros(6, 3, dtype=dtype),
        "img_ids": torch.stack([torch.zeros(4, 4), rows, columns], dim=-1).flatten(0, 1).to(dtype),
        "return_dict": False,
    }
    timesteps = [timestep / 1000 for timestep in falling(steps, dtype)]
    return assemble(fixed, hidden_states=latents((16, 8), steps, dtype, generator), timestep=timesteps)


# --- OmniGen: a language model's blocks over text, time and image tokens ----------------------------------------------


def build_omnigen(dtype: torch.dtype = torch.float32) -> nn.Module:
    """OmniGen with 3 blocks; a sequence of 6 text tokens, 1 time token and 16 image tokens."""
    from diffusers import OmniGenTransformer2DModel

    model = OmniGenTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        num_layers=3,
        pad_token_id=0,
        vocab_size=50,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        pos_embed_max_size=8,
        time_step_dim=32,
    )
    return prepare(model, dtype)


def omnigen_calls(steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Any]]:
    """Timesteps that rise from 0 towards 1; text is causal, time and image tokens see everything but padding."""
    generator = Generator().manual_seed(seed)
    text, length = 6, 6 + 1 + 16
    mask = torch.ones(BATCH, length, length, dtype=torch.int64).tril()
    mask[:, text:] = 1
    mask[1:, 2:, :2] = 0  # the second sample's text is shorter: padded on the left
    fixed = {
        "input_ids": torch.randint(1, 50, (BATCH, text), generator=generator),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask,
        "position_ids": torch.arange(length).repeat(BATCH, 1),
        "return_dict": False,
    }
    return assemble(fixed, hidden_states=latents((4, 8, 8), steps, dtype, generator), timestep=rising(steps, 1.0))
