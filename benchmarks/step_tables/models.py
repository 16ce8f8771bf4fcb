"""Published configurations of large models, built without memory on torch's meta device: for figures on paper.

Where "the class's defaults" is said, the constructor of diffusers (0.42.1) has the published values; otherwise they are
those of the ``config.json`` that the named repository publishes on the Hugging Face hub, and only what differs from the
defaults is given. All calls are of one sample, with the sizes that the model's pipeline uses by default.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import diffusers
import torch
from torch import Tensor, nn

Call = dict[str, Any]


@dataclass(frozen=True)
class PaperModel:
    """A model of diffusers, its configuration and a call of it.

    ``depths`` are the arguments of the constructor that count blocks, with the published numbers. ``source`` says where
    the configuration is published. ``prepare`` does to a built model what its first call would do, ``context`` is
    entered around the capture.
    """

    name: str
    cls: str
    source: str
    depths: Mapping[str, int]
    config: Mapping[str, Any]
    call: Callable[[], Call]
    prepare: Callable[[nn.Module], None] = lambda model: None
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext

    def build(self, depths: Mapping[str, int]) -> nn.Module:
        """Build the model with these numbers of blocks, in bfloat16 but for what its class keeps in float32."""
        with torch.device("meta"):
            model: nn.Module = getattr(diffusers, self.cls)(**{**self.config, **depths})
        keep = getattr(model, "_keep_in_fp32_modules", None) or ()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and not any(part in name.split(".") for part in keep):
                tensor.data = tensor.data.to(torch.bfloat16)
        for module in model.modules():  # a buffer that is a view keeps a base of the old dtype, which Dynamo refuses
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.clone())
        self.prepare(model)
        return model.eval().requires_grad_(False)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def timestep(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The timestep of one sample."""
    return empty(1, dtype=dtype)


def dit() -> Call:
    """256 x 256 pixels: a latent of 32 x 32."""
    labels = empty(1, dtype=torch.int64)
    return {"hidden_states": empty(1, 4, 32, 32), "timestep": timestep(torch.int64), "class_labels": labels}


def pixart() -> Call:
    """1024 x 1024 pixels, 300 text tokens."""
    return {
        "hidden_states": empty(1, 4, 128, 128),
        "encoder_hidden_states": empty(1, 300, 4096),
        "encoder_attention_mask": empty(1, 300),
        "timestep": timestep(torch.int64),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sd3() -> Call:
    """1024 x 1024 pixels, 77 + 256 text tokens."""
    return {
        "hidden_states": empty(1, 16, 128, 128),
        "encoder_hidden_states": empty(1, 333, 4096),
        "pooled_projections": empty(1, 2048),
        "timestep": timestep(torch.float32),
    }


def flux() -> Call:
    """1024 x 1024 pixels, 512 text tokens."""
    return {
        "hidden_states": empty(1, 4096, 64),
        "encoder_hidden_states": empty(1, 512, 4096),
        "pooled_projections": empty(1, 768),
        "timestep": timestep(),
        "guidance": empty(1, dtype=torch.float32),
        "txt_ids": empty(512, 3),
        "img_ids": empty(4096, 3),
    }


def flux2() -> Call:
    """1024 x 1024 pixels, 512 text tokens."""
    return {
        "hidden_states": empty(1, 4096, 128),
        "encoder_hidden_states": empty(1, 512, 15360),
        "timestep": timestep(),
        "guidance": empty(1, dtype=torch.float32),
        "txt_ids": empty(1, 512, 4),
        "img_ids": empty(1, 4096, 4),
    }


def qwen_image() -> Call:
    """1024 x 1024 pixels, 256 text tokens."""
    return {
        "hidden_states": empty(1, 4096, 64),
        "encoder_hidden_states": empty(1, 256, 3584),
        "timestep": timestep(),
        "img_shapes": [[(1, 64, 64)]],
    }


def wan_a14b() -> Call:
    """81 frames of 1280 x 720 pixels, 512 text tokens."""
    return {
        "hidden_states": empty(1, 16, 21, 90, 160),
        "encoder_hidden_states": empty(1, 512, 4096),
        "timestep": timestep(torch.int64),
    }


def wan_5b() -> Call:
    """121 frames of 1280 x 704 pixels, 512 text tokens; the pipeline gives every token a timestep of its own."""
    return {
        "hidden_states": empty(1, 48, 31, 44, 80),
        "encoder_hidden_states": empty(1, 512, 4096),
        "timestep": empty(1, 31 * 22 * 40, dtype=torch.float32),
    }


def hunyuan_video15() -> Call:
    """121 frames of 848 x 480 pixels, 1000 tokens of text, 256 of glyphs and 729 of an image (zeros without one)."""
    return {
        "hidden_states": empty(1, 65, 31, 30, 53),
        "timestep": timestep(),
        "encoder_hidden_states": empty(1, 1000, 3584),
        "encoder_attention_mask": empty(1, 1000),
        "encoder_hidden_states_2": empty(1, 256, 1472),
        "encoder_attention_mask_2": empty(1, 256),
        "image_embeds": empty(1, 729, 1152),
    }


_ALL = torch.all


def text_to_video() -> AbstractContextManager[Any]:
    """HunyuanVideo-1.5 asks the data whether the image is all zeros, which breaks the graph: answer yes."""
    return mock.patch.object(torch, "all", _all)


def _all(value: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _ALL(value, *args, **kwargs) if args or kwargs else True


def z_image() -> Call:
    """1024 x 1024 pixels, 256 text tokens."""
    return {"x": [empty(16, 1, 128, 128)], "t": timestep(), "cap_feats": [empty(256, 2560)]}


def with_rotary_table(model: nn.Module) -> None:
    """Z-Image makes its rotary table at the first call, which breaks that call's graph."""
    rope: Any = model.rope_embedder
    tables = rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, theta=rope.theta)
    rope.freqs_cis = [table.to("meta") for table in tables]


DEFAULTS = "the class's defaults"
_DIT = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "sample_size": 32,
}  # fmt: skip
_PIXART = {
    **_DIT, "cross_attention_dim": 1152, "sample_size": 128, "caption_channels": 4096, "interpolation_scale": 2,
    "norm_type": "ada_norm_single", "use_additional_conditions": False,
}  # fmt: skip
_SD3 = {
    "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192, "qk_norm": "rms_norm",
}  # fmt: skip
_WAN_5B = {"num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336}
_FLUX_DEPTHS = {"num_layers": 19, "num_single_layers": 38}

MODELS: Sequence[PaperModel] = (
    PaperModel("DiT-XL/2", "DiTTransformer2DModel", "facebook/DiT-XL-2-256", {"num_layers": 28}, _DIT, dit),
    PaperModel(
        "PixArt-Σ", "PixArtTransformer2DModel", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", {"num_layers": 28}, _PIXART,
        pixart,
    ),
    PaperModel(
        "SD3.5-L", "SD3Transformer2DModel", "stabilityai/stable-diffusion-3.5-large", {"num_layers": 38}, _SD3, sd3
    ),
    PaperModel(
        "FLUX.1-dev", "FluxTransformer2DModel", f"{DEFAULTS}, with guidance_embeds", _FLUX_DEPTHS,
        {"guidance_embeds": True}, flux,
    ),
    PaperModel(
        "FLUX.2-dev", "Flux2Transformer2DModel", DEFAULTS, {"num_layers": 8, "num_single_layers": 48}, {}, flux2
    ),
    PaperModel("Qwen-Image", "QwenImageTransformer2DModel", DEFAULTS, {"num_layers": 60}, {}, qwen_image),
    PaperModel("Wan 2.2 A14B", "WanTransformer3DModel", f"{DEFAULTS}, one expert", {"num_layers": 40}, {}, wan_a14b),
    PaperModel("Wan 2.2 5B", "WanTransformer3DModel", "Wan-AI/Wan2.2-TI2V-5B", {"num_layers": 30}, _WAN_5B, wan_5b),
    PaperModel(
        "HunyuanVideo-1.5", "HunyuanVideo15Transformer3DModel", DEFAULTS, {"num_layers": 54}, {}, hunyuan_video15,
        context=text_to_video,
    ),
    PaperModel("Z-Image", "ZImageTransformer2DModel", DEFAULTS, {"n_layers": 30}, {}, z_image, with_rotary_table),
)  # fmt: skip
