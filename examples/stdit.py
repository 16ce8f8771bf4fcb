"""A spatial-temporal diffusion transformer in the style of Open-Sora, as an example of a custom model.

Video tokens go through blocks of four residual branches: attention within each frame, attention over the frames at each
position, cross-attention to the text, and an MLP. A small network of the timestep modulates all blocks; each block adds
a learnt table to its output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class STDiTConfig:
    """Sizes of an STDiT. The defaults are those of STDiT-XL/2."""

    in_channels: int = 4
    """Channels of the video latent."""
    out_channels: int = 8
    """Channels of the prediction; twice the latent's where the variance is predicted too."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Frames, rows and columns of one token."""
    width: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: float = 4.0
    text_width: int = 4096
    """Channels of the text encoder's states."""
    frequency_width: int = 256
    """Sines and cosines that describe the timestep."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        if self.width % 4 or self.frequency_width % 2:
            raise ValueError("width must be divisible by 4 and frequency_width by 2, for the sine-cosine embeddings")


def sincos(positions: Tensor, width: int) -> Tensor:
    """Return the float32 sine-cosine embedding (N, width) of `positions` (N,)."""
    half = width // 2
    rates = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=positions.device, dtype=torch.float32))
    angles = positions.float()[:, None] * rates[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def spatial_embedding(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Return the embedding (rows * columns, width) of a grid; each axis has half of the channels."""
    row = sincos(torch.arange(rows, device=device), width // 2)
    column = sincos(torch.arange(columns, device=device), width // 2)
    grid = [row[:, None].expand(rows, columns, -1), column[None, :].expand(rows, columns, -1)]
    return torch.cat(grid, dim=-1).reshape(rows * columns, width)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift a normalised x."""
    return x * (1 + scale) + shift


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Reshape (B, N, heads * d) to (B, heads, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Attention among the tokens of one sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of the video tokens to the text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        q = split_heads(self.q(x), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.kv(text).chunk(2, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU in between; also used to project the text and the timestep."""

    def __init__(self, in_width: int, hidden: int, out_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_width, hidden)
        self.fc2 = nn.Linear(hidden, out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TimestepEmbedder(nn.Module):
    """Embeds the timestep; the sinusoids are computed in float32."""

    def __init__(self, frequency_width: int, width: int) -> None:
        super().__init__()
        self.frequency_width = frequency_width
        self.fc1 = nn.Linear(frequency_width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        frequencies = sincos(timestep, self.frequency_width).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(frequencies)))


class STDiTBlock(nn.Module):
    """Spatial attention, temporal attention, cross-attention and MLP; all except the cross-attention are gated."""

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(width, config.heads)
        self.attn_temp = SelfAttention(width, config.heads)
        self.cross_attn = CrossAttention(width, config.heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(width, hidden, width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        modulation: Tensor,
        frames: int,
        text_mask: Tensor | None,
        temporal_embedding: Tensor | None,
    ) -> Tensor:
        batch = x.shape[0]
        table = self.scale_shift_table[None] + modulation.unflatten(-1, (6, -1))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)

        spatial = modulate(self.norm1(x), shift_msa, scale_msa).unflatten(1, (frames, -1)).flatten(0, 1)
        x = x + gate_msa * self.attn(spatial).unflatten(0, (batch, frames)).flatten(1, 2)

        temporal = x.unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)
        if temporal_embedding is not None:
            temporal = temporal + temporal_embedding
        x = x + gate_msa * self.attn_temp(temporal).unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)

        x = x + self.cross_attn(x, text, text_mask)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated norm and projection from tokens to patches."""

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(config.width, math.prod(config.patch_size) * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, config.width) / config.width**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table[None] + time[:, None]).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


class STDiT(nn.Module):
    """The denoiser: maps a video latent, a timestep and a text to a prediction with the size of the latent."""

    def __init__(self, config: STDiTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or STDiTConfig()
        width = config.width
        self.patch_embed = nn.Conv3d(config.in_channels, width, config.patch_size, stride=config.patch_size)
        self.time_embed = TimestepEmbedder(config.frequency_width, width)
        self.time_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.text_embed = MLP(config.text_width, width, width)
        self.blocks = nn.ModuleList(STDiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Predict (B, out_channels, T, H, W).

        Args:
            latent: noisy video, (B, in_channels, T, H, W); T, H and W are multiples of the patch.
            timestep: (B,)
            text: states of the text encoder, (B, L, text_width)
            text_mask: (B, L), True for tokens that take part
        """
        x = self.patch_embed(latent)
        frames, rows, columns = x.shape[2:]
        position = spatial_embedding(rows, columns, x.shape[1], x.device).to(x.dtype)
        x = (x.permute(0, 2, 3, 4, 1).flatten(2, 3) + position).flatten(1, 2)

        time = self.time_embed(timestep)
        modulation = self.time_block(time)
        text = self.text_embed(text)
        mask = None if text_mask is None else text_mask.bool()[:, None, None, :]
        frame_position = sincos(torch.arange(frames, device=x.device), x.shape[-1]).to(x.dtype)
        for index, block in enumerate(self.blocks):
            x = block(x, text, modulation, frames, mask, frame_position if index == 0 else None)
        return self.unpatchify(self.final_layer(x, time), frames, rows, columns)

    def unpatchify(self, x: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        """Reshape tokens (B, frames * rows * columns, patch) to a video."""
        t, h, w = self.config.patch_size
        x = x.unflatten(2, (t, h, w, -1)).unflatten(1, (frames, rows, columns))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
