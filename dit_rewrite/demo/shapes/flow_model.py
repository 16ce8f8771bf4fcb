"""The bundled flow-matching denoiser, a small SD3 (joint attention of text and image), and a reader of its images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dit_rewrite.demo.shapes.data import NUM_CLASSES
from dit_rewrite.demo.shapes.model import WEIGHTS, load
from dit_rewrite.demo.shapes.relations import MAX_TOKENS, SIZE, WORDS, Objects, tokenise
from dit_rewrite.errors import MissingExtra

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

TEXT_CHANNELS = 64
LAYERS = 5
HEADS = 4
HEAD_CHANNELS = 32
PATCH = 4


def build_flow_denoiser() -> SD3Transformer2DModel:
    """Return an untrained SD3: 5 joint blocks, width 128, 64 tokens of 4x4 pixels and MAX_TOKENS of text. It predicts
    the velocity."""
    try:
        from diffusers import SD3Transformer2DModel
    except ImportError as error:
        raise MissingExtra("diffusers", "the bundled flow-matching model") from error
    return SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=PATCH,
        in_channels=3,
        out_channels=3,
        num_layers=LAYERS,
        attention_head_dim=HEAD_CHANNELS,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_CHANNELS,
        caption_projection_dim=HEADS * HEAD_CHANNELS,
        pooled_projection_dim=TEXT_CHANNELS,
        pos_embed_max_size=SIZE // PATCH,
        qk_norm="rms_norm",
    )


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return Euler's method for the straight paths that the denoiser was trained on (rectified flow)."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)


class FlowTextEncoder(nn.Module):
    """A learned vector for each word plus one for its position. The mean over the words is the pooled text."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), TEXT_CHANNELS)
        self.places = nn.Parameter(0.5 * torch.randn(MAX_TOKENS, TEXT_CHANNELS))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return text states (n, MAX_TOKENS, TEXT_CHANNELS) and pooled text (n, TEXT_CHANNELS) of tokens."""
        states = self.words(tokens) + self.places
        return states, states.mean(1)


class FlowModel(nn.Module):
    """Encoder and denoiser, which are trained and saved together. A sampler calls the encoder once per trajectory."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = FlowTextEncoder()
        self.denoiser = build_flow_denoiser()

    def forward(self, latents: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        """Return the predicted velocity, noise - image, (n, 3, SIZE, SIZE); `timestep` is 1000 sigma."""
        states, pooled = self.encoder(tokens)
        return self.denoiser(latents, states, pooled, timestep, return_dict=False)[0]


@torch.no_grad()
def encode_relations(encoder: nn.Module, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return SD3's ``encoder_hidden_states`` and ``pooled_projections`` of captions, on the encoder's device.

    Raises BadArgument as `relations.tokenise` does.
    """
    tokens = tokenise(captions).to(next(encoder.parameters()).device)
    states, pooled = encoder(tokens)
    return states, pooled


def load_flow_model(path: Path = WEIGHTS / "flow_denoiser.safetensors") -> FlowModel:
    """Load the trained encoder and denoiser in float32 and eval mode. Raises DamagedWeights as `model.load` does."""
    return load(FlowModel(), path)


class PairReader(nn.Module):
    """A small convolutional network that reads the classes and positions of the two objects in an image.

    It does not read the relation of the caption, because two relations hold for objects on a diagonal.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(2 * width * (SIZE // 8) ** 2, 128), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Linear(128, 3 * NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Read images (n, 3, SIZE, SIZE) in [-1, 1].

        Returns logits (n, NUM_CLASSES) of the classes in each image, and (n, NUM_CLASSES, 2), the x and y in pixels of
        an object of each class.
        """
        logits, places = self.head(self.features(images)).split([NUM_CLASSES, 2 * NUM_CLASSES], dim=1)
        return logits, SIZE * (0.5 + places.unflatten(1, (NUM_CLASSES, 2)))


def load_pair_reader(path: Path = WEIGHTS / "pair_reader.safetensors") -> PairReader:
    """Load the trained reader in float32 and eval mode. Raises DamagedWeights as `model.load` does."""
    return load(PairReader(), path)


@torch.no_grad()
def read_objects(reader: nn.Module, images: Tensor) -> Objects:
    """Return the two most probable objects in each of the images (n, 3, SIZE, SIZE) in [-1, 1]."""
    logits, places = reader(images)
    classes = logits.topk(2).indices
    return Objects(classes, places.gather(1, classes[:, :, None].expand(-1, -1, 2)))
