"""Random weights for models, and random inputs of a trajectory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn

BATCH = 2

LARGEST_TURN = 0.2  # the largest rotation of a latent between two calls, in radians: a change of 20 %


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
    """Redraw the parameters, freeze them, and cast those that `from_pretrained(torch_dtype=dtype)` would cast."""
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
