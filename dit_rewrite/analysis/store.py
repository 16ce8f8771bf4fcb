"""The file of an analysis: safetensors, with a JSON header in its metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_rewrite.errors import BadAnalysis, MissingExtra

FORMAT = "dit_rewrite analysis"
VERSION = 1
_NAME = "dit_rewrite"  # the metadata entry with the header


def write(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file atomically: readers, also after a crash, see either the old or the new content."""
    save = _library().save
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    known = {"format": FORMAT, "version": VERSION, "digest": _digest(tensors), **header}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.writing")
    unfinished.write_bytes(save(tensors, {_NAME: json.dumps(known)}))
    unfinished.replace(path)


def read(path: Path, fields: Mapping[str, type]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors of a file. `fields` are those of the header.

    Raises BadAnalysis for a damaged or foreign file, and OSError if it cannot be read.
    """
    library = _library()
    content = path.read_bytes()
    try:
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
        header = json.loads(metadata[_NAME])
        tensors: dict[str, Tensor] = library.load(content)
    except KeyError:
        raise BadAnalysis(path, "it is a safetensors file of something else") from None
    except Exception as error:  # safetensors has an exception class of its own, json and the decoder have others
        raise BadAnalysis(path, f"it is damaged, or no safetensors file ({type(error).__name__}: {error})") from None
    _check(path, header, fields)
    if header["digest"] != _digest(tensors):
        raise BadAnalysis(path, "its tensors are damaged (their digest differs)")
    return header, tensors


def _check(path: Path, header: Any, fields: Mapping[str, type]) -> None:
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise BadAnalysis(path, "it is a safetensors file of something else")
    if header.get("version") != VERSION:
        raise BadAnalysis(path, f"its version is {header.get('version')!r:.50}, and this dit_rewrite reads {VERSION}")
    for name, kind in {"digest": str, **fields}.items():
        if not isinstance(header.get(name), kind):
            raise BadAnalysis(path, f"its header has no valid {name}")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _library() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingExtra("safetensors", "an analysis", "analysis") from error
    return safetensors.torch
