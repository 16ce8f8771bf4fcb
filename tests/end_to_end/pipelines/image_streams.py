"""Pipelines that make an image and call the denoiser a second time for the negative prompt."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.end_to_end.pipelines.case import (
    PIXELS,
    SIZE,
    STRENGTH,
    TEXT,
    PipelineCase,
    draw,
    frozen,
    image_vae,
    masked_prompts,
    one_call,
    parts,
    picture,
    prompts,
    quiet,
    second_half,
    two_calls,
)
from tests.helpers.image_models import build_flux

SMALL = {"height": 16, "width": 16}  # eight latent rows where there is a VAE


def flux_parts(vae: nn.Module | None) -> dict[str, Any]:
    """The components that all FLUX.1 pipelines share."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return parts(build_flux(layers=1), scheduler, vae, encoders=2)


def build_flux_pipeline() -> Any:
    """FLUX.1, text to image."""
    from diffusers import FluxPipeline

    return quiet(FluxPipeline(**flux_parts(None)))


def build_flux_img2img() -> Any:
    """FLUX.1, image to image."""
    from diffusers import FluxImg2ImgPipeline

    return quiet(FluxImg2ImgPipeline(**flux_parts(image_vae(2))))


def build_flux_inpaint() -> Any:
    """FLUX.1 inpainting: each step replaces the kept part of the latent."""
    from diffusers import FluxInpaintPipeline

    return quiet(FluxInpaintPipeline(**flux_parts(image_vae(2))))


def build_flux_controlnet() -> Any:
    """FLUX.1 with residuals from a ControlNet and a guidance tensor, all new at every step."""
    from diffusers import FluxControlNetModel, FluxControlNetPipeline

    controlnet = FluxControlNetModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=[4, 6, 6],
    )
    return quiet(FluxControlNetPipeline(**flux_parts(image_vae(2)), controlnet=frozen(controlnet)))


def flux_prompts(seed: int, guidance: bool) -> dict[str, Any]:
    """With the guidance input that FLUX.1-dev was distilled on; and with true guidance, if requested."""
    embeds = prompts(seed, guidance, prompt_embeds=TEXT, pooled_prompt_embeds=(1, 24))
    return {**embeds, "guidance_scale": 3.5, "true_cfg_scale": 2.0 if guidance else 1.0}


def flux_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Text to image."""
    return {**flux_prompts(seed, guidance), **SIZE}


def flux_img2img_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """An image, half of whose structure is kept."""
    return {**flux_prompts(seed, guidance), **SMALL, "image": picture(seed), "strength": STRENGTH}


def flux_inpaint_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """An image and a mask that repaints its left half."""
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    return {**flux_img2img_arguments(seed, guidance), "mask_image": mask}


def flux_controlnet_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """An image to follow."""
    return {**flux_prompts(seed, guidance), **SMALL, "control_image": picture(seed)}


def flux2_parts(guidance_embeds: bool, vae: nn.Module | None) -> dict[str, Any]:
    """The components that FLUX.2 and FLUX.2 Klein share: a double and a single block with shared modulation."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return parts(frozen(transformer), scheduler, vae)


def flux2_vae(levels: int) -> Any:
    """FLUX.2's VAE at its smallest: each level but the first halves the image."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(4,) * levels,
        latent_channels=2,
        norm_num_groups=2,
        layers_per_block=1,
    )
    return frozen(vae)


def build_flux2(levels: int) -> Any:
    """FLUX.2 with a guidance input; with a VAE it can take an image."""
    from diffusers import Flux2Pipeline

    return quiet(Flux2Pipeline(**flux2_parts(True, flux2_vae(levels) if levels else None)))


def build_flux2_klein() -> Any:
    """FLUX.2 Klein, whose pipeline rescales even final latents to the VAE's scale."""
    from diffusers import Flux2KleinPipeline

    return quiet(Flux2KleinPipeline(**flux2_parts(False, flux2_vae(2))))


def flux2_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Text to image."""
    return {**prompts(seed, False, prompt_embeds=TEXT), **SIZE, "guidance_scale": 4.0}


def flux2_image_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """With an image, whose tokens and positions are appended to the latent's at every step."""
    from PIL import Image

    return {**flux2_arguments(seed, guidance), "image": Image.new("RGB", (PIXELS, PIXELS), (40 * seed, 90, 160))}


def flux2_klein_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Text to image, with classifier-free guidance if requested."""
    return {**prompts(seed, guidance, prompt_embeds=TEXT), **SMALL, "guidance_scale": 4.0 if guidance else 1.0}


def build_qwen_image() -> Any:
    """Qwen-Image."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return quiet(QwenImagePipeline(**parts(frozen(transformer), scheduler)))


def qwen_image_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Prompts whose last token is padding."""
    mask = torch.ones(TEXT[:2], dtype=torch.int64)
    mask[:, -1] = 0
    found = {**prompts(seed, guidance, prompt_embeds=TEXT), **SIZE, "prompt_embeds_mask": mask}
    negative = {"negative_prompt_embeds_mask": mask.clone()} if guidance else {}
    return {**found, **negative, "true_cfg_scale": 4.0 if guidance else 1.0}


def build_lumina2() -> Any:
    """Lumina 2: refiners of image and text before the main stack; its time rises."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(64, 32, 32),
        cap_feat_dim=24,
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return quiet(Lumina2Pipeline(**parts(frozen(transformer), scheduler)))


def lumina2_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Prompts and masks."""
    return {**masked_prompts(seed, guidance), **SIZE, "guidance_scale": 4.0 if guidance else 1.0}


def build_chroma() -> Any:
    """Chroma: FLUX's blocks, whose modulations come from one small network."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = ChromaTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=2,
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return quiet(ChromaPipeline(**parts(frozen(transformer), scheduler)))


def chroma_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Prompts and masks."""
    return {**masked_prompts(seed, guidance, torch.bool), **SIZE, "guidance_scale": 5.0 if guidance else 1.0}


def build_cogview4() -> Any:
    """CogView4."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=32,
        condition_dim=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    return quiet(CogView4Pipeline(**parts(frozen(transformer), scheduler)))


def cogview4_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Text to image."""
    return {**prompts(seed, guidance, prompt_embeds=TEXT), **SIZE, "guidance_scale": 5.0 if guidance else 1.0}


def build_ideogram4() -> Any:
    """Ideogram 4: the unconditional call of a step has a denoiser of its own. Text arrives as embeddings here too."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel

    def encode_prompt(prompt: list[Tensor], grid_h: int, grid_w: int, **_: Any) -> tuple[Tensor, ...]:
        text = torch.cat(prompt)
        batch, tokens, width = text.shape
        layout = Ideogram4Pipeline._prepare_ids([tokens] * batch, grid_h, grid_w, tokens, text.device)
        return torch.cat([text, torch.zeros(batch, grid_h * grid_w, width)], dim=1), *layout

    denoisers = [
        Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=64,
            adaln_dim=16,
            llm_features_dim=24,
            mrope_section=(2, 2, 2),
        )
        for _ in range(2)
    ]
    found = parts(frozen(denoisers[0]), FlowMatchEulerDiscreteScheduler())
    pipe = quiet(Ideogram4Pipeline(**found, unconditional_transformer=frozen(denoisers[1])))
    pipe.encode_prompt, pipe.check_inputs = encode_prompt, lambda **_: None
    return pipe


def ideogram4_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """One prompt, with a weight of the guidance that is the same in each step."""
    size = {"height": 2 * PIXELS, "width": 2 * PIXELS, "max_sequence_length": TEXT[1]}
    return {"prompt": [draw(seed, *TEXT)], **size, "guidance_scale": 5.0, "guidance_schedule": None}


CASES = (
    PipelineCase("flux", build_flux_pipeline, flux_arguments, two_calls),
    PipelineCase("flux_img2img", build_flux_img2img, flux_img2img_arguments, two_calls, steps_run=second_half),
    PipelineCase("flux_inpaint", build_flux_inpaint, flux_inpaint_arguments, two_calls, steps_run=second_half),
    PipelineCase("flux_controlnet", build_flux_controlnet, flux_controlnet_arguments, two_calls, moving=True),
    PipelineCase("flux2", partial(build_flux2, 0), flux2_arguments, one_call, guidance=(False,)),
    PipelineCase("flux2_image", partial(build_flux2, 4), flux2_image_arguments, one_call, guidance=(False,)),
    PipelineCase("flux2_klein", build_flux2_klein, flux2_klein_arguments, two_calls),
    PipelineCase("qwen_image", build_qwen_image, qwen_image_arguments, two_calls),
    PipelineCase("lumina2", build_lumina2, lumina2_arguments, two_calls),
    PipelineCase("chroma", build_chroma, chroma_arguments, two_calls),
    PipelineCase("cogview4", build_cogview4, cogview4_arguments, two_calls),
    PipelineCase(
        "ideogram4",
        build_ideogram4,
        ideogram4_arguments,
        one_call,
        denoisers=("transformer", "unconditional_transformer"),
        guidance=(True,),
        steps_run=lambda steps: (range(steps), range(steps)),
    ),
)
