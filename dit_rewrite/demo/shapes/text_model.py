"""The bundled text-conditional denoiser: a small PixArt, and an encoder with the vocabulary of the captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dit_rewrite.demo.shapes.captions import MAX_TOKENS, WORDS, tokenise
from dit_rewrite.demo.shapes.data import SIZE
from dit_rewrite.demo.shapes.model import WEIGHTS, load
from dit_rewrite.errors import MissingExtra

if TYPE_CHECKING:
    from diffusers import PixArtTransformer2DModel

TEXT_CHANNELS = 64
LAYERS = 4
HEADS = 4
HEAD_CHANNELS = 32


def build_text_denoiser() -> PixArtTransformer2DModel:
    """Return an untrained PixArt: 4 layers, width 128, 64 tokens of 2x2 pixels, TEXT_CHANNELS of text, predicting v."""
    try:
        from diffusers import PixArtTransformer2DModel
    except ImportError as error:
        raise MissingExtra("diffusers", "the bundled text-to-shapes model") from error
    return PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_CHANNELS,
        in_channels=3,
        out_channels=3,
        num_layers=LAYERS,
        cross_attention_dim=HEADS * HEAD_CHANNELS,
        caption_channels=TEXT_CHANNELS,
        sample_size=SIZE,
        patch_size=2,
    )


class TextEncoder(nn.Module):
    """A learned vector for each word plus a sinusoid of its position (Vaswani et al. 2017, section 3.5)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), TEXT_CHANNELS)
        rate = torch.exp(torch.arange(0, TEXT_CHANNELS, 2) * (-math.log(10000.0) / TEXT_CHANNELS))
        angle = torch.arange(MAX_TOKENS)[:, None] * rate
        self.register_buffer("places", torch.cat([angle.sin(), angle.cos()], dim=1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return text states (n, MAX_TOKENS, TEXT_CHANNELS) of tokens (n, MAX_TOKENS) from `captions.tokenise`."""
        return self.words(tokens) + self.places


class TextModel(nn.Module):
    """Encoder and denoiser, which are trained and saved together. A sampler calls the encoder once per trajectory."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = TextEncoder()
        self.denoiser = build_text_denoiser()

    def forward(self, latents: Tensor, timestep: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the predicted v (n, 3, SIZE, SIZE) of noisy images; tokens and mask come from `captions.tokenise`."""
        return self.denoiser(latents, self.encoder(tokens), timestep, encoder_attention_mask=mask, return_dict=False)[0]


@torch.no_grad()
def encode(encoder: nn.Module, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return text states (n, MAX_TOKENS, TEXT_CHANNELS) and their mask (n, MAX_TOKENS), on the encoder's device.

    They are PixArt's ``encoder_hidden_states`` and ``encoder_attention_mask``. Raises BadArgument as `tokenise` does.
    """
    device = next(encoder.parameters()).device
    tokens, mask = (part.to(device) for part in tokenise(captions))
    return encoder(tokens), mask


def load_text_model(path: Path = WEIGHTS / "text_denoiser.safetensors") -> TextModel:
    """Load the trained encoder and denoiser in float32 and eval mode. Raises DamagedWeights as `model.load` does."""
    return load(TextModel(), path)
