"""Pipelines that make an image in one call a step: both halves of classifier-free guidance are one batch."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

from tests.end_to_end.pipelines.case import (
    SIZE,
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
)
from tests.helpers.image_models import build_omnigen, build_sd3


def build_dit() -> Any:
    """DiT: classes 0 to 999, and 1000 for the unconditional half, as in the pipeline."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    scheduler = DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    return quiet(DiTPipeline(transformer=frozen(transformer), vae=image_vae(4), scheduler=scheduler))


def dit_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Two classes."""
    return {"class_labels": [seed + 1, seed + 2], "guidance_scale": 4.0 if guidance else 1.0}


def pixart_transformer(sample_size: int) -> Any:
    """PixArt with two blocks; at 128 latent rows the pipeline gives it resolution and aspect ratio."""
    from diffusers import PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=48,
        sample_size=sample_size,
        caption_channels=24,
    )
    return frozen(transformer)


def build_pixart(alpha: bool) -> Any:
    """PixArt-alpha, with resolution and aspect ratio, or PixArt-Sigma, without them; under DPM-Solver++."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline

    pipeline, rows = (PixArtAlphaPipeline, 128) if alpha else (PixArtSigmaPipeline, 8)
    scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction")
    return quiet(pipeline(**parts(pixart_transformer(rows), scheduler)))


def pixart_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """One prompt, without resolution binning."""
    scale = 4.5 if guidance else 1.0
    fixed = {**SIZE, "guidance_scale": scale, "use_resolution_binning": False, "negative_prompt": None}
    return {**masked_prompts(seed, guidance), **fixed}


def build_sd3_pipeline() -> Any:
    """Stable Diffusion 3, flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(StableDiffusion3Pipeline(**parts(build_sd3(), scheduler, encoders=3)))


def sd3_prompts(seed: int, guidance: bool) -> dict[str, Any]:
    """Text states and pooled text."""
    embeds = prompts(seed, guidance, prompt_embeds=TEXT, pooled_prompt_embeds=(1, 24))
    return {**embeds, "guidance_scale": 7.0 if guidance else 1.0}


def sd3_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Eight latent rows."""
    return {**sd3_prompts(seed, guidance), **SIZE}


def build_sd3_controlnet() -> Any:
    """Stable Diffusion 3 whose blocks receive residuals from a ControlNet, new ones at every step."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3ControlNetModel, StableDiffusion3ControlNetPipeline

    controlnet = SD3ControlNetModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        out_channels=4,
        pos_embed_max_size=8,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    found = parts(build_sd3(), scheduler, image_vae(4), encoders=3)
    return quiet(StableDiffusion3ControlNetPipeline(**found, controlnet=frozen(controlnet)))


def sd3_controlnet_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """An image to follow."""
    return {**sd3_prompts(seed, guidance), "control_image": picture(seed), "height": 16, "width": 16}


def build_sana() -> Any:
    """Sana: linear self-attention, cross-attention, a convolutional feed-forward."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(SanaPipeline(**parts(frozen(transformer), scheduler)))


def sana_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Four latent rows: the pipeline assumes a factor of 32."""
    scale = 4.5 if guidance else 1.0
    fixed = {"height": 128, "width": 128, "guidance_scale": scale, "use_resolution_binning": False}
    return {**masked_prompts(seed, guidance), **fixed, "negative_prompt": None}


def build_aura_flow() -> Any:
    """AuraFlow: a joint block, a single one."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    return quiet(AuraFlowPipeline(**parts(frozen(transformer), scheduler)))


def aura_flow_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """The pipeline requires masks but does not use them."""
    return {**masked_prompts(seed, guidance), **SIZE, "guidance_scale": 3.5 if guidance else 1.0}


def build_hidream() -> Any:
    """HiDream: joint and single blocks with a mixture of experts."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline, HiDreamImageTransformer2DModel

    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[24, 24],
        text_emb_dim=24,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(8, 8),
        llama_layers=(0, 1),  # one for each block
        force_inference_output=True,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = HiDreamImagePipeline(**parts(frozen(transformer), scheduler, encoders=4))
    pipe.default_sample_size = 8  # the pipeline enlarges every image to this size
    return quiet(pipe)


def hidream_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """T5 states, states of two layers of a Llama, pooled text."""
    shapes = {"prompt_embeds_t5": TEXT, "prompt_embeds_llama3": (2, *TEXT), "pooled_prompt_embeds": (1, 24)}
    return {**prompts(seed, guidance, **shapes), **SIZE, "guidance_scale": 5.0 if guidance else 1.0}


def word_tokenizer() -> Any:
    """A tokenizer with 49 numbered words; any text that a pipeline adds to the prompt is unknown to it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[unknown]": 1, **{f"w{number}": number for number in range(2, 50)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[unknown]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unknown]")


def text_processor(tokenizer: Any) -> Any:
    """OmniGen's prompt processor without its image part, which needs torchvision."""
    from diffusers.pipelines.omnigen import processor_omnigen as original

    processor = object.__new__(original.OmniGenMultiModalProcessor)
    processor.text_tokenizer, processor.max_image_size = tokenizer, 1024
    processor.collator = original.OmniGenCollator()
    return processor


def build_omnigen_pipeline() -> Any:
    """OmniGen: it always uses guidance, and takes the prompt as text."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.omnigen import pipeline_omnigen as original

    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1)
    found = {
        "transformer": build_omnigen(),
        "scheduler": scheduler,
        "vae": image_vae(4, levels=4),
        "tokenizer": word_tokenizer(),
    }
    with mock.patch.object(
        original, "OmniGenMultiModalProcessor", lambda tokenizer, **_: text_processor(tokenizer), create=True
    ):
        return quiet(original.OmniGenPipeline(**found))


def omnigen_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """A prompt of three words."""
    return {"prompt": f"w{seed + 2} w{seed + 3} w{seed + 7}", **SIZE, "guidance_scale": 2.5}


def build_z_image() -> Any:
    """Z-Image: lists of latents and prompts; refiners of image and text before the main stack."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 32, 32],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return quiet(ZImagePipeline(**parts(frozen(transformer), scheduler)))


def z_image_arguments(seed: int, guidance: bool) -> dict[str, Any]:
    """Two prompts of different lengths, as a list."""
    found = {"prompt_embeds": [draw(seed, 6, 24), draw(seed + 1, 9, 24)], **SIZE}
    if guidance:
        found["negative_prompt_embeds"] = [draw(seed + 500, 6, 24), draw(seed + 501, 5, 24)]
    return {**found, "guidance_scale": 5.0 if guidance else 0.0}


CASES = (
    PipelineCase("dit", build_dit, dit_arguments, one_call, output_type="pt"),
    PipelineCase("pixart_alpha", partial(build_pixart, True), pixart_arguments, one_call),
    PipelineCase("pixart_sigma", partial(build_pixart, False), pixart_arguments, one_call),
    PipelineCase("sd3", build_sd3_pipeline, sd3_arguments, one_call),
    PipelineCase("sd3_controlnet", build_sd3_controlnet, sd3_controlnet_arguments, one_call, moving=True),
    PipelineCase("sana", build_sana, sana_arguments, one_call),
    PipelineCase("aura_flow", build_aura_flow, aura_flow_arguments, one_call),
    PipelineCase("hidream", build_hidream, hidream_arguments, one_call),
    PipelineCase("omnigen", build_omnigen_pipeline, omnigen_arguments, one_call, guidance=(True,)),
    PipelineCase("z_image", build_z_image, z_image_arguments, one_call, moving=True),
)
