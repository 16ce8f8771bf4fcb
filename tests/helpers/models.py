"""The supported diffusion transformers at toy size with random weights.

`MODELS` maps a short name to a `Case`: how to build the model, the calls of one trajectory, and the number of sites
of each kind, counted by hand from the architecture. Each of these is one site:

* ``self``: attention whose K and V come from the residual stream that its output is added to
* ``cross``: attention whose K and V come from a condition alone
* ``joint``: one attention core over two token streams, one value for each stream that it is added to; one site
* ``mlp``: a feed-forward branch; each token stream has its own
* ``parallel``: attention and MLP that end in one common output projection

Nothing else in these models is a residual branch. In particular, sums in the embedders are none: the summands (time,
class, pooled text, size, position) are computed side by side, not one from the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from examples.stdit import STDiT, STDiTConfig

BATCH = 2
LARGEST_TURN = 0.2  # the largest rotation of a latent between two calls, in radians: a change of 20 %


class Build(Protocol):
    """Builds a model: seeded, in eval mode, without gradients."""

    def __call__(self, dtype: torch.dtype = torch.float32) -> nn.Module: ...


class Calls(Protocol):
    """The keyword arguments of each call of one trajectory."""

    def __call__(self, steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Case:
    """One model, its calls and its sites."""

    name: str
    build: Build
    calls: Calls
    sites: dict[str, int]
    autocast: bool = False
    """Also run with float32 weights under ambient bfloat16 autocast, as its pipeline does."""

    def inputs(self, steps: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Any]]:
        """Arguments of each call of one trajectory; conditioning tensors are the same objects in every call."""
        return self.calls(steps, dtype, seed)


def output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the prediction from the output of a model."""
    return result[0] if isinstance(result, tuple) else result


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew, so that no gate, head or table stays zero or tiny and hides a wrong rewrite."""
    generator = Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            value = noise
        elif name.endswith("bias"):
            value = 0.1 * noise
        elif name.endswith("weight") and parameter.ndim == 1:  # the scale of a norm
            value = 1 + 0.1 * noise
        elif name.endswith("weight"):
            value = noise / math.sqrt(parameter[0].numel())
        else:  # scale_shift_table, pos_frequencies
            value = 0.5 * noise
        parameter.data.copy_(value)


def prepare(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Redraw the parameters, freeze them, and cast what `from_pretrained(torch_dtype=dtype)` would cast."""
    redraw(model)
    model.eval().requires_grad_(False)
    keep = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not any(part in name.split(".") for part in keep):
            tensor.data = tensor.data.to(dtype)
    for module in model.modules():  # a buffer that is a view keeps a base of the old dtype, which Dynamo refuses
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.clone())
    return model


def latents(shape: tuple[int, ...], steps: int, dtype: torch.dtype, generator: Generator) -> list[Tensor]:
    """A path from noise towards another latent, on a circle: successive ones differ by at most 20 %."""
    start, end = torch.randn(2, BATCH, *shape, generator=generator)
    turn = min(math.pi / 2 / steps, LARGEST_TURN)
    return [(math.cos(turn * step) * start + math.sin(turn * step) * end).to(dtype) for step in range(steps)]


def falling(steps: int, dtype: torch.dtype = torch.int64) -> list[Tensor]:
    """Timesteps from 999 down, one value spread over the batch as pipelines do it."""
    return [torch.tensor(999 - step * 1000 // steps).to(dtype).expand(BATCH) for step in range(steps)]


def rising(steps: int, last: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Timesteps from 0 up to just below `last`, for models that count from noise to image."""
    return [torch.tensor(last * step / steps).to(dtype).expand(BATCH) for step in range(steps)]


def condition(*shape: int, dtype: torch.dtype, generator: Generator) -> Tensor:
    """A random conditioning tensor for the batch."""
    return torch.randn(BATCH, *shape, generator=generator).to(dtype)


def padded_mask(length: int, padding: int) -> Tensor:
    """1 for tokens that count: all of the first sample, all but `padding` of the others."""
    mask = torch.ones(BATCH, length, dtype=torch.int64)
    mask[1:, length - padding :] = 0
    return mask


def assemble(fixed: dict[str, Any], **changing: list[Tensor]) -> list[dict[str, Any]]:
    """Return a dictionary per call with the fixed arguments and the changing tensors of the call."""
    return [{**fixed, **dict(zip(changing, values, strict=True))} for values in zip(*changing.values(), strict=True)]


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


def build_flux(dtype: torch.dtype = torch.float32) -> nn.Module:
    """FLUX.1-dev with 2 double and 2 single blocks, 16 image tokens and 6 text tokens."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
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


MODELS: dict[str, Case] = {
    case.name: case
    for case in (
        # 3 blocks of (self-attention, MLP).
        Case("dit", build_dit, dit_calls, {"self": 3, "mlp": 3}),
        # 3 blocks of (self-attention, cross-attention without norm and gate, MLP).
        Case("pixart_alpha", build_pixart_alpha, pixart_alpha_calls, {"self": 3, "cross": 3, "mlp": 3}),
        Case("pixart_sigma", build_pixart_sigma, pixart_sigma_calls, {"self": 3, "cross": 3, "mlp": 3}),
        # 3 blocks of (joint attention, image MLP, text MLP), but the last has neither a text value nor a text MLP:
        # joint 3 (2 + 2 + 1 values), MLP 3 + 2.
        Case("sd3", build_sd3, sd3_calls, {"joint": 3, "mlp": 3 + 2}),
        # 2 double blocks of (joint attention, image MLP, text MLP): joint 2, MLP 2 + 2. 2 single blocks, each one
        # branch over text and image together, whose last projection takes cat(attention, MLP). The text half of the
        # last single block is dropped, but only after the sum, so the branch has both halves.
        Case("flux", build_flux, flux_calls, {"joint": 2, "mlp": 2 + 2, "parallel": 2}),
        # 3 blocks of (joint attention, MLP). One MLP runs over cat(text, video) and its output's slices go to the two
        # streams: one site with two values, except in the last block, whose text sum is not read. The text value of the
        # last joint attention is read as part of that MLP's input, although no video token depends on it.
        Case("cogvideox", build_cogvideox, cogvideox_calls, {"joint": 3, "mlp": 3}),
        # 2 times a spatial block of (self-attention, cross-attention, MLP) and a temporal one of (self-attention, MLP).
        Case("latte", build_latte, latte_calls, {"self": 2 + 2, "cross": 2, "mlp": 2 + 2}),
        # 3 blocks of (joint attention, video MLP, text MLP), but the last has neither a text value nor a text MLP:
        # joint 3, MLP 3 + 2. A joint attention has one core for each sample of the batch (the text tokens that the mask
        # keeps differ in number); it is still one site. The attention pooling of the text is no branch: it is added to
        # the time embedding, from which it is not computed.
        Case("mochi", build_mochi, mochi_calls, {"joint": 3, "mlp": 3 + 2}, autocast=True),
        # 3 blocks of (self-attention, MLP), no gates. Text, time and image tokens are one stream.
        Case("omnigen", build_omnigen, omnigen_calls, {"self": 3, "mlp": 3}, autocast=True),
        # 2 blocks of (self-attention, cross-attention without gate, MLP).
        Case("wan", build_wan, wan_calls, {"self": 2, "cross": 2, "mlp": 2}),
        # 2 blocks of (spatial and temporal self-attention, cross-attention without gate, MLP).
        Case("stdit", build_stdit, stdit_calls, {"self": 2 * 2, "cross": 2, "mlp": 2}),
    )
}
