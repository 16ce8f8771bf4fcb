"""Write labelled rows of small images to a PNG; each pixel is enlarged to a square."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

GAP = 4
MARGIN = 190  # pixels for the labels of rows
HEADER = 24  # pixels for the labels of columns
INK = (20, 20, 20)


def to_bytes(images: Tensor, scale: int) -> Tensor:
    """Convert images (n, 3, size, size) in [-1, 1] to uint8 (n, size * scale, size * scale, 3) by nearest neighbour."""
    values = ((images.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return values.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1)


def _write(canvas: ImageDraw.ImageDraw, x: int, y: int, text: str, anchor: str) -> None:
    from PIL import ImageFont

    canvas.text((x, y), text, fill=INK, anchor=anchor, font=ImageFont.load_default(size=15))


def _paste_row(page: Image.Image, images: Tensor, top: int, scale: int) -> None:
    from PIL import Image

    for column, pixels in enumerate(to_bytes(images, scale).numpy()):
        page.paste(Image.fromarray(pixels), (MARGIN + column * (len(pixels) + GAP), top))


def save_rows(path: Path, rows: Sequence[tuple[str, Tensor]], columns: Sequence[str], scale: int = 8) -> None:
    """Write a PNG with a row of images for each (label, images (n, 3, size, size)), below the labels `columns`."""
    from PIL import Image, ImageDraw

    cell = rows[0][1].shape[-1] * scale + GAP
    page = Image.new("RGB", (MARGIN + len(columns) * cell, HEADER + len(rows) * cell), "white")
    canvas = ImageDraw.Draw(page)
    for column, name in enumerate(columns):
        _write(canvas, MARGIN + column * cell + cell // 2, HEADER // 2, name, "mm")
    for row, (name, images) in enumerate(rows):
        top = HEADER + row * cell
        _write(canvas, MARGIN - 2 * GAP, top + cell // 2, name, "rm")
        _paste_row(page, images, top, scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
