"""Diffusion transformers of videos at toy size, and the calls of a trajectory of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, nn

from examples.stdit import STDiT, STDiTConfig
from tests.helpers.drawn import assemble, condition, falling, latents, padded_mask, prepare, rising

# --- CogVideoX: text and video share all weights ----------------------------------------------------------------------


def build_cogvideox(dtype: torch.dtype = torch.float32) -> nn.Module:
    """CogVideoX-5B's structure (rotary positions) with 3 blocks, 32 video tokens and 6 text tokens."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=32,
        text_embed_dim=24,
        num_layers=3,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=True,
    )
    return prepare(model, dtype)


def cogvideox_calls(steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Any]]:
    """Integer timesteps; the pipeline computes the rotary embedding once."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    generator = Generator().manual_seed(seed)
    rotary = get_3d_rotary_pos_embed(16, crops_coords=((0, 0), (4, 4)), grid_size=(4, 4), temporal_size=2)
    fixed = {
        "encoder_hidden_states": condition(6, 24, dtype=dtype, generator=generator),
        "image_rotary_emb": tuple(rotary),
        "return_dict": False,
    }
    return assemble(fixed, hidden_states=latents((2, 4, 8, 8), steps, dtype, generator), timestep=falling(steps))


# --- Latte: spatial and temporal blocks in turn -----------------------------------------------------------------------


def build_latte(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Latte with 2 spatial and 2 temporal blocks, 3 frames of 16 tokens."""
    from diffusers import LatteTransformer3DModel

    model = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=24,
        video_length=3,
    )
    return prepare(model, dtype)


def latte_calls(steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Any]]:
    """Integer timesteps and text states."""
    generator = Generator().manual_seed(seed)
    fixed = {"encoder_hidden_states": condition(6, 24, dtype=dtype, generator=generator), "return_dict": False}
    return assemble(fixed, hidden_states=latents((4, 3, 8, 8), steps, dtype, generator), timestep=falling(steps))


# --- Mochi: joint attention over streams of different widths, a norm after each branch --------------------------------


def build_mochi(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Mochi with 3 blocks, the last of which does not update the text; 32 video tokens, 6 text tokens."""
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        pooled_projection_dim=24,
        in_channels=4,
        text_embed_dim=32,
        time_embed_dim=16,
    )
    return prepare(model, dtype)


def mochi_calls(steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Any]]:
    """Float timesteps that rise from 0 towards 1000; attention picks the text tokens that the mask keeps."""
    generator = Generator().manual_seed(seed)
    fixed = {
        "encoder_hidden_states": condition(6, 32, dtype=dtype, generator=generator),
        "encoder_attention_mask": padded_mask(6, 2).bool(),
        "return_dict": False,
    }
    timesteps = rising(steps, 1000.0, dtype)
    return assemble(fixed, hidden_states=latents((4, 2, 8, 8), steps, dtype, generator), timestep=timesteps)


# --- Wan: text to video, the residual sums in float32 -----------------------------------------------------------------


def build_wan(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Wan 2.1 (text to video) with 2 blocks and 32 tokens; norms, tables and time embedder stay in float32."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return prepare(model, dtype)


def wan_calls(steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Any]]:
    """Integer timesteps and text states."""
    generator = Generator().manual_seed(seed)
    fixed = {"encoder_hidden_states": condition(6, 24, dtype=dtype, generator=generator), "return_dict": False}
    return assemble(fixed, hidden_states=latents((4, 2, 8, 8), steps, dtype, generator), timestep=falling(steps))


# --- STDiT: a plain nn.Module -----------------------------------------------------------------------------------------


def build_stdit(dtype: torch.dtype = torch.float32) -> nn.Module:
    """STDiT with 2 blocks, 3 frames of 16 tokens."""
    return prepare(STDiT(STDiTConfig(width=32, depth=2, heads=2, text_width=24, frequency_width=32)), dtype)


def stdit_calls(steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Any]]:
    """Integer timesteps, text states and their padding mask."""
    generator = Generator().manual_seed(seed)
    fixed = {"text": condition(6, 24, dtype=dtype, generator=generator), "text_mask": padded_mask(6, 2)}
    return assemble(fixed, latent=latents((4, 3, 8, 8), steps, dtype, generator), timestep=falling(steps))
