"""Pipelines that make a video."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from tests.end_to_end.pipelines.case import (
    PIXELS,
    SIZE,
    STRENGTH,
    TEXT,
    PipelineCase,
    draw,
    frozen,
    masked_prompts,
    one_call,
    parts,
    picture,
    prompts,
    quiet,
    second_half,
    two_calls,
)
from tests.helpers.video_models import build_cogvideox, build_latte, build_mochi, build_wan

WAN_TEXT = (1, 512, 24)  # with an image, all states before the last 512 are the image's


def build_cogvideox_pipeline(from_video: bool) -> Any:
    """CogVideoX, from text or from a video."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXVideoToVideoPipeline

    pipeline = CogVideoXVideoToVideoPipeline if from_video else CogVideoXPipeline
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction")
    return quiet(pipeline(**parts(build_cogvideox(), scheduler)))


def cogvideox_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Two latent frames of eight rows."""
    scale = 6.0 if guidance else 1.0
    return {**prompts(seed, guidance, prompt_embeds=TEXT), **SIZE, "num_frames": 5, "guidance_scale": scale}


def cogvideox_video_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Latents of a video, half of whose structure is kept."""
    found = {**prompts(seed, guidance, prompt_embeds=TEXT), **SIZE, "guidance_scale": 6.0 if guidance else 1.0}
    return {**found, "latents": draw(seed, 1, 2, 4, 8, 8), "strength": STRENGTH}


def build_latte_pipeline() -> Any:
    """Latte, under DDIM."""
    from diffusers import DDIMScheduler, LattePipeline

    scheduler = DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    return quiet(LattePipeline(**parts(build_latte(), scheduler)))


def latte_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Three frames."""
    found = {**prompts(seed, guidance, prompt_embeds=TEXT), **SIZE, "video_length": 3, "negative_prompt": None}
    return {**found, "mask_feature": False, "guidance_scale": 7.5 if guidance else 1.0}


def build_mochi_pipeline() -> Any:
    """Mochi, whose timesteps rise."""
    from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline

    return quiet(MochiPipeline(**parts(build_mochi(), FlowMatchEulerDiscreteScheduler(invert_sigmas=True))))


def mochi_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Two latent frames; the text is 32 wide, and the last token of the negative prompt is padding."""
    found = masked_prompts(seed, guidance, torch.bool)
    embeds = prompts(seed, guidance, prompt_embeds=(1, 6, 32))
    return {**found, **embeds, **SIZE, "num_frames": 7, "guidance_scale": 4.5 if guidance else 1.0}


def wan_scheduler() -> Any:
    """UniPC on flow matching, as in Wan's repositories."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def build_wan_pipeline() -> Any:
    """Wan 2.1, text to video."""
    from diffusers import WanPipeline

    return quiet(WanPipeline(**parts(build_wan(), wan_scheduler())))


def build_wan22() -> Any:
    """Wan 2.2: one expert for high noise, another for low noise."""
    from diffusers import WanPipeline

    second = build_wan()
    for parameter in second.parameters():
        parameter.mul_(0.9)  # another model than the first one
    return quiet(WanPipeline(**parts(build_wan(), wan_scheduler()), transformer_2=second, boundary_ratio=0.8))


def experts(steps: int) -> tuple[range, ...]:
    """The steps of each expert of Wan 2.2, which follow from the scheduler's timesteps."""
    scheduler = wan_scheduler()
    scheduler.set_timesteps(steps)
    first = int((scheduler.timesteps >= 800).sum())
    return (range(first), range(first, steps))


def wan_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Two latent frames of eight rows."""
    scale = 5.0 if guidance else 1.0
    return {**prompts(seed, guidance, prompt_embeds=TEXT), **SIZE, "num_frames": 5, "guidance_scale": scale}


def wan_vae() -> nn.Module:
    """Wan's VAE at its smallest: a factor of 8 in space, of 4 in time."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    return frozen(vae)


def image_encoder() -> Any:
    """CLIP's vision tower: the states of 17 tokens, 32 wide."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    return frozen(CLIPVisionModel(config))


def image_processor() -> Any:
    """Resizes images to 16 pixels for the vision tower."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_rescale=False)


def build_wan_image() -> Any:
    """Wan 2.1, image to video: the first frame joins the latent's channels, its states join the text."""
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=12,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=32,
        added_kv_proj_dim=32,
    )
    eyes = {"image_encoder": image_encoder(), "image_processor": image_processor()}
    return quiet(WanImageToVideoPipeline(**parts(frozen(transformer), wan_scheduler(), wan_vae()), **eyes))


def wan_image_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """A first frame."""
    found = {**prompts(seed, guidance, prompt_embeds=WAN_TEXT), **SIZE, "num_frames": 5}
    return {**found, "image": picture(seed, PIXELS), "guidance_scale": 5.0 if guidance else 1.0}


def build_hunyuan_video() -> Any:
    """HunyuanVideo: a text refiner, two double blocks, two single ones; guidance as an input."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=24,
        pooled_projection_dim=24,
        rope_axes_dim=(4, 6, 6),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    return quiet(HunyuanVideoPipeline(**parts(frozen(transformer), scheduler, encoders=2)))


def hunyuan_video_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Two latent frames; with true guidance, if requested."""
    found = {**masked_prompts(seed, guidance), **prompts(seed, guidance, pooled_prompt_embeds=(1, 24)), **SIZE}
    return {**found, "num_frames": 5, "guidance_scale": 6.0, "true_cfg_scale": 2.0 if guidance else 1.0}


def build_ltx() -> Any:
    """LTX-Video."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel

    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=24,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return quiet(LTXPipeline(**parts(frozen(transformer), scheduler)))


def ltx_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Two latent frames of four rows: the pipeline assumes factors of 8 and 32."""
    fixed = {"height": 128, "width": 128, "num_frames": 9, "guidance_scale": 3.0 if guidance else 1.0}
    return {**masked_prompts(seed, guidance), **fixed}


class NoChecker(nn.Module):
    """Replaces the safety checker that Cosmos requires; prompts that are embeddings never reach it."""

    device = torch.device("cpu")
    dtype = torch.float32


def build_cosmos(version: int) -> Any:
    """Cosmos 1, text to video, under EDM; or Cosmos 2, text to image, under flow matching."""
    from diffusers import (
        Cosmos2TextToImagePipeline,
        CosmosTextToWorldPipeline,
        CosmosTransformer3DModel,
        EDMEulerScheduler,
        FlowMatchEulerDiscreteScheduler,
    )

    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        text_embed_dim=24,
        adaln_lora_dim=8,
        concat_padding_mask=False,  # resizing the mask needs torchvision
        max_size=(4, 16, 16),
        extra_pos_embed_type="learnable" if version == 1 else None,
    )
    frozen(transformer)
    if version == 1:
        edm = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min")
        return quiet(CosmosTextToWorldPipeline(**parts(transformer, edm), safety_checker=NoChecker()))
    flow = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return quiet(Cosmos2TextToImagePipeline(**parts(transformer, flow), safety_checker=NoChecker()))


def cosmos_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Text only."""
    return {**prompts(seed, guidance, prompt_embeds=TEXT), **SIZE, "guidance_scale": 7.0 if guidance else 1.0}


def cosmos1_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Two latent frames: the pipeline assumes a factor of 8."""
    return {**cosmos_arguments(seed, guidance), "num_frames": 9}


CASES = (
    PipelineCase("cogvideox", partial(build_cogvideox_pipeline, False), cogvideox_arguments, one_call),
    PipelineCase(
        "cogvideox_video",
        partial(build_cogvideox_pipeline, True),
        cogvideox_video_arguments,
        one_call,
        steps_run=second_half,
    ),
    PipelineCase("latte", build_latte_pipeline, latte_arguments, one_call),
    PipelineCase("mochi", build_mochi_pipeline, mochi_arguments, one_call),
    PipelineCase("wan", build_wan_pipeline, wan_arguments, two_calls),
    PipelineCase("wan22", build_wan22, wan_arguments, two_calls, ("transformer", "transformer_2"), steps_run=experts),
    PipelineCase("wan_image", build_wan_image, wan_image_arguments, two_calls),
    PipelineCase("hunyuan_video", build_hunyuan_video, hunyuan_video_arguments, two_calls),
    PipelineCase("ltx", build_ltx, ltx_arguments, one_call),
    PipelineCase("cosmos1", partial(build_cosmos, 1), cosmos1_arguments, two_calls),
    PipelineCase("cosmos2", partial(build_cosmos, 2), cosmos_arguments, two_calls),
)
