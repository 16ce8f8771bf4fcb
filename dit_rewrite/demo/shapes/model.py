"""Build, save and load the bundled denoiser and the classifier of its images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from dit_rewrite.demo.shapes.data import NUM_CLASSES, SIZE
from dit_rewrite.errors import DamagedWeights, MissingExtra

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DiTTransformer2DModel

M = TypeVar("M", bound=nn.Module)

WEIGHTS = Path(__file__).parent / "weights"
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": "v_prediction"}


def build_denoiser() -> DiTTransformer2DModel:
    """Return an untrained class-conditional DiT: 8 layers, width 128, 64 tokens of 2x2 pixels. It predicts v."""
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        raise MissingExtra("diffusers", "the bundled shapes model") from error
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        num_layers=8,
        sample_size=SIZE,
        patch_size=2,
        num_embeds_ada_norm=NUM_CLASSES,
        norm_elementwise_affine=False,
    )


def build_scheduler() -> DDIMScheduler:
    """Return the DDIM sampler with the schedule that the denoiser was trained on (DDPM, linear betas)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**SCHEDULE, timestep_spacing="trailing", clip_sample=True)


class Classifier(nn.Module):
    """A small convolutional network that classifies images; its features are used for Fréchet distances."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(2 * width * (SIZE // 4) ** 2, 64), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Linear(64, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, NUM_CLASSES) of images (n, 3, SIZE, SIZE) in [-1, 1]."""
        return self.head(self.features(images))


def save(module: nn.Module, path: Path) -> None:
    """Write a module's floating-point state as fp16 safetensors."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in module.state_dict().items()}, path)


def load(module: M, path: Path) -> M:
    """Load a file written by `save` into a module, in the module's dtype, and put the module in eval mode.

    Raises DamagedWeights if the file is missing, unreadable, or of another module.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
        module.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DamagedWeights(path, error) from error
    return module.eval().requires_grad_(False)


def load_denoiser(path: Path = WEIGHTS / "denoiser.safetensors") -> DiTTransformer2DModel:
    """Load the trained denoiser in float32 and eval mode. Raises DamagedWeights as `load` does."""
    return load(build_denoiser(), path)


def load_classifier(path: Path = WEIGHTS / "classifier.safetensors") -> Classifier:
    """Load the trained classifier in float32 and eval mode. Raises DamagedWeights as `load` does."""
    return load(Classifier(), path)


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of images (n, 3, SIZE, SIZE) that the classifier classifies as `labels` (n,)."""
    return (classifier(images).argmax(1) == labels).float().mean().item()
